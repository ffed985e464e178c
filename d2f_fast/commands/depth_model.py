"""Load a model that predicts depth: a folder of `MarigoldDepthPipeline`, or a text-to-image model with a depth LoRA."""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, get_args

import torch

from d2f_fast.commands.load_model import load_with_lora
from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import common_tags
from d2f_fast.models.configs import read_configs
from d2f_fast.models.marigold import check_one_text_encoder, depth_scheduler, marigold_pipeline
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.save import stock_flow_scheduler
from d2f_fast.models.tags import saved_tags
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.tasks.depth import DepthModel, DepthSampler
from d2f_fast.training.summary import predicts_depth

_TRAIN = "train one with d2f train --task depth"


def check_depth_model(model: str, lora: Sequence[str], options: ModelOptions) -> None:
    """Refuse a model that its configuration shows to predict no depth.

    Args:
        model: Hub id, pipeline folder, or `.safetensors` file.
        lora: LoRA as PATH or PATH:SCALE.
        options: Options of the model.

    Raises:
        RefusedInputError: The model cannot be used.
    """
    configs = read_configs(model, options)
    if configs is None:
        return
    latents, channels = configs.vae.get("latent_channels", 4), configs.unet.get("in_channels", 4)
    if channels == latents and not lora:
        raise ModelError(
            f"{printable(model)} is a text-to-image model, which sees no image: give the folder pipeline of a run of"
            f" d2f train --task depth, or its LoRA with --lora; or {_TRAIN}"
        )
    if channels not in (latents, 2 * latents):
        raise ModelError(f"{printable(model)} takes {channels} channels, and depth needs {2 * latents}: {_TRAIN}")


def check_ensemble(ensemble_size: int) -> None:
    """Refuse several predictions where the library that aligns them is missing.

    Args:
        ensemble_size: Number of predictions of each image.

    Raises:
        RefusedInputError: SciPy is needed and not installed.
    """
    if ensemble_size > 1 and find_spec("scipy") is None:
        raise RefusedInputError(
            "ensemble_size needs SciPy, which is not installed: pip install scipy, which the extra [depth] of this"
            " package installs, too; or leave it out"
        )


def load_depth_model(model: str, lora: Sequence[str], options: ModelOptions, sampler: DepthSampler) -> DepthModel:
    """Load a model that predicts depth, onto the GPU where there is one.

    Args:
        model: Hub id or folder of a `MarigoldDepthPipeline`; or a text-to-image model, with LoRA of depth.
        lora: LoRA as PATH or PATH:SCALE, of runs on depth.
        options: Options of the model.
        sampler: How it is sampled.

    Raises:
        RefusedInputError: The model or a LoRA cannot be used, or was not trained on depth.
    """
    tags = _depth_tags(model, lora)
    loaded = load_with_lora(model, lora, options, None, context_images=1)
    pipeline, flow_options = loaded.pipeline, loaded.scheduler_options
    print(f"d2f: Model: {loaded.facts}", file=sys.stderr)
    normalization: Any = tags.get("d2f.depth_normalization")
    if normalization is None:
        normalization = "disparity" if pipeline.config.get("prediction_type") == "disparity" else "affine"
    if normalization not in get_args(DepthNormalization):
        raise ModelError(f"{printable(model)}: the normalisation {printable(str(normalization))} is unknown: {_TRAIN}")
    if type(pipeline).__name__ != "MarigoldDepthPipeline":
        check_one_text_encoder(pipeline)
        scheduler = _scheduler(pipeline.scheduler, flow_options)
        resolution = int(tags.get("d2f.resolution") or pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
        pipeline = marigold_pipeline(pipeline, pipeline.unet, scheduler, normalization, resolution)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return DepthModel(pipeline, normalization, flow_options).sampled_by(sampler)


def _depth_tags(model: str, lora: Sequence[str]) -> dict[str, str]:
    """Return the tags of the LoRA, or else of the model; none for a folder of another program.

    Raises:
        ModelError: The LoRA, or the model, was trained on something else.
    """
    tags = common_tags([parse_lora(entry).path for entry in lora]) if lora else saved_tags(model)
    if (lora or tags) and not predicts_depth(tags):
        source = ", ".join(lora) or model
        raise ModelError(f"{printable(source)} was not trained on depth: give what d2f train --task depth made")
    return tags


def _scheduler(base: Any, flow_options: Mapping[str, Any]) -> Any:
    """Return the scheduler that the folder of a run has, for a base model with the LoRA of that run."""
    if flow_options.get("prediction_type") != "flow_prediction":
        return depth_scheduler(base)
    if flow_options.get("fm_form") == "published":
        return Diff2FlowScheduler(**flow_options)
    return stock_flow_scheduler(base.config.num_train_timesteps, flow_options.get("shift", 1.0))
