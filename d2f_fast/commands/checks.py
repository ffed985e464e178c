"""Check what several commands take alike, before the slow imports."""

import os
from collections.abc import Iterable

from d2f_fast.lora.source import check_lora_file, parse_lora


def check_lora_and_output(lora: Iterable[str], output_dir: str) -> None:
    """Refuse LoRA files that cannot be read, and an output folder whose name is that of a file.

    Args:
        lora: LoRA as PATH or PATH:SCALE.
        output_dir: Output folder, which is not made here.

    Raises:
        RefusedInputError: A LoRA file or the output folder cannot be used.
    """
    from d2f_fast.files.atomic import make_folder

    for adapter in map(parse_lora, lora):
        check_lora_file(adapter.path)
    if os.path.exists(output_dir):
        make_folder(output_dir)  # This refuses a file of that name.
