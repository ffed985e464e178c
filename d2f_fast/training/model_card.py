"""Write the model card of a run: how to generate images with its result, and how it was trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from d2f_fast.config import DEFAULT_RANK, TrainingConfig
from d2f_fast.files.atomic import StrPath, atomic_path
from d2f_fast.lora.family import Family
from d2f_fast.lora.tags import SOURCE_NOISE, predicts_depth, starts_from_image, starts_from_zeros
from d2f_fast.models.names import MINIATURE
from d2f_fast.training.recipe import placeholders, recipe
from d2f_fast.training.summary import recommended_steps

CARD_FILE = "README.md"
# A card that has this line is replaced by the next run into the folder; any other README.md is somebody's own.
_MARK = "<!-- Written by d2f_fast. A later run into this folder replaces this file. -->"
_WORDS = {1: "one step", 2: "two steps", 4: "four steps"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(
    folder: StrPath,
    base_model: str,
    family: Family | None,
    config: TrainingConfig,
    tags: Mapping[str, str],
    result: Mapping[str, object],
) -> Path | None:
    """Write the model card `README.md` into the folder of a run, in the form of the Hugging Face Hub.

    Args:
        folder: Folder of the run, which exists.
        base_model: Model that the run started from. It is named in the card where it is a hub id or "miniature", not
            where it is a path of this machine.
        family: Family of the model; None for one that only diffusers loads.
        config: Options of the run.
        tags: Entries of the result's header; see `tags_of`.
        result: Number of "steps" of the run, and of "images_per_step", over all processes and passes, and where they
            were measured the "validation_losses".

    Returns:
        The file, or None where the folder holds a README.md that no run wrote, which is kept.

    Raises:
        RefusedInputError: The disk is full.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    text = "\n".join(_card(Path(folder), base_model, family, config, tags, result)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _card(
    folder: Path,
    base_model: str,
    family: Family | None,
    config: TrainingConfig,
    tags: Mapping[str, str],
    result: Mapping[str, object],
) -> Sequence[str]:
    """Return the lines of the card."""
    is_lora, steps = config.adapter == "lora", recommended_steps(tags)
    published = base_model if _HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else None
    base = MINIATURE if base_model == MINIATURE else published
    data = ModelCardData(
        base_model=published,
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(tags),
        tags=["diff2flow", "flow-matching", "stable-diffusion", *(["lora"] if is_lora else [])],
    )
    kind = "full finetuning"
    if is_lora:
        rank = config.rank or (DEFAULT_RANK if config.init_lora is None else None)
        kind = "LoRA that went on from another one" if rank is None else f"LoRA of rank {rank}"
    settings = {
        "base model": f"{MINIATURE}, the tiny model in d2f_fast" if base == MINIATURE else base or "a local model",
        "objective": tags["d2f.objective"],
        "prediction type": tags["d2f.prediction_type"],
        "trained": kind,
        "steps": result["steps"],
        f"{_samples(tags)} per step": result["images_per_step"],
        "resolution": f"{tags['d2f.resolution']} px",
        "learning rate": config.learning_rate,
        **({"trained on pairs with guidance": tags["d2f.pairs_guidance"]} if "d2f.pairs_guidance" in tags else {}),
        **({"LPIPS in the loss": f"{config.lpips_weight:g} ({config.lpips_net})"} if config.lpips_weight else {}),
        **({"share of noise at the start": tags[SOURCE_NOISE]} if starts_from_image(tags) else {}),
        **({"start": "zeros in place of noise, one step"} if starts_from_zeros(tags) else {}),
        **_validation_row(result.get("validation_losses")),
        "shift in training": tags["d2f.training_shift"],
        "shift for sampling": tags["d2f.shift"],
        "seed": config.seed,
    }
    return [
        "---",
        data.to_yaml(),
        "---",
        _MARK,
        "",
        f"# {folder.resolve().name}",
        "",
        f"A {kind}, trained with the flow-matching loss of [Diff2Flow](https://arxiv.org/abs/2506.02221) by `d2f_fast`."
        if tags["d2f.objective"] == "diff2flow"
        else f"A {kind}, trained by `d2f_fast` on the objective `{tags['d2f.objective']}`.",
        "",
        f"## {_purpose(tags)} in {_WORDS.get(steps, f'{steps} steps')}",
        "",
        *(line for way in recipe(folder, tags, family, folder.resolve().name, base) for line in way.markdown),
        "",
        placeholders(tags, names_base=is_lora and base is None),
        "",
        "## Training",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]


def _pipeline_tag(tags: Mapping[str, str]) -> str:
    """Return the task of the Hugging Face Hub that a result belongs to."""
    if predicts_depth(tags):
        return "depth-estimation"
    return "image-to-image" if starts_from_image(tags) else "text-to-image"


def _purpose(tags: Mapping[str, str]) -> str:
    """Return what a result does, as the start of a heading."""
    if predicts_depth(tags):
        return "Predict depth"
    return "Change images" if starts_from_image(tags) else "Generate images"


def _samples(tags: Mapping[str, str]) -> str:
    """Return what a step is counted in."""
    if starts_from_image(tags):
        return "pairs of images"
    return "pairs" if tags.get("d2f.data") == "pairs" else "images"


def _validation_row(losses: object) -> dict[str, str]:
    """Return the row of the card that holds the loss on held-out samples; empty where none was measured."""
    if not isinstance(losses, list):
        return {}
    by_time = ", ".join(f"{loss:.4g}" for loss in losses)
    mean = sum(losses) / len(losses)
    return {"loss on held-out samples": f"{mean:.4g}; in {len(losses)} parts of time from noise to image {by_time}"}
