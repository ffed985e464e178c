"""Check what several commands take alike, before the slow imports."""

import os
from collections.abc import Iterable

from d2f_fast.lora.source import check_lora_file, parse_lora


def check_lora_and_output(lora: Iterable[str], output_dir: str, shift: float | None = None) -> None:
    """Refuse LoRA files that cannot be read or used together, and an output folder whose name is that of a file.

    Args:
        lora: LoRA as PATH or PATH:SCALE.
        output_dir: Output folder, which is not made here.
        shift: Shift of the sampling, whatever the files say; None takes theirs, on which they must agree.

    Raises:
        RefusedInputError: A LoRA file or the output folder cannot be used.
    """
    from d2f_fast.files.atomic import make_folder
    from d2f_fast.lora.tags import common_tags

    paths = [parse_lora(entry).path for entry in lora]
    for path in paths:
        check_lora_file(path)
    common_tags(paths, shift)  # This refuses tags that contradict each other.
    if os.path.exists(output_dir):
        make_folder(output_dir)  # This refuses a file of that name.
