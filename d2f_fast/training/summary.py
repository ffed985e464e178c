"""Describe a training run in the header of a LoRA file, in the entries that other programs show and in our own."""

from d2f_fast.config import TrainingConfig
from d2f_fast.lora.start import StartingLora

RECOMMENDED_STEPS = 4
RECOMMENDED_GUIDANCE = 3.0  # the default of `d2f sample`


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
    entries = {
        "d2f.steps": str(steps),
        "d2f.batch_size": str(batch_size),
        "d2f.learning_rate": str(config.learning_rate),
        "d2f.resolution": str(config.resolution),
        "d2f.weights": "ema" if config.ema_decay else "last",
        "d2f.recommended_steps": str(RECOMMENDED_STEPS),
        "d2f.recommended_spacing": "uniform",
        "d2f.recommended_guidance": str(RECOMMENDED_GUIDANCE),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_total_batch_size": str(batch_size),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_seed": str(config.seed),
        "modelspec.usage_hint": f"{RECOMMENDED_STEPS} steps, guidance {RECOMMENDED_GUIDANCE:g}, {_sampler(tags)}",
    }
    if start is not None:
        entries["d2f.init_lora"] = f"{start.path.name} {start.identity}"
    return tags | entries


def _sampler(tags: dict[str, str]) -> str:
    """Return in words how to sample in other programs."""
    if tags.get("d2f.fm_form") == "published":
        return "with d2f_fast only: the network is fed the flow time itself"
    shift = tags.get("d2f.shift", "1.0")
    if tags.get("d2f.prediction_type") == "flow_prediction":
        return f"sampler Euler with flow matching (ModelSamplingSD3 in ComfyUI), shift {shift}"
    return f"sampler Euler with the sigmas {tags.get('d2f.recommended_sigmas', '')}"
