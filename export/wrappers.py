"""Wrap the parts of a pipeline as modules with flat tensors in and out, named and shaped as in optimum's ONNX folders.

Every graph takes and returns float32, and int64 token ids, whatever the type of its weights. A half-precision module
casts its inputs itself and never rounds the timestep: float16 would turn 673.16 into 673, bfloat16 into 672.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from d2f_fast.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from diffusers.configuration_utils import FrozenDict
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Dim: TypeAlias = int | str
TextModel: TypeAlias = "CLIPTextModel | CLIPTextModelWithProjection"
Vae: TypeAlias = "AutoencoderKL | AutoencoderTiny"

# Options of a UNet's configuration that may ask for another input: the values that do not, and the name of the input.
_OTHER_INPUTS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "time_cond_proj_dim": ((None,), "the guidance scale (LCM)"),
    "class_embed_type": ((None,), "class labels"),
    "num_class_embeds": ((None,), "class labels"),
    "encoder_hid_dim_type": ((None,), "another text or an image"),
    "addition_embed_type": ((None, "text_time"), "an embedding beside the time's other than SDXL's"),
}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Args:
        name: name that optimum expects.
        dims: size of each dimension; a name stands for a size that is chosen at run time. An output may have an
            expression of an input's name, such as "latent_height * 8".
        make: function from a shape to a random value; None for outputs.
    """

    name: str
    dims: tuple[Dim, ...]
    make: Callable[[Sequence[int], torch.Generator], Tensor] | None = None


@dataclass
class Component:
    """A module that becomes one graph of the folder.

    Args:
        name: name of the graph's folder.
        module: module that takes the inputs and returns the outputs, in order.
        inputs: ports of the inputs.
        outputs: ports of the outputs.
        config: configuration of the wrapped model, which is written beside the graph.
        multiples: step of the sizes of a named dimension; 1 where it is not listed.
        limits: largest size of a named dimension; none where it is not listed.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    config: "FrozenDict | CLIPTextConfig"
    multiples: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def make_inputs(self, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
        """Return random inputs by name.

        Args:
            sizes: size of every named dimension.
            seed: seed of the values.
        """
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for port in self.inputs:
            assert port.make is not None
            made[port.name] = port.make([sizes[d] if isinstance(d, str) else d for d in port.dims], generator)
        return made


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _timestep(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a fractional timestep in [0, 999); `shape` is empty."""
    return torch.rand((), generator=generator) * 999


def _pixels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator) * 2 - 1


def _time_ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return (torch.rand(*shape, generator=generator) * 1024).round()


class UNet(nn.Module):
    """A conditional UNet with a scalar timestep and, for SDXL, with text_embeds and time_ids."""

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output as float32.

        Args:
            sample: diffusion state, [B, C, H, W] float32.
            timestep: fractional diffusion timestep, [] float32.
            encoder_hidden_states: text condition, [B, L, D] float32.
            text_embeds: pooled text of SDXL, [B, P] float32; None for other models.
            time_ids: image sizes and crop of SDXL, [B, 6] float32 in pixels; None for other models.
        """
        dtype = self.unet.dtype
        extra = {}
        if text_embeds is not None:
            assert time_ids is not None
            # They stay float32, because diffusers casts them after joining pooled text and embedded sizes. Casting them
            # here gave the two different types in the graph.
            extra["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            return_dict=False,
            **extra,
        )[0]
        return output.float()


class TextEncoder(nn.Module):
    """A CLIP text encoder with optimum's outputs.

    Args:
        text_encoder: model to wrap.
        projects: Whether the model projects the pooled text, as SDXL's second one does.
    """

    def __init__(self, text_encoder: TextModel, projects: bool) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.projects = projects

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for token ids [B, L] int64, in float32.

        They are (text_embeds, last_hidden_state, hidden_states.i …) where the model projects, and (last_hidden_state,
        pooler_output, hidden_states.i …) elsewhere.
        """
        out = self.text_encoder(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        if self.projects:
            first = (out.text_embeds, out.last_hidden_state)
        else:
            first = (out.last_hidden_state, out.pooler_output)
        return tuple(tensor.float() for tensor in (*first, *out.hidden_states))


class VAEEncoder(nn.Module):
    """The encoder of an autoencoder: from pixels in [-1, 1] to unscaled latents."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        """Return the mean and log variance of the latents, [B, 2 C, H / f, W / f] float32.

        An AutoencoderTiny has no variance: it returns the latents, [B, C, H / f, W / f].

        Args:
            sample: pixels in [-1, 1], [B, 3, H, W] float32.
        """
        encoded = self.vae.encode(sample.to(self.vae.dtype), return_dict=False)[0]
        return (encoded if isinstance(encoded, Tensor) else encoded.parameters).float()


class VAEDecoder(nn.Module):
    """The decoder of an autoencoder: from unscaled latents to pixels in about [-1, 1]."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Return pixels, [B, 3, f H, f W] float32.

        Args:
            latent_sample: unscaled latents, [B, C, H, W] float32.
        """
        decoded: Tensor = self.vae.decode(latent_sample.to(self.vae.dtype), return_dict=False)[0]
        return decoded.float()


def unet_component(unet: "UNet2DConditionModel") -> Component:
    """Return the component of one network evaluation.

    Raises:
        ModelError: the network takes an input that the exported graphs and samplers do not have.
    """
    config = unet.config
    for option, (allowed, taken) in _OTHER_INPUTS.items():
        if config.get(option) not in allowed:
            raise ModelError(
                f"unet/config.json: with {option} {config[option]!r} the network takes {taken}, which no exported graph"
                " takes: leave unet and sampler out of components"
            )
    if not isinstance(config.cross_attention_dim, int):
        raise ModelError(
            f"unet/config.json: with cross_attention_dim {list(config.cross_attention_dim)} the network takes texts of"
            " several widths, which no exported graph takes: leave unet and sampler out of components"
        )
    inputs = [
        Port("sample", ("batch", config.in_channels, "height", "width"), _normal),
        Port("timestep", (), _timestep),
        Port("encoder_hidden_states", ("batch", "sequence", config.cross_attention_dim), _normal),
    ]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs += [Port("text_embeds", ("batch", pooled), _normal), Port("time_ids", ("batch", 6), _time_ids)]
    step = 2 ** (len(config.block_out_channels) - 1)
    return Component(
        name="unet",
        module=UNet(unet).eval(),
        inputs=tuple(inputs),
        outputs=(Port("out_sample", ("batch", config.out_channels, "height", "width")),),
        config=config,
        multiples={"height": step, "width": step},
        # At a batch of 64 diffusers takes another branch, for a memory layout that has no effect in a graph.
        limits={"batch": 63},
    )


def text_encoder_component(text_encoder: TextModel, name: str) -> Component:
    """Return the component of a text encoder, and set its attention to the eager form.

    The fused form of attention would leave guards against NaN in the graph.

    Args:
        text_encoder: model to wrap.
        name: "text_encoder" or "text_encoder_2".
    """
    text_encoder.set_attn_implementation("eager")
    config = text_encoder.config
    projects = type(text_encoder).__name__.endswith("WithProjection")

    def token_ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return prompts of growing length, ended and padded by the end-of-text token."""
        batch, length = shape
        end = config.eos_token_id if 0 <= config.eos_token_id < config.vocab_size else config.vocab_size - 1
        end = config.vocab_size - 1 if end == 2 else end  # old configurations of CLIP say 2 for their last token
        ids = torch.randint(0, config.vocab_size - 2, (batch, length), generator=generator)
        for row in range(batch):
            ids[row, max(1, (row + 1) * length // (batch + 1)) :] = end
        return ids

    states = ("batch", "sequence", config.hidden_size)
    if projects:
        outputs = [Port("text_embeds", ("batch", config.projection_dim)), Port("last_hidden_state", states)]
    else:
        outputs = [Port("last_hidden_state", states), Port("pooler_output", ("batch", config.hidden_size))]
    outputs += [Port(f"hidden_states.{i}", states) for i in range(config.num_hidden_layers + 1)]
    return Component(
        name=name,
        module=TextEncoder(text_encoder, projects).eval(),
        inputs=(Port("input_ids", ("batch", "sequence"), token_ids),),
        outputs=tuple(outputs),
        config=config,
        limits={"sequence": config.max_position_embeddings},
    )


def vae_components(vae: Vae) -> list[Component]:
    """Return the components of an autoencoder's encoder and decoder."""
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    is_tiny = type(vae).__name__ == "AutoencoderTiny"
    name, channels = ("latent_sample", 1) if is_tiny else ("latent_parameters", 2)
    # optimum computes the sizes of its output buffers on a GPU from these expressions.
    encoded, decoded = ("height / {}", "latent_height * {}") if factor > 1 else ("height", "latent_height")
    latent_sides = [encoded.format(factor), encoded.replace("height", "width").format(factor)]
    sides = [decoded.format(factor), decoded.replace("height", "width").format(factor)]
    encoder = Component(
        name="vae_encoder",
        module=VAEEncoder(vae).eval(),
        inputs=(Port("sample", ("batch", config.in_channels, "height", "width"), _pixels),),
        outputs=(Port(name, ("batch", channels * config.latent_channels, *latent_sides)),),
        config=config,
        multiples={"height": factor, "width": factor},
    )
    decoder = Component(
        name="vae_decoder",
        module=VAEDecoder(vae).eval(),
        inputs=(Port("latent_sample", ("batch", config.latent_channels, "latent_height", "latent_width"), _normal),),
        outputs=(Port("sample", ("batch", config.out_channels, *sides)),),
        config=config,
        limits={"batch": 63},
    )
    return [encoder, decoder]


def example_sizes(component: Component) -> dict[str, int]:
    """Return sizes to trace with, each at least 2, because the tracer takes smaller ones for constants."""
    names = {d for port in component.inputs for d in port.dims if isinstance(d, str)}
    base = {"batch": 2, "sequence": 7}
    sizes = {}
    for name in sorted(names):
        step = component.multiples.get(name, 1)
        least = base.get(name, 6 if "width" in name else 4)
        size = step * max(2, math.ceil(least / step))
        sizes[name] = min(size, component.limits.get(name, size))
    return sizes


def check_sizes(component: Component) -> list[dict[str, int]]:
    """Return three sets of sizes to verify at, none of which was traced.

    They are one wide image, three tall ones, and two tall ones with a prompt of two chunks.
    """
    names = {d for port in component.inputs for d in port.dims if isinstance(d, str)}
    sides = [(1, 2), (3, 1), (2, 1)]  # (height, width) in units
    found = []
    for i, (height, width) in enumerate(sides):
        sizes = {"batch": (1, 3, 2)[i], "sequence": (77, 77, 154)[i]}
        for name in ("height", "width", "latent_height", "latent_width"):
            step = component.multiples.get(name, 1)
            # A decoder makes many pixels of each latent: half the side costs a quarter of the time.
            unit = step * math.ceil((4 if name.startswith("latent") else 8) / step)
            sizes[name] = unit * (height if "height" in name else width)
        limits = component.limits
        found.append({name: min(size, limits.get(name, size)) for name, size in sizes.items() if name in names})
    return found
