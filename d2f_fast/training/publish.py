"""Save the result of a run: weights, a stock scheduler that samples them, and tags that describe them."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import nn

from d2f_fast.config import DEFAULT_LORA_FORMAT, TrainingConfig
from d2f_fast.errors import CheckpointError, RefusedInputError
from d2f_fast.files.atomic import atomic_folder
from d2f_fast.files.json_file import write_json
from d2f_fast.files.tensor_file import write_tensors
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow, uses_published_form
from d2f_fast.image_sizes import first_size, size_text
from d2f_fast.lora.merge import merged_unet
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.lora.tags import TASK, predicts_depth, starts_from_zeros
from d2f_fast.lora.write import lora_state_dict, save_lora
from d2f_fast.models.autoencoder import autoencoder_tags
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.depth_start import set_start
from d2f_fast.models.facts import same_schedule
from d2f_fast.models.marigold import depth_scheduler, marigold_pipeline
from d2f_fast.models.save import save_pipeline_folder, stock_flow_scheduler
from d2f_fast.models.tags import TAGS_FILE, set_own_size
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.training.objective import Objective
from d2f_fast.training.step import TrainingStep
from d2f_fast.training.summary import recommended_steps, summary_tags


def publish_lora(
    model: BaseModel,
    objective: Objective,
    config: TrainingConfig,
    tags: dict[str, str],
    folder: str | Path,
    steps: int,
    batch_size: int,
) -> Path:
    """Write the adapter in a model's UNet to the LoRA files that the options name, and check that they reload.

    Args:
        model: base model whose UNet has the adapter.
        objective: objective that it was trained on.
        config: options of the run.
        tags: entries of `tags_of`.
        folder: output folder, made where it is missing.
        steps: number of optimizer steps taken.
        batch_size: number of images in each step, over all processes and passes.

    Returns:
        Path of the file; with two files, that of the one for diffusers.

    Raises:
        RefusedInputError: the run is a full finetuning, or the disk is full.
        CheckpointError: a weight is not finite.
        ModelError: a reloaded file does not give the same output.
    """
    if config.adapter != "lora":
        raise RefusedInputError("adapter is full, so there is no LoRA to save: use save_pipeline")
    start = model.starting_lora
    return save_lora(
        model.unet,
        folder,
        summary_tags(config, tags, steps, batch_size, start),
        # Other programs neither show the network an image nor start from one.
        lora_format=config.lora_format or ("diffusers" if TASK in tags else DEFAULT_LORA_FORMAT),
        prediction_type=objective.flow.prediction_type,
        text_layers=None if start is None else start.text_layers,
    )


def write_checkpoint_lora(folder: Path, step: TrainingStep, steps: int, batch_size: int) -> None:
    """Write the adapter, with its averaged weights where the run keeps them, as a LoRA file for diffusers.

    The file is not read back, which would take longer than the checkpoint; the one at the end of the run is.

    Args:
        folder: folder of the checkpoint, to which `pytorch_lora_weights.safetensors` is added.
        step: training step whose adapter is written.
        steps: number of optimizer steps taken.
        batch_size: number of images in each step, over all processes and passes.

    Raises:
        CheckpointError: a weight is not finite.
        RefusedInputError: the disk is full.
    """
    start = step.starting_lora
    tags = summary_tags(step.config, step.tags, steps, batch_size, start)
    with nullcontext() if step.ema is None else step.ema.swapped():
        tensors, header = lora_state_dict(step.unet, None if start is None else start.text_layers)
    write_tensors(folder / LORA_FILE, tensors, header | tags)


def publish_pipeline(
    model: BaseModel,
    objective: Objective,
    config: TrainingConfig,
    tags: dict[str, str],
    folder: str | Path,
    *,
    replace: bool = False,
) -> Path:
    """Write a model as a diffusers pipeline with a stock scheduler; a LoRA is merged into its weights.

    A model that predicts depth becomes a `MarigoldDepthPipeline`, any other a pipeline of the base model's class.

    The folder also loads with transformers 4; see `save_pipeline_folder`.

    Args:
        model: base model with the trained UNet.
        objective: objective that it was trained on.
        config: options of the run.
        tags: entries of `tags_of`.
        folder: output folder, which must not exist; it appears whole or not at all.
        replace: whether an existing folder may be replaced, which stays until the new one is whole.

    Returns:
        The folder.

    Raises:
        CheckpointError: a weight of the UNet is not finite.
        RefusedInputError: `folder` exists and `replace` is False, it cannot be made, or the disk is full.
    """
    pipeline = model.pipeline
    check_finite_weights(model.unet)
    scheduler, unet = saved_scheduler(config, model, objective, tags), merged_unet(model.unet)
    set_start(unet, from_zeros=starts_from_zeros(tags))
    if predicts_depth(tags):
        longer_side = max(first_size(tags["d2f.resolution"]))
        of_task = tags["d2f.depth_normalization"], longer_side, recommended_steps(tags)
        saved = marigold_pipeline(pipeline, unet, scheduler, *of_task)
    else:
        # Stock pipelines generate at this size. Not all of them take one that is not a square.
        set_own_size(unet, first_size(tags["d2f.resolution"]), model.downsampling, squares_only=True)
        saved = type(pipeline)(**{**pipeline.components, "unet": unet, "scheduler": scheduler})
    with atomic_folder(folder, replace=replace) as temporary:
        save_pipeline_folder(saved, temporary)
        write_json(temporary / TAGS_FILE, tags)
    return Path(folder)


def check_finite_weights(unet: nn.Module) -> None:
    """Refuse to save a network that has diverged.

    Args:
        unet: trained network.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    for name, parameter in unet.named_parameters():
        if not parameter.detach().isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity and is not written: resume from an earlier checkpoint")


def saved_scheduler(
    config: TrainingConfig, model: BaseModel, objective: Objective, tags: Mapping[str, str]
) -> DPMSolverMultistepScheduler | EulerDiscreteScheduler | DDIMScheduler | Diff2FlowScheduler:
    """Return the scheduler that a saved pipeline gets: a stock one that samples the trained network, if there is one.

    Args:
        config: options of the run.
        model: base model of the run.
        objective: objective that the network was trained on.
        tags: entries of `tags_of`.
    """
    flow = objective.flow
    if uses_published_form(flow):
        # No stock scheduler feeds t itself. With this one the folder does not load without this package, where a stock
        # scheduler would give noise without an error.
        return Diff2FlowScheduler(
            prediction_type="flow_prediction", fm_form="published", shift=config.recommended_shift
        )
    if isinstance(flow, NaiveFlow):
        return stock_flow_scheduler(flow.num_train_timesteps, config.recommended_shift)
    if predicts_depth(tags):
        return depth_scheduler(model.pipeline.scheduler)
    return same_schedule(
        model.pipeline.scheduler, EulerDiscreteScheduler, timestep_spacing="trailing", final_sigmas_type="zero"
    )


def tags_of(
    config: TrainingConfig, objective: Objective, model: BaseModel, data_tags: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the entries of a file's header that describe the result and how to sample it.

    Args:
        config: options of the run.
        objective: objective that the network was trained on.
        model: base model, whose autoencoder is named where it is not the model's own.
        data_tags: entries about the data, which are added; see `pair_tags`. None for images.
    """
    flow, data_tags = objective.flow, dict(data_tags or {})
    sigmas = flow.sigmas(recommended_steps(data_tags), config.recommended_shift)
    tags = {
        "d2f.objective": objective.name,
        "d2f.resolution": size_text(config.resolution or model.resolution),
        "d2f.prediction_type": flow.prediction_type,
        "d2f.loss_weighting": objective.weighting,
        "d2f.training_shift": str(config.flow_shift),
        "d2f.shift": str(config.recommended_shift),
        "d2f.recommended_sigmas": ", ".join(f"{round(sigma, 4):g}" for sigma in sigmas),
    }
    if isinstance(flow, NaiveFlow):
        tags["d2f.fm_form"] = flow.form
    elif isinstance(flow, Alignment):
        tags["d2f.zero_snr"] = str(flow.schedule.zero_terminal_snr).lower()
    if config.lpips_weight:
        tags |= {"d2f.lpips_weight": f"{config.lpips_weight:g}", "d2f.lpips_net": config.lpips_net}
    if model.facts.vae_reflection_padding:
        tags["d2f.vae_reflection_padding"] = "true"
    return tags | autoencoder_tags(model.options) | data_tags
