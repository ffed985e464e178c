"""Load a model that predicts depth: a folder of `MarigoldDepthPipeline`, or a text-to-image model with a depth LoRA."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from d2f_fast.commands.depth_checks import depth_tags
from d2f_fast.commands.load_model import load_with_lora
from d2f_fast.errors import printable
from d2f_fast.image_sizes import first_size
from d2f_fast.lora.tags import starts_from_zeros
from d2f_fast.models.configs import check_one_text_encoder
from d2f_fast.models.marigold import depth_scheduler, marigold_pipeline, settle_start, text_encoders_of
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.save import stock_flow_scheduler
from d2f_fast.models.tags import saved_tags
from d2f_fast.sampling.options import complete_size
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.tasks.depth import DepthModel, DepthSampler


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
    loaded = load_with_lora(model, lora, options, None, context_images=1)
    pipeline, flow_options = loaded.pipeline, loaded.scheduler_options
    own, tags = saved_tags(loaded.source), depth_tags(loaded.source, lora)
    print(f"d2f: Model {printable(model)}: {loaded.facts}", file=sys.stderr)
    normalization: Any = tags.get("d2f.depth_normalization")
    if normalization is None:
        normalization = "disparity" if pipeline.config.get("prediction_type") == "disparity" else "affine"
    if type(pipeline).__name__ != "MarigoldDepthPipeline":
        check_one_text_encoder(text_encoders_of(pipeline))
        scheduler = _scheduler(pipeline.scheduler, flow_options)
        own_size = max(complete_size(None, None, pipeline.unet.config.sample_size, pipeline.vae_scale_factor))
        resolution = max(first_size(tags["d2f.resolution"])) if "d2f.resolution" in tags else own_size
        pipeline = marigold_pipeline(pipeline, pipeline.unet, scheduler, normalization, resolution)
    settle_start(pipeline, was_zeros=starts_from_zeros(own), from_zeros=starts_from_zeros(tags))
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return DepthModel(pipeline, normalization, flow_options).sampled_by(sampler)


def _scheduler(base: Any, flow_options: Mapping[str, Any]) -> Any:
    """Return the scheduler that the folder of a run has, for a base model with the LoRA of that run."""
    if flow_options.get("prediction_type") != "flow_prediction":
        return depth_scheduler(base)
    if flow_options.get("fm_form") == "published":
        return Diff2FlowScheduler(**flow_options)
    return stock_flow_scheduler(base.config.num_train_timesteps, flow_options.get("shift", 1.0))
