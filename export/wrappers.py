"""The parts of a pipeline as modules with flat tensors in and out, named and shaped as in optimum's ONNX folders.

Every graph takes and gives float32 (token ids: int64), whatever its weights are in: a half-precision module casts at
its own door, and the timestep is never rounded (float16 would make 673.16 into 673, bfloat16 into 672).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2f_fast.errors import ModelError

Dim = int | str

# Options of a UNet's configuration by which it takes another input: those that it does not, and the input.
_OTHER_INPUTS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "time_cond_proj_dim": ((None,), "the guidance scale (LCM)"),
    "class_embed_type": ((None,), "class labels"),
    "num_class_embeds": ((None,), "class labels"),
    "encoder_hid_dim_type": ((None,), "another text or a picture"),
    "addition_embed_type": ((None, "text_time"), "an embedding beside the time's other than SDXL's"),
}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Args:
        name: as optimum expects it.
        dims: sizes; a name for one that is chosen at run time.
        make: a random value of such a shape; None for outputs.
    """

    name: str
    dims: tuple[Dim, ...]
    make: Callable[[Sequence[int], torch.Generator], Tensor] | None = None


@dataclass
class Component:
    """One graph of the folder.

    Args:
        name: of its folder.
        module: takes the inputs and gives the outputs, in order.
        inputs, outputs: ports.
        multiples: size step of a named dimension, 1 where it is not listed.
        limits: largest size of a named dimension.
        config: of the model it belongs to; written beside the graph.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    config: Any
    multiples: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def make_inputs(self, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
        """Random inputs of the given sizes, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for port in self.inputs:
            assert port.make is not None
            made[port.name] = port.make([sizes[d] if isinstance(d, str) else d for d in port.dims], generator)
        return made


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _timestep(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A fractional time."""
    return torch.rand((), generator=generator) * 999


def _pixels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator) * 2 - 1


def _time_ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return (torch.rand(*shape, generator=generator) * 1024).round()


class UNet(nn.Module):
    """A conditional UNet: (sample, timestep [], encoder_hidden_states, then SDXL's text_embeds, time_ids) -> output."""

    def __init__(self, unet: Any) -> None:
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
        """Model output, float32, in the shape of the sample."""
        dtype = self.unet.dtype
        extra = {}
        if text_embeds is not None:
            assert time_ids is not None
            # In float32: diffusers casts them itself, after it has joined the pooled text and the embedded sizes. Cast
            # here, the two came to be of different types in the graph.
            extra["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
        output = self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            return_dict=False,
            **extra,
        )[0]
        return output.float()


class TextEncoder(nn.Module):
    """A CLIP text encoder: input_ids -> optimum's outputs, pooled or projected first where the model projects."""

    def __init__(self, text_encoder: Any, projects: bool) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.projects = projects

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """(text_embeds, last_hidden_state, hidden_states.i) or (last_hidden_state, pooler_output, hidden_states.i)."""
        out = self.text_encoder(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        if self.projects:
            first = (out.text_embeds, out.last_hidden_state)
        else:
            first = (out.last_hidden_state, out.pooler_output)
        return tuple(tensor.float() for tensor in (*first, *out.hidden_states))


class VAEEncoder(nn.Module):
    """Pixels in [-1, 1] -> mean and log variance of the unscaled latents, concatenated; a tiny one gives latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        """latent_parameters [B, 2 C, H / f, W / f], or latent_sample [B, C, H / f, W / f]."""
        encoded = self.vae.encode(sample.to(self.vae.dtype), return_dict=False)[0]
        return (encoded if isinstance(encoded, Tensor) else encoded.parameters).float()


class VAEDecoder(nn.Module):
    """Unscaled latents -> pixels in about [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """sample [B, 3, f H, f W]."""
        return self.vae.decode(latent_sample.to(self.vae.dtype), return_dict=False)[0].float()


def unet_component(unet: Any) -> Component:
    """The network: one evaluation, with a scalar float32 timestep.

    Raises:
        ModelError: it takes an input that this folder's layout and samplers have not, or would be run without it.
    """
    config = unet.config
    for option, (allowed, taken) in _OTHER_INPUTS.items():
        if config.get(option) not in allowed:
            raise ModelError(
                f"unet/config.json: with {option} {config[option]!r} the network takes {taken}, which no exported graph"
                " does: leave unet and sampler out of components"
            )
    if not isinstance(config.cross_attention_dim, int):
        raise ModelError(
            f"unet/config.json: with cross_attention_dim {list(config.cross_attention_dim)} the network takes texts of"
            " several widths, which no exported graph does: leave unet and sampler out of components"
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
        # diffusers branches at a batch of 64 (a memory layout, without effect in a graph).
        limits={"batch": 63},
    )


def text_encoder_component(text_encoder: Any, name: str) -> Component:
    """A text encoder, with attention written out: the fused form leaves guards against NaN in the graph."""
    text_encoder.set_attn_implementation("eager")
    config = text_encoder.config
    projects = type(text_encoder).__name__.endswith("WithProjection")

    def token_ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Prompts of growing length, ended and padded by the end-of-text token."""
        batch, length = shape
        end = config.eos_token_id if 0 <= config.eos_token_id < config.vocab_size else config.vocab_size - 1
        end = config.vocab_size - 1 if end == 2 else end  # CLIP's old configurations say 2; its vocabulary ends with it
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


def vae_components(vae: Any) -> list[Component]:
    """The encoder and the decoder of the autoencoder."""
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    is_tiny = type(vae).__name__ == "AutoencoderTiny"
    name, channels = ("latent_sample", 1) if is_tiny else ("latent_parameters", 2)
    encoder = Component(
        name="vae_encoder",
        module=VAEEncoder(vae).eval(),
        inputs=(Port("sample", ("batch", config.in_channels, "height", "width"), _pixels),),
        outputs=(Port(name, ("batch", channels * config.latent_channels, "latent_height", "latent_width")),),
        config=config,
        multiples={"height": factor, "width": factor},
    )
    decoder = Component(
        name="vae_decoder",
        module=VAEDecoder(vae).eval(),
        inputs=(Port("latent_sample", ("batch", config.latent_channels, "latent_height", "latent_width"), _normal),),
        outputs=(Port("sample", ("batch", config.out_channels, "height", "width")),),
        config=config,
        limits={"batch": 63},
    )
    return [encoder, decoder]


def example_sizes(component: Component) -> dict[str, int]:
    """Sizes to trace with: every one at least 2, or the tracer would take it for a constant."""
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
    """Sizes to verify at: one picture, a tall and a wide one, a prompt of two chunks; none is the example's."""
    names = {d for port in component.inputs for d in port.dims if isinstance(d, str)}
    sides = [(1, 2), (3, 1), (2, 1)]  # (height, width) in units
    found = []
    for i, (height, width) in enumerate(sides):
        sizes = {"batch": (1, 3, 2)[i], "sequence": (77, 77, 154)[i]}
        for name in ("height", "width", "latent_height", "latent_width"):
            step = component.multiples.get(name, 1)
            # A decoder makes 64 pixels of a latent: with half the side it costs a quarter.
            unit = step * math.ceil((4 if name.startswith("latent") else 8) / step)
            sizes[name] = unit * (height if "height" in name else width)
        limits = component.limits
        found.append({name: min(size, limits.get(name, size)) for name, size in sizes.items() if name in names})
    return found
