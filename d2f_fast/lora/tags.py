"""Read the header entries of LoRA files that say how they were trained and are to be sampled. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import get_args

from d2f_fast.config import FlowForm, PredictionType
from d2f_fast.errors import ModelError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_header import read_tensor_header
from d2f_fast.lora.source import check_lora_file

TAG_PREFIX = "d2f."
TASK, SOURCE_NOISE, CAPTIONS = "d2f.task", "d2f.source_noise", "d2f.captions"
START, DISTILLED = "d2f.start", "d2f.distilled"
IMAGE_TO_IMAGE = "image_to_image"
_PREDICTION, _SHIFT, _FORM = "d2f.prediction_type", "d2f.shift", "d2f.fm_form"
# Entries that take a few words only, in the spelling that this package writes and reads.
_WORDS: dict[str, tuple[str, ...]] = {
    _PREDICTION: get_args(PredictionType),
    _FORM: get_args(FlowForm),
    "d2f.vae_reflection_padding": ("true", "false"),
    CAPTIONS: ("true", "false"),
    START: ("noise", "zeros"),
}


def lora_tags(source: StrPath) -> dict[str, str]:
    """Read the header entries of a LoRA file that begin with "d2f.": how it was trained and is to be sampled.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    entries = read_tensor_header(check_lora_file(source)).entries
    return {name: value for name, value in entries.items() if name.startswith(TAG_PREFIX)}


def common_tags(sources: Sequence[StrPath], shift: float | None = None) -> dict[str, str]:
    """Read the tags of several LoRA files that are used together.

    Args:
        sources: `.safetensors` files, or folders that hold one. A file without tags has no say.
        shift: Shift that is used whatever the files say; None takes theirs, on which they must agree.

    Returns:
        The tags on which all files agree that have them.

    Raises:
        ModelError: One file makes the network predict the flow velocity and another does not, their shifts, forms,
            tasks or starts differ, or a tag has a value that it cannot have.
        CheckpointError: A file is missing, damaged, or a pickle.
    """
    tagged = {str(source): tags for source in sources if (tags := lora_tags(source))}
    for source, tags in tagged.items():
        check_tags(f"LoRA {source}", tags, shift)
    predicts_flow = {source: tags.get(_PREDICTION) == "flow_prediction" for source, tags in tagged.items()}
    if len(set(predicts_flow.values())) > 1:
        flow, other = (next(source for source, is_flow in predicts_flow.items() if is_flow == kind) for kind in (1, 0))
        raise ModelError(
            f"LoRA {printable(flow)} makes the network predict the flow velocity, and {printable(other)} does not: use"
            " only one of them"
        )
    forms = {source: tags.get(_FORM, "diffusers") for source, tags in tagged.items() if predicts_flow[source]}
    tasks = {source: tags[TASK] for source, tags in tagged.items() if TASK in tags}
    starts = {source: f"from {tagged[source].get(START, 'noise')}" for source in tasks}
    for words, differ in (
        (forms, "were trained in different forms of naive flow matching"),
        (tasks, "were trained on different tasks"),
        (starts, "were trained to start in different ways"),
    ):
        if len(set(words.values())) > 1:
            named = " and ".join(f"{printable(source)} ({printable(word)})" for source, word in words.items())
            raise ModelError(f"LoRA {named} {differ}: use only one of them")
    common: dict[str, str] = {}
    for name in {name for tags in tagged.values() for name in tags}:
        values = {tags[name] for tags in tagged.values() if name in tags}
        if len(values) == 1:
            common[name] = values.pop()
        elif name == _SHIFT and shift is None:
            both = " and ".join(printable(value) for value in sorted(values)[:2])
            raise ModelError(f"LoRA {', '.join(map(printable, tagged))}: their shifts {both} differ: give --shift")
    return common


def check_tags(where: str, tags: Mapping[str, object], shift: float | None = None) -> None:
    """Refuse a shift that a file cannot have, and unknown words in the entries that take a few.

    Args:
        where: Name of the file, for the message.
        tags: Its entries that begin with "d2f.".
        shift: Shift that is used whatever the file says; None takes the file's.

    Raises:
        ModelError: The shift is not a number from 0.001 to 1000, or a word is unknown.
    """
    stated = tags.get(_SHIFT, 1.0)
    try:
        is_usable = shift is not None or (isinstance(stated, str | int | float) and 1e-3 <= float(stated) <= 1e3)
    except ValueError:
        is_usable = False
    if not is_usable:
        got = printable(str(stated)[:100])
        raise ModelError(f"{printable(where)}: {_SHIFT} must be a number from 0.001 to 1000, got {got}: give --shift")
    for name, words in _WORDS.items():
        if name in tags and tags[name] not in words:
            raise ModelError(
                f"{printable(where)}: {name} must be {', '.join(words[:-1])} or {words[-1]}, got"
                f" {printable(str(tags[name])[:100])}: correct the entry, or save the file again with d2f_fast"
            )


def tags_with_lora(tags: Mapping[str, str], of_lora: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a model with LoRA merged into it, of which those of the LoRA replace the ones of the model.

    A LoRA that was trained on a task starts as it was trained to, however the model below it started.

    Args:
        tags: Tags of the model.
        of_lora: Tags of the LoRA, from `common_tags`.
    """
    replaced = (START, DISTILLED) if TASK in of_lora else ()
    return {name: value for name, value in tags.items() if name not in replaced} | dict(of_lora)


def predicts_depth(tags: Mapping[str, object]) -> bool:
    """Return whether tags are those of a model that predicts depth.

    Args:
        tags: Entries that begin with "d2f.".
    """
    return tags.get(TASK) == "depth"


def starts_from_image(tags: Mapping[str, object]) -> bool:
    """Return whether tags are those of a model whose flow starts from an image in place of noise.

    Args:
        tags: Entries that begin with "d2f.".
    """
    return tags.get(TASK) == IMAGE_TO_IMAGE


def starts_from_zeros(tags: Mapping[str, object]) -> bool:
    """Return whether tags are those of a model that jumps from zeros, in place of noise, to its result in one step.

    Args:
        tags: Entries that begin with "d2f.".
    """
    return tags.get(START) == "zeros"
