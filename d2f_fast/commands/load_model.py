"""Load a model with LoRA for sampling, and what their files say of the sampling. Torch is imported here."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from d2f_fast.config import Spacing
from d2f_fast.errors import RefusedInputError
from d2f_fast.lora.merge import MergedLora, fuse_adapter
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import common_tags
from d2f_fast.models.autoencoder import other_autoencoder
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.facts import ModelFacts
from d2f_fast.models.load import checked_source, load_model
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.reflection_padding import set_reflection_padding
from d2f_fast.models.tags import lowest_guidance, options_of_training, take_trained_size
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class SampledModel(NamedTuple):
    """A model with its LoRA merged.

    Attributes:
        pipeline: The pipeline, in float32 on the CPU.
        facts: What the model is taken for.
        scheduler_options: Prediction type, form and shift that replace those of the pipeline's scheduler, by the names
            of `Diff2FlowScheduler`: those given, else those of the tags.
        guidance_scale: Guidance scale that the tags recommend; None where they do not.
        source: Folder of a hub id on this machine, which holds its tags; any other name of a model as it was given.
        fingerprints: Hashes of the parts of the model before the LoRA was merged; see `BaseModel.fingerprints`.
        lora: Description of each LoRA.
    """

    pipeline: "DiffusionPipeline"
    facts: ModelFacts
    scheduler_options: dict[str, Any]
    guidance_scale: float | None
    source: str
    fingerprints: dict[str, str]
    lora: list[MergedLora]

    def flow_scheduler(self, flow_spacing: Spacing = "uniform") -> Diff2FlowScheduler:
        """Return the scheduler along the flow of the model, with the options of its files.

        Args:
            flow_spacing: Spacing of the steps.

        Raises:
            RefusedInputError: The configuration of the model's scheduler and the options cannot be used together.
        """
        config = self.pipeline.scheduler.config
        try:
            scheduler: Diff2FlowScheduler = Diff2FlowScheduler.from_config(
                config, flow_spacing=flow_spacing, **self.scheduler_options
            )
        except ValueError as error:
            raise RefusedInputError(str(error)) from error
        return scheduler


def load_with_lora(
    model: str,
    lora: Sequence[str],
    options: ModelOptions,
    shift: float | None,
    *,
    context_images: int = 0,
    from_image: bool = False,
) -> SampledModel:
    """Load a model, merge LoRA into it, and make the size that they were trained at its own.

    Args:
        model: Hub id, pipeline folder, or `.safetensors` file.
        lora: LoRA as PATH or PATH:SCALE.
        options: Options of the model.
        shift: Shift of the sampling; None takes that of the tags.
        context_images: Number of images whose latents the network sees; see `BaseModel.see_images`. 0 leaves the
            network as it is.
        from_image: Whether the flow starts from an image. Otherwise what was trained to do so is refused.

    Raises:
        RefusedInputError: The model or a LoRA cannot be used, or the tags of two LoRA contradict each other.
    """
    # Files that cannot be used are refused before the model is loaded, which takes longer.
    adapters = [(read_lora(path), scale) for path, scale in map(parse_lora, lora)]
    source = checked_source(model, lora, options, shift, from_image=from_image)
    of_training = options_of_training(source, lora, options, shift)
    guidance = lowest_guidance(source, [file.path for file, _ in adapters])
    if lora and (sentence := other_autoencoder(common_tags([file.path for file, _ in adapters], shift), options)):
        print(f"d2f: {sentence}", file=sys.stderr)
    pipeline, facts = load_model(model, options=options)
    base = BaseModel(pipeline, options, facts)
    fingerprints = base.fingerprints()
    if context_images:
        base.see_images(context_images)
    merged = [fuse_adapter(pipeline, adapter, scale) for adapter, scale in adapters]
    take_trained_size(pipeline, source, [file.path for file, _ in adapters])
    if of_training.pop("vae_reflection_padding", False):
        facts = dataclasses.replace(facts, vae_reflection_padding=set_reflection_padding(pipeline.vae, True))
    return SampledModel(pipeline, facts, of_training, guidance, source, fingerprints, merged)
