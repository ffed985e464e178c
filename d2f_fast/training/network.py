"""Check that a base model can be trained, settle the options with it, and prepare its network for training."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from d2f_fast.config import DEFAULT_CAPTION_DROPOUT, DEFAULT_RANK, TrainingConfig
from d2f_fast.errors import ModelError
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.layers.half_base import HalfBase
from d2f_fast.lora.inject import adaptable_names, inject_lora
from d2f_fast.lora.start import inject_start, merge_text_layers, read_start
from d2f_fast.lora.targets import check_stated_layers
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import ModelConfigs, check_training
from d2f_fast.models.image_context import form_of
from d2f_fast.models.options import check_flow_schedule
from d2f_fast.training.adapter import stated_layers
from d2f_fast.training.launch import precision_of
from d2f_fast.training.method import check_starting_tags, settle_method

T = TypeVar("T")


def settle_options(config: TrainingConfig, model: BaseModel) -> TrainingConfig:
    """Return the options with what is settled where they are left open: resolution, dropout and objective.

    Args:
        config: options of a run.
        model: base model.

    Raises:
        RefusedInputError: the options do not fit the base model, or nothing says the resolution.
    """
    dropout = DEFAULT_CAPTION_DROPOUT if config.caption_dropout is None else config.caption_dropout
    resolution = config.resolution or model.resolution
    form = model.flow.form if isinstance(model.flow, NaiveFlow) else None
    return settle_method(dataclasses.replace(config, resolution=resolution, caption_dropout=dropout), form)


def check_trainable(model: BaseModel, config: TrainingConfig) -> None:
    """Refuse a base model that would fail in its first step.

    Args:
        model: base model.
        config: options of the run.

    Raises:
        ModelError: the UNet takes an input that text-to-image training does not give, or is float16.
        RefusedInputError: the autoencoder has no latents of the training resolution, nothing says what it is, or an
            option of the noise schedule is given for the objective "fm".
    """
    if config.objective == "fm":
        check_flow_schedule(model.options, "objective fm")
    check_training(ModelConfigs(model.unet.config, model.vae.config), config.resolution, model.context_images)
    if model.context_images and not form_of(model).first:
        raise ModelError(
            f"the network of {type(model.pipeline).__name__} takes the image behind its own latents, unscaled, and"
            " training puts it before them: give a text-to-image model, or a Marigold folder"
        )
    is_float16 = any(parameter.dtype == torch.float16 for parameter in model.unet.parameters())
    if is_float16 and not model.unet_as_stored:  # The run rounds stored weights itself.
        raise ModelError("the UNet is float16, whose gradients overflow: load it in bfloat16 or float32")


def holds_half_base(config: TrainingConfig) -> bool:
    """Return whether a run holds the frozen weights of its UNet in bfloat16."""
    return config.adapter == "lora" and precision_of(config) == "bf16"


def half_base_of(model: BaseModel, config: TrainingConfig) -> HalfBase | None:
    """Return the switch between the exact and the rounded weights of a base model's UNet, or None without one.

    Args:
        model: base model without an adapter; a UNet in the type of its file is rounded at once.
        config: options of the run.
    """
    if not holds_half_base(config) or not (model.unet_as_stored or model.unet.dtype == torch.float32):
        return None
    half_base = HalfBase(model.unet.requires_grad_(False), torch.bfloat16)
    if model.unet_as_stored:
        half_base.use()
    return half_base


def prepare_network(model: BaseModel, config: TrainingConfig) -> dict[str, nn.Parameter]:
    """Put the UNet of a base model into training mode, with an adapter or with all of its weights trainable.

    Args:
        model: base model on its device; its UNet is changed in place, and with `init_lora` its text encoders, too.
        config: options of the run.

    Returns:
        The trainable parameters by name.

    Raises:
        ModelError: no layer of the UNet has a name in `target_modules`, or `init_lora` cannot be used.
    """
    unet = model.unet
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(unet)
    unet.train()
    trainable: dict[str, nn.Parameter]
    if config.adapter == "full":
        unet.requires_grad_(True).float()
        trainable = dict(unet.named_parameters())
    elif config.init_lora is not None:
        trainable = _start_from_lora(model, config, config.init_lora)
        use_fused_lora(unet)
    else:
        trainable = inject_lora(
            unet,
            config.rank or DEFAULT_RANK,
            alpha=config.lora_alpha,
            conv_rank=config.conv_rank or 0,
            first_last_layers=bool(config.first_last_layers),
            target_modules=config.target_modules,
            seed=config.seed,
        )
        use_fused_lora(unet)
    if model.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # the format of cuDNN, which else converts at every layer
    return trainable


def _start_from_lora(model: BaseModel, config: TrainingConfig, entry: str) -> dict[str, nn.Parameter]:
    """Add LoRA layers that start with the effect of a file, and return their parameters by name."""
    start = read_start(entry, model.pipeline)
    check_stated_layers(start.path, start.ranks, adaptable_names(model.unet), **stated_layers(config))
    check_starting_tags(start.path, start.tags, config)
    merge_text_layers(model.pipeline, start)
    model.starting_lora = start
    return inject_start(model.unet, start, alpha=config.lora_alpha, seed=config.seed)


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Let a UNet or an autoencoder recompute its activations in the backward pass, without a change of a gradient.

    Args:
        network: model of diffusers that has a method `enable_gradient_checkpointing`.
    """
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
    # Without dropout the state of the random generators is not saved: a CUDA graph could not capture that.
    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    network.enable_gradient_checkpointing(function)  # type: ignore[operator]


@contextmanager
def inputs_in_float32(unet: nn.Module) -> Iterator[None]:
    """Cast all floating inputs of a network to float32 inside a `with` block.

    A full finetuning holds its UNet in float32, also where the rest of the pipeline is bfloat16.
    """

    def to_float32(value: T) -> T:
        mapped: T = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, value)
        return mapped

    def cast(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return to_float32(args), to_float32(kwargs)

    handle = unet.register_forward_pre_hook(cast, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
