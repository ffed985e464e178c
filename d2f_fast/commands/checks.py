"""Check and say what several commands take alike, before the slow imports."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.lora.family import unknown_family
from d2f_fast.lora.source import check_lora_file, parse_lora
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.options import ChosenGuidance, ChosenSteps


def check_lora_and_output(
    lora: Sequence[str],
    output_dir: str,
    shift: float | None = None,
    *,
    model: str | None = None,
    options: ModelOptions | None = None,
    images: int = 0,
    starts_from_image: bool = False,
) -> None:
    """Refuse LoRA files and tags that cannot be used together, and an output folder whose name is that of a file.

    Args:
        lora: LoRA as PATH or PATH:SCALE.
        output_dir: Output folder, which is not made here.
        shift: Shift of the sampling, whatever the files say; None takes theirs, on which they must agree.
        model: Model that the LoRA are merged into, whose own files were checked; None for none.
        options: Options of the model; None for the defaults.
        images: Number of images whose latents the network sees beside its own; see `model_layers`.
        starts_from_image: Whether the flow starts from an image. Otherwise what was trained to do so is refused.

    Raises:
        RefusedInputError: A LoRA file, a tag or the output folder cannot be used.
    """
    from d2f_fast.files.atomic import make_folder
    from d2f_fast.lora.tags import common_tags
    from d2f_fast.models.layers import check_lora_fits
    from d2f_fast.models.tags import check_sampling_tags

    options = options or ModelOptions()
    paths = [parse_lora(entry).path for entry in lora]
    for path in paths:
        check_lora_file(path)
    if model is None:
        common_tags(paths, shift)  # This refuses tags that contradict each other, as the next one does.
    else:
        check_sampling_tags(model, lora, options, shift, from_image=starts_from_image)
        check_lora_fits(lora, model, options, images)
    if os.path.exists(output_dir):
        make_folder(output_dir)  # This refuses a file of that name.


def say_steps(given: int | None, steps: ChosenSteps) -> None:
    """Print the number of sampling steps and where it comes from, unless it was given.

    Args:
        given: Number that was given; None for none.
        steps: Number that is taken.
    """
    if given is None:
        say_sampling(steps)


def say_sampling(
    steps: ChosenSteps, guidance: ChosenGuidance | None = None, saved_guidance: float | None = None
) -> None:
    """Print the number of sampling steps and the guidance scale that are taken, and where each of them comes from.

    Args:
        steps: Number of sampling steps.
        guidance: Guidance scale; None for a model that is sampled without guidance.
        saved_guidance: Guidance scale that is saved with the model or LoRA; None for none. A line says where guidance
            is added to one that is built in.
    """
    print(f"d2f: num_inference_steps {steps.number}, {steps.source}", file=sys.stderr)
    if guidance is not None:
        print(f"d2f: guidance_scale {guidance.scale:g}, {guidance.source}", file=sys.stderr)
        if saved_guidance is not None and saved_guidance <= 1 < guidance.scale:
            print(
                "d2f: the model or LoRA has guidance built in, to which this one is added: leave --guidance_scale out",
                file=sys.stderr,
            )


def check_lora_forms(base_model: str | None, loras: Sequence[Path], kohya_output: Path | None) -> None:
    """Refuse LoRA files that cannot be written in another form: of different models, or of one that nothing names.

    Args:
        base_model: Folder of the model that the LoRA belong to, or "miniature"; None for none.
        loras: LoRA files, at least one.
        kohya_output: Kohya file to write; None for a file of another form.

    Raises:
        RefusedInputError: There is no such folder, a LoRA does not belong to its model or shows no model, or the LoRA
            are of different families.
    """
    from d2f_fast.lora.describe import shows_no_family
    from d2f_fast.lora.fit import check_named_as_in_diffusers, check_plain_layers, known_layers
    from d2f_fast.lora.header import common_family, read_lora_header
    from d2f_fast.models.layers import model_layers

    if base_model is None:
        if kohya_output is not None and shows_no_family(loras[0]):
            raise unknown_family(kohya_output)
    elif base_model != MINIATURE and not Path(base_model).is_dir():
        raise RefusedInputError(f"base_model: {printable(base_model)} is not a diffusers folder")
    headers = [read_lora_header(path) for path in loras]
    family = common_family(headers)
    layers = None if base_model is None else model_layers(base_model, ModelOptions())
    for header in headers:
        check_plain_layers(header)
        if layers is not None:
            known_layers(header, layers)
        elif family is None:
            check_named_as_in_diffusers(header)


def check_readers(name: str, loras: Sequence[StrPath], form: str, *, is_lora: bool) -> None:
    """Refuse to write what starts from an image or from zeros in a form that is for programs which start from noise.

    A LoRA that is merged into a model decides how the result starts, where it was trained on a task.

    Args:
        name: LoRA file or folder, or name of the model, that is converted.
        loras: LoRA files or folders that are added to it.
        form: Form of the output.
        is_lora: Whether a LoRA is converted, and not a model.

    Raises:
        ModelError: The form is "kohya" or "single_file", and the result would start from an image or from zeros; or
            the LoRA cannot be used together.
    """
    from d2f_fast.lora.tags import (
        START,
        TASK,
        common_tags,
        lora_tags,
        starts_from_image,
        starts_from_zeros,
        tags_with_lora,
    )
    from d2f_fast.models.tags import saved_tags

    if form not in ("kohya", "single_file"):
        return
    own = lora_tags(name) if is_lora else saved_tags(name)
    tags = tags_with_lora(own, common_tags(loras, shift=1.0))  # Where their shifts differ, none is taken.
    if starts_from_image(tags) or starts_from_zeros(tags):
        start = "zeros" if starts_from_zeros(tags) else "an image"
        tagged = {str(path): lora_tags(path) for path in loras} | {name: own}
        deciding = next(source for source, found in tagged.items() if TASK in found or START in found)
        raise ModelError(
            f"{printable(deciding)} was trained to start from {start}, and the programs that read the form {form}"
            f" start from noise: give --to {'peft' if form == 'kohya' else 'diffusers, and a folder as OUTPUT'}"
        )


def check_merge(model: str, lora: Sequence[str], options: ModelOptions) -> None:
    """Refuse LoRA that cannot be merged into a model together.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        lora: LoRA as PATH or PATH:SCALE.
        options: Options of the model.

    Raises:
        RefusedInputError: A LoRA cannot be used, is one of another model, or contradicts another one.
    """
    from d2f_fast.lora.tags import common_tags
    from d2f_fast.models.layers import check_lora_fits

    common_tags([parse_lora(entry).path for entry in lora], shift=1.0)  # Where their shifts differ, none is taken.
    check_lora_fits(lora, model, options)
