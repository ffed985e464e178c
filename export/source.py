"""Load the model that is exported, say how it is sampled, and refuse what has no place in the folder's layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.export.sampler_graph import Guidance
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow, uses_published_form
from d2f_fast.lora.tags import check_tags, common_tags, starts_from_zeros, tags_with_lora
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.image_context import form_of
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import lowest_guidance, recommended_steps, saved_tags
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Sampling(NamedTuple):
    """How a network is sampled.

    Attributes:
        flow: flow that reads its output.
        shift: factor on (1 - t) / t at each step.
        guidance_scale: guidance that its files recommend; None for no recommendation.
        steps: number of sampling steps that they recommend; None for no recommendation.
        vae_reflection_padding: whether the files of its training ask for an autoencoder that pads by reflection.
        starts_from_zeros: whether it was trained to jump from zeros, in place of noise, to its result in one step.
        base_starts_from_zeros: whether the model was, without the LoRA that were merged into it.
    """

    flow: Flow
    shift: float
    guidance_scale: float | None
    steps: int | None
    vae_reflection_padding: bool
    starts_from_zeros: bool
    base_starts_from_zeros: bool


def sampling_of(model: BaseModel, source: str, adapters: Sequence[Path] = (), shift: float | None = None) -> Sampling:
    """Return how a model is sampled: as the files of its training say, or else as its scheduler's configuration does.

    Args:
        model: model that is exported.
        source: folder or file that it was loaded from, or "miniature"; a folder of this package has tags in d2f.json.
        adapters: LoRA files or folders that were merged into it; where there are any, their tags replace the folder's.
        shift: factor on (1 - t) / t at each step; None takes the saved one, or else that of the scheduler, or else 1.

    Raises:
        ModelError: the tags cannot be used, or the network is of the published form of naive flow matching.
    """
    of_model = saved_tags(source)
    tags = common_tags(adapters, shift) if adapters else of_model
    check_tags(source, tags, shift)
    flow, own = model.flow, Diff2FlowScheduler.from_config(model.pipeline.scheduler.config)
    try:
        if tags.get("d2f.prediction_type") == "flow_prediction" and not isinstance(flow, NaiveFlow):
            is_published = tags.get("d2f.fm_form") == "published"
            flow = NaiveFlow(flow.num_train_timesteps, "published" if is_published else "diffusers")
        if shift is None:
            shift = float(tags.get("d2f.shift", own.config["shift"]))
        flow.times(1, shift=shift)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{source}: its shift cannot be used ({error}): give --shift") from error
    if uses_published_form(flow):
        raise ModelError(
            f"{source}: the network is fed the flow time itself (fm_form published), which no stock sampler of the"
            " exported folder does: sample it with d2f sample"
        )
    guidance, steps = lowest_guidance(source, adapters), recommended_steps(source, adapters)
    was_zeros, from_zeros = starts_from_zeros(of_model), starts_from_zeros(tags_with_lora(of_model, tags))
    reflects = tags.get("d2f.vae_reflection_padding") == "true"
    return Sampling(flow, shift, guidance, 1 if from_zeros else steps, reflects, from_zeros, was_zeros)


def load_model(model: str, options: ModelOptions | None = None) -> BaseModel:
    """Load a model in float32.

    Args:
        model: hub id, pipeline folder, .safetensors file, or "miniature" for the embedded model.
        options: options of the base model; None for the defaults.

    Raises:
        ModelError: the model or the autoencoder cannot be loaded or does not fit.
    """
    loaded = BaseModel.load(model, options=options)
    for name in ("vae", "tokenizer", "text_encoder"):
        if getattr(loaded.pipeline, name, None) is None:
            raise ModelError(f"{model} has no {name}: give a complete Stable Diffusion pipeline")
    vae = loaded.options.pretrained_vae_model_name_or_path
    if getattr(loaded.vae.config, "latents_mean", None) is not None:
        raise ModelError(
            f"{vae or model}: its autoencoder shifts latents by latents_mean, which no exported graph does; give --vae"
            " an autoencoder without it"
        )
    return loaded


def is_marigold(pipeline: "DiffusionPipeline") -> bool:
    """Return whether a pipeline is one of Marigold's, whose text is always the empty prompt without padding."""
    return type(pipeline).__name__.startswith("Marigold")


def text_length(pipeline: "DiffusionPipeline") -> int:
    """Return the number of tokens of a text that the network of a pipeline sees."""
    tokenizer = pipeline.tokenizer
    return len(tokenizer("").input_ids) if is_marigold(pipeline) else int(tokenizer.model_max_length)


def guidance_of(model: BaseModel, text: bool, image: bool) -> Guidance:
    """Return the guidance that is built into the sampler of a model: none for Marigold's, which has no prompt.

    Args:
        model: model that is exported.
        text: whether guidance by text was asked for.
        image: whether guidance by image was asked for.

    Raises:
        RefusedInputError: the model cannot be guided by an image.
    """
    prompted = not is_marigold(model.pipeline)
    if image and not (model.context_images and prompted):
        raise RefusedInputError(
            "image_guidance needs a model that sees an image and a prompt, such as InstructPix2Pix: leave it out"
        )
    return Guidance(text and prompted, image, form_of(model).first)
