"""Read the entries of a model that say how it was trained and is to be sampled, and those of LoRA with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_fast.config import DEFAULT_STEPS, MAX_SAMPLING_STEPS, check_guidance, check_number
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.json_file import read_json
from d2f_fast.files.tensor_header import read_tensor_header
from d2f_fast.image_sizes import Size, first_size, side_multiple
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import (
    SOURCE_NOISE,
    TAG_PREFIX,
    check_tags,
    common_tags,
    lora_tags,
    starts_from_image,
    starts_from_zeros,
    tags_with_lora,
)
from d2f_fast.models.configs import downsampling_of
from d2f_fast.models.depth_start import start_tags
from d2f_fast.models.folder import read_config
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.options import ChosenSteps

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

TAGS_FILE = "d2f.json"
_GUIDANCE, _STEPS, _RESOLUTION = "d2f.recommended_guidance", "d2f.recommended_steps", "d2f.resolution"
# What says how a model is sampled; the sigmas are those of the steps and the shift, for other programs.
_OF_SAMPLING = ("d2f.shift", _GUIDANCE, _STEPS, "d2f.recommended_sigmas", SOURCE_NOISE)


def tags_source(model: str) -> Path:
    """Return the file that holds the tags of a model, whether or not it is there: the model's own, or its d2f.json."""
    path = Path(model)
    return path if path.suffix == ".safetensors" else path / TAGS_FILE


def saved_tags(model: str) -> dict[str, str]:
    """Return the entries of a model that begin with "d2f.", from its `d2f.json` or the header of its file.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file. A folder without `d2f.json` has the task and the start
            that the configuration of its UNet states. A hub id has none: give its folder, see `load.local_source`.

    Raises:
        ModelError: `d2f.json` or the configuration is not a JSON object.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    source, config = tags_source(model), Path(model) / "unet" / "config.json"
    if source.suffix == ".safetensors":
        found: object = read_tensor_header(source).entries
    else:
        found = read_json(source) if source.is_file() else {}
    if not isinstance(found, dict):
        raise ModelError(f"{printable(source)} is not a JSON object: restore it, or remove it")
    started = start_tags(read_config(config)) if config.is_file() else {}
    return started | {name: str(value) for name, value in found.items() if name.startswith(TAG_PREFIX)}


def lowest_guidance(model: str, loras: Sequence[StrPath]) -> float | None:
    """Return the lowest guidance scale that the tags of a model and of LoRA recommend; None for no tags.

    What was trained on pairs has its guidance built in, so that guidance of another one would be added to it.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file.
        loras: LoRA files or folders that are used with it.

    Raises:
        RefusedInputError: A scale cannot be used.
    """
    own = {str(tags_source(model)): saved_tags(model)}
    return _lowest_guidance(own | {str(path): lora_tags(path) for path in loras})


def _lowest_guidance(tagged: Mapping[str, Mapping[str, str]]) -> float | None:
    """Return the lowest guidance scale in the tags of several files, by the names of the files; None for none."""
    scales = []
    for source, tags in tagged.items():
        if (found := tags.get(_GUIDANCE)) is not None:
            try:
                scales.append(float(found))
                check_guidance("guidance_scale", scales[-1])
            except ValueError as error:
                raise RefusedInputError(
                    f"{printable(source)} holds no usable {_GUIDANCE} ({error}): correct the entry, or remove it"
                ) from error
    return min(scales, default=None)


def chosen_steps(given: int | None, model: str, loras: Sequence[StrPath]) -> ChosenSteps:
    """Return the number of sampling steps that was given, else that of the LoRA's tags, the model's tags, or 4.

    Where LoRA recommend different numbers, the highest is taken, because fewer steps need straighter paths.

    Args:
        given: Number that was given; None for none.
        model: Pipeline folder, hub id, or `.safetensors` file.
        loras: LoRA files or folders that are used with it.

    Raises:
        RefusedInputError: No number was given, and that of a file cannot be used.
    """
    if given is not None:
        return ChosenSteps(given, "as given")
    of_lora = stated_steps({str(path): lora_tags(path) for path in loras})
    stated = of_lora or stated_steps({str(tags_source(model)): saved_tags(model)})
    if not stated:
        return ChosenSteps(DEFAULT_STEPS, "the default")
    highest = max(stated.values())
    if highest == min(stated.values()):
        return ChosenSteps(highest, f"as saved in {' and '.join(map(printable, stated))}")
    named = ", ".join(f"{number} in {printable(source)}" for source, number in stated.items())
    return ChosenSteps(highest, f"the highest of those saved: {named}")


def recommended_steps(model: str, loras: Sequence[StrPath]) -> int | None:
    """Return the number of sampling steps that the tags of LoRA, or else of a model, recommend; None for no tags.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file.
        loras: LoRA files or folders that are used with it.

    Raises:
        RefusedInputError: A number cannot be used.
    """
    number, source = chosen_steps(None, model, loras)
    return None if source == "the default" else number


def trained_size(model: str, loras: Sequence[StrPath]) -> Size | None:
    """Return the size of the images that LoRA, or else a model, were trained on: the first one where there are several.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file.
        loras: LoRA files or folders that are used with it.

    Returns:
        The size; None where no tags state it, or the LoRA state different ones.

    Raises:
        RefusedInputError: A tag does not state a size.
    """
    tagged = {str(path): lora_tags(path) for path in loras}
    stated = {source: tags[_RESOLUTION] for source, tags in tagged.items() if _RESOLUTION in tags}
    if not stated and (own := saved_tags(model).get(_RESOLUTION)) is not None:
        stated = {str(tags_source(model)): own}
    sizes = set()
    for source, text in stated.items():
        try:
            sizes.add(first_size(text))
        except ValueError as error:
            raise RefusedInputError(
                f"{printable(source)}: {_RESOLUTION} {printable(error)}: correct the entry, or remove it"
            ) from error
    return sizes.pop() if len(sizes) == 1 else None


def take_trained_size(
    pipeline: "DiffusionPipeline", model: str, loras: Sequence[StrPath], *, squares_only: bool = False
) -> None:
    """Make the size of the training a pipeline's own, at which it generates where no other size is given.

    Args:
        pipeline: Pipeline of the model, with the LoRA merged into it or not.
        model: Pipeline folder, hub id, or `.safetensors` file.
        loras: LoRA files or folders that are used with it.
        squares_only: Whether only squares change something.

    Raises:
        RefusedInputError: A tag does not state a size.
    """
    size = trained_size(model, loras)
    if size is not None:
        set_own_size(pipeline.unet, size, downsampling_of(pipeline.vae.config), squares_only=squares_only)


def set_own_size(unet: "UNet2DConditionModel", size: Size, downsampling: int, *, squares_only: bool = False) -> None:
    """Write the size of the images that a model was made for into the configuration of its network.

    Args:
        unet: Network of the model.
        size: Size in pixels; one at which no images can be generated changes nothing, see `side_multiple`.
        downsampling: Number of pixels along each side of one latent.
        squares_only: Whether only squares change something.
    """
    multiple = side_multiple(downsampling)
    if size.height % multiple or size.width % multiple or (squares_only and size.height != size.width):
        return
    height, width = size.height // downsampling, size.width // downsampling
    unet.register_to_config(sample_size=height if height == width else (height, width))


def stated_steps(tagged: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Return the number of sampling steps in the tags of each file that has one, by the names of the files.

    Args:
        tagged: Tags of each file, by its name.

    Raises:
        RefusedInputError: A number cannot be used.
    """
    stated = {}
    for source, tags in tagged.items():
        if (found := tags.get(_STEPS)) is not None:
            try:
                stated[source] = int(found)
                check_number("num_inference_steps", stated[source], 1, MAX_SAMPLING_STEPS)
            except ValueError as error:
                raise RefusedInputError(
                    f"{printable(source)} holds no usable {_STEPS} ({error}): give the number of steps, or correct the"
                    " entry"
                ) from error
    return stated


def tags_of_merged(model: str, tags: Mapping[str, str], loras: Sequence[StrPath]) -> tuple[dict[str, str], list[str]]:
    """Return the tags of a model with LoRA merged into it, and the names of those on which the LoRA differ.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file.
        tags: Its tags. Those that a LoRA has, too, are replaced.
        loras: LoRA files or folders.

    Returns:
        The tags, with the lowest guidance that any of them recommends and the highest number of steps of the LoRA, or 1
        for a jump from zeros; and the names of further entries about sampling that the LoRA state differently, and that
        are left out.

    Raises:
        ModelError: One LoRA makes the network predict the flow velocity and another does not, their forms or starts
            differ, or a tag has a value that it cannot have.
        RefusedInputError: A guidance scale or a number of steps cannot be used.
    """
    common = common_tags(loras, shift=1.0)  # Where their shifts differ, none is taken.
    tagged = {str(path): lora_tags(path) for path in loras}
    stated = {name for found in tagged.values() for name in found}
    merged = tags_with_lora({name: value for name, value in tags.items() if name not in stated}, common)
    check_tags(", ".join(tagged), merged)
    if (guidance := _lowest_guidance({str(tags_source(model)): tags} | tagged)) is not None:
        merged[_GUIDANCE] = str(guidance)
    if steps := stated_steps(tagged):
        merged[_STEPS] = str(max(steps.values()))
    if starts_from_zeros(merged):
        merged[_STEPS] = "1"
    return merged, [name for name in _OF_SAMPLING if name in stated and name not in merged]


def options_of_training(model: str, lora: Sequence[str], options: ModelOptions, shift: float | None) -> dict[str, Any]:
    """Return prediction type, form, shift and padding: those given, else those in the tags of the LoRA or model.

    Args:
        model: Model as it was given.
        lora: LoRA as PATH or PATH:SCALE; where there are any, their tags count, and those of the model do not.
        options: Options of the model.
        shift: Shift that was given; None for none.

    Raises:
        RefusedInputError: The tags cannot be used, or contradict each other.
    """
    source = ", ".join(lora) or tags_source(model)
    tags = common_tags([parse_lora(entry).path for entry in lora], shift) if lora else saved_tags(model)
    chosen: dict[str, Any] = {"prediction_type": options.prediction_type, "shift": shift}
    try:
        tags = dict(tags)
        check_tags(str(source), tags, shift)
        if shift is None and "d2f.shift" in tags:
            chosen["shift"] = float(tags["d2f.shift"])
        # The other types are the base model's, whose own configuration says which one it is.
        kinds = (None, "flow_prediction")
        if chosen["prediction_type"] in kinds and tags.get("d2f.prediction_type") == "flow_prediction":
            chosen |= {"prediction_type": "flow_prediction", "fm_form": tags.get("d2f.fm_form")}
        if options.vae_reflection_padding is None:
            chosen["vae_reflection_padding"] = tags.get("d2f.vae_reflection_padding") == "true"
    except RefusedInputError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise RefusedInputError(f"{source} holds no usable tags ({error}): write the model again") from error
    return {name: value for name, value in chosen.items() if value is not None}


def check_sampling_tags(
    model: str, lora: Sequence[str], options: ModelOptions, shift: float | None, *, from_image: bool = False
) -> None:
    """Refuse tags of a model or of LoRA that cannot be used for sampling.

    Args:
        model: Model as it was given.
        lora: LoRA as PATH or PATH:SCALE.
        options: Options of the model.
        shift: Shift that was given; None for none.
        from_image: Whether the flow starts from an image. Otherwise what was trained to do so is refused.

    Raises:
        RefusedInputError: A tag has a value that it cannot have, the tags of two files contradict each other, or the
            flow starts from noise and should start from an image.
    """
    paths = [parse_lora(entry).path for entry in lora]
    options_of_training(model, lora, options, shift)
    lowest_guidance(model, paths)
    trained_size(model, paths)
    if from_image:
        return
    tagged = {model: saved_tags(model)} | {str(path): lora_tags(path) for path in paths}
    for source, tags in tagged.items():
        if starts_from_image(tags):
            raise ModelError(
                f"{printable(source)} was trained to start from an image, and this command starts from noise: use"
                " d2f sample --task image_to_image --image FILE"
            )
