"""Check and say what several commands take alike, before the slow imports."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.lora.family import unknown_family
from d2f_fast.lora.source import check_lora_file, parse_lora
from d2f_fast.models.names import MINIATURE
from d2f_fast.sampling.options import ChosenSteps


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


def say_steps(given: int | None, steps: ChosenSteps) -> None:
    """Print the number of sampling steps and where it comes from, unless it was given.

    Args:
        given: Number that was given; None for none.
        steps: Number that is taken.
    """
    if given is None:
        print(f"d2f: num_inference_steps {steps.number}, {steps.source}", file=sys.stderr)


def check_base_model(base_model: str | None, lora: Path, kohya_output: Path | None) -> None:
    """Refuse a base model that is no folder, and a kohya file whose names nothing tells.

    Args:
        base_model: Folder of the model that a LoRA belongs to, or "miniature"; None for none.
        lora: LoRA file.
        kohya_output: Kohya file to write; None for a file of another form.

    Raises:
        RefusedInputError: There is no such folder, or the LoRA does not show which model it is of.
    """
    from d2f_fast.lora.describe import shows_no_family

    if base_model is None:
        if kohya_output is not None and shows_no_family(lora):
            raise unknown_family(kohya_output)
    elif base_model != MINIATURE and not Path(base_model).is_dir():
        raise RefusedInputError(f"base_model: {printable(base_model)} is not a diffusers folder")
