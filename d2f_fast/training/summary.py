"""Describe a training run in the header of a LoRA file, in the entries that other programs show and in our own."""

from collections.abc import Mapping

from d2f_fast.config import DEFAULT_GUIDANCE, DEFAULT_STEPS, MAX_GUIDANCE, MAX_STEPS, TrainingConfig
from d2f_fast.data.depth_encoding import DepthDataset
from d2f_fast.data.pairs import PairDataset
from d2f_fast.data.source_images import SourceTargetDataset
from d2f_fast.errors import printable
from d2f_fast.lora.start import StartingLora
from d2f_fast.lora.tags import (
    CAPTIONS,
    DISTILLED,
    IMAGE_TO_IMAGE,
    SOURCE_NOISE,
    START,
    predicts_depth,
    starts_from_image,
    starts_from_zeros,
)

RECOMMENDED_STEPS_AFTER_PAIRS = 2


def recommended_steps(tags: Mapping[str, str]) -> int:
    """Return the number of sampling steps that tags recommend, or else the usual one."""
    return int(tags.get("d2f.recommended_steps", DEFAULT_STEPS))


def pair_tags(dataset: PairDataset, *, taught: bool = False, distilled: bool = False) -> dict[str, str]:
    """Return the entries that say what pairs a model was trained on, and how it is therefore sampled.

    The guidance of the pairs is built into the trained model, so that it is sampled without guidance.

    Args:
        dataset: The pairs. Those without a meta.json, as the published ones, do not say how they were made.
        taught: Whether the pairs only give the states at which a teacher's velocity is learned, so that neither their
            guidance nor their straight lines are.
        distilled: Whether the jump from noise to image alone is learned.
    """
    scales = dataset.common_meta("guidance_scale_range")
    steps, solver = dataset.common_meta("steps"), dataset.common_meta("solver")
    guidance = how = "unknown"
    if isinstance(scales, list) and len(scales) == 2 and all(_is_in(scale, 0, MAX_GUIDANCE) for scale in scales):
        guidance = " to ".join(dict.fromkeys(f"{scale:g}" for scale in scales))
    if _is_in(steps, 1, MAX_STEPS) and isinstance(solver, str):
        how = f"{printable(solver[:40])}, {steps} steps"
    if taught:
        return {"d2f.data": "pairs", "d2f.pairs": str(len(dataset))}
    return {
        "d2f.data": "pairs",
        "d2f.pairs": str(len(dataset)),
        "d2f.pairs_guidance": guidance,
        "d2f.pairs_solver": how,
        "d2f.recommended_steps": str(1 if distilled else RECOMMENDED_STEPS_AFTER_PAIRS),
        **({DISTILLED: "true"} if distilled else {}),
        "d2f.recommended_guidance": "1.0",
    }


def _is_in(value: object, low: float, high: float) -> bool:
    """Return whether an entry of a file is a number in a range, which NaN, infinities and true are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def depth_tags(dataset: DepthDataset, *, distilled: bool = False) -> dict[str, str]:
    """Return the entries that say that a model predicts depth, and what it has learned of it.

    Args:
        dataset: The images with depth.
        distilled: Whether the jump from zeros to the depth alone is learned.
    """
    return {
        "d2f.task": "depth",
        "d2f.depth_normalization": dataset.options.depth_normalization,
        "d2f.depth_images": str(len(dataset)),
        "d2f.recommended_guidance": "1.0",
        **({START: "zeros", DISTILLED: "true", "d2f.recommended_steps": "1"} if distilled else {}),
    }


def source_tags(dataset: SourceTargetDataset) -> dict[str, str]:
    """Return the entries that say that the flow of a model starts from an image, and how it is sampled.

    Args:
        dataset: The pairs of images.
    """
    return {
        "d2f.task": IMAGE_TO_IMAGE,
        SOURCE_NOISE: str(dataset.options.source_noise),
        CAPTIONS: str(any(folder.captioned is not None for folder in dataset.folders)).lower(),
        "d2f.image_pairs": str(len(dataset)),
        "d2f.recommended_steps": str(DEFAULT_STEPS),
        "d2f.recommended_guidance": "1.0",
    }


def recommended_guidance(tags: Mapping[str, str]) -> float:
    """Return the guidance scale to sample with."""
    return float(tags.get("d2f.recommended_guidance", DEFAULT_GUIDANCE))


def summary_tags(
    config: TrainingConfig, tags: dict[str, str], steps: int, batch_size: int, start: StartingLora | None = None
) -> dict[str, str]:
    """Return the entries that say how a LoRA was trained and how to sample with it. They hold no date.

    Args:
        config: Options of the run.
        tags: Entries of `tags_of`, which describe the objective.
        steps: Number of optimizer steps taken.
        batch_size: Number of images in each step, over all processes and passes.
        start: LoRA that the run started from; None where it started anew.

    Returns:
        `tags` and the entries of this summary: "d2f.*" for programs, "ss_*" as kohya's scripts write them, and
        "modelspec.usage_hint" for people.
    """
    sampling_steps = recommended_steps(tags)
    counted = "1 step" if sampling_steps == 1 else f"{sampling_steps} steps"
    guidance = recommended_guidance(tags)
    entries = {
        "d2f.steps": str(steps),
        "d2f.batch_size": str(batch_size),
        "d2f.learning_rate": str(config.learning_rate),
        "d2f.weights": "ema" if config.ema_decay else "last",
        "d2f.recommended_steps": str(sampling_steps),
        "d2f.recommended_spacing": "uniform",
        "d2f.recommended_guidance": str(guidance),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_total_batch_size": str(batch_size),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_seed": str(config.seed),
        "modelspec.usage_hint": _usage_hint(tags, counted, guidance),
    }
    if start is not None:
        entries["d2f.init_lora"] = f"{start.path.name} {start.identity}"
    return tags | entries


def _usage_hint(tags: dict[str, str], counted_steps: str, guidance: float) -> str:
    """Return in words how the result is used."""
    if predicts_depth(tags):
        start = " from zeros" if starts_from_zeros(tags) else ""
        return f"{counted_steps}{start}; predicts depth, with d2f sample --task depth"
    if starts_from_image(tags):
        return f"{counted_steps}; starts from an image, with d2f sample --task image_to_image"
    return f"{counted_steps}, guidance {guidance:g}, {_sampler(tags)}"


def _sampler(tags: dict[str, str]) -> str:
    """Return in words how to sample in other programs."""
    if tags.get("d2f.fm_form") == "published":
        return "with d2f_fast only: the network is fed the flow time itself"
    shift = tags.get("d2f.shift", "1.0")
    if tags.get("d2f.prediction_type") == "flow_prediction":
        return f"sampler Euler with flow matching (ModelSamplingSD3 in ComfyUI), shift {shift}"
    return f"sampler Euler with the sigmas {tags.get('d2f.recommended_sigmas', '')}"
