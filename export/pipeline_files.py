"""Write the files of a diffusers pipeline that lie beside the graphs: configurations, scheduler, tokenizers, index."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from d2f_fast.export.source import is_marigold
from d2f_fast.export.wrappers import Component
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.save import save_tokenizer, stock_flow_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

# Stock samplers of the exported folder step through the trained times, down to no noise, whatever the model's own
# scheduler was set to.
_STOCK_STEPS = {
    "timestep_spacing": "trailing",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
}
_NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")


def write_pipeline_files(folder: Path, pipeline: "DiffusionPipeline", flow: Flow, shift: float) -> None:
    """Write model_index.json, scheduler/ and the tokenizers, which optimum and diffusers load beside the graphs.

    Args:
        folder: export folder, which exists.
        pipeline: pipeline that is exported.
        flow: flow that reads the network's output as a velocity.
        shift: factor on (1 - t) / t at each step, which the scheduler of a `NaiveFlow` takes.
    """
    scheduler = _stock_scheduler(pipeline, flow, shift)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder / name)  # optimum uses transformers before 5
    index = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    for name, value in pipeline.config.items():
        if not name.startswith("_"):
            index[name] = [None, None] if name in _NOT_EXPORTED else value
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, default=list) + "\n", encoding="utf-8")


def _stock_scheduler(pipeline: "DiffusionPipeline", flow: Flow, shift: float) -> "SchedulerMixin":
    """Return the scheduler of diffusers that samples the exported network."""
    if isinstance(flow, NaiveFlow):
        return stock_flow_scheduler(flow.num_train_timesteps, shift)
    config = {**pipeline.scheduler.config, **_STOCK_STEPS}
    config.pop("_use_default_values", None)
    # Marigold's pipelines never scale the network's input, which the states of Euler's scheduler need.
    return (DDIMScheduler if is_marigold(pipeline) else EulerDiscreteScheduler).from_config(config)


def write_component_config(folder: Path, component: Component) -> None:
    """Write the configuration of a component's model as config.json.

    Args:
        folder: folder of the component, which exists.
        component: component whose model has the configuration.
    """
    if hasattr(component.config, "save_pretrained"):  # transformers' configurations save themselves
        component.config.save_pretrained(folder)
        return
    config = {key: value for key, value in component.config.items() if key != "_use_default_values"}
    config["_diffusers_version"] = diffusers.__version__
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
