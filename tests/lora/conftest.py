"""Networks that take an adapter, their output for a fixed input, and LoRA files of every form with their effect."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn


@pytest.fixture(scope="session")
def make_family_unet(narrow_unets: dict[str, dict[str, Any]]) -> Callable[..., UNet2DConditionModel]:
    """Return the function `make(family, **changes)`: a narrow UNet with the blocks of SD1.5, SD2.1 or SDXL."""

    def make(family: str, **changes: Any) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(**narrow_unets[family] | changes).eval()

    return make


@pytest.fixture(scope="session")
def family_unet(make_family_unet: Any) -> Callable[[str], UNet2DConditionModel]:
    """Return the function `family_unet(family)`: one UNet of each family, which no test may change."""
    return functools.cache(make_family_unet)


@pytest.fixture
def unet(tiny_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()


@pytest.fixture
def forward() -> Callable[[Any], Tensor]:
    """Return the output of a UNet for a fixed input."""

    @torch.no_grad()
    def output(unet: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
        timesteps = torch.tensor([673.16, 20.0])
        dtype = unet.conv_in.weight.dtype
        return unet.eval()(sample.to(dtype), timesteps, text.to(dtype)).sample

    return output


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module], None]:
    """Make every layer's B as random as its A, as training does."""

    @torch.no_grad()
    def fill(unet: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    return fill


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """Return the norm of a difference, relative to the norm of the truth."""
    return lambda difference, truth: (difference.norm() / truth.norm()).item()


# Layers of the tiny UNet, and the names that Stability's code has for them.
_ORIGINAL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": "input_blocks.1.1.transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "middle_block.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "conv_out": "out.2",
}
_ATTENTION = tuple(name for name in _ORIGINAL_NAMES if ".to_" in name)
_KOHYA_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_PEFT_PARTS = ("lora_A.weight", "lora_B.weight", None)
_OLD_PARTS = ("lora.down.weight", "lora.up.weight", None)
# For each form: the layers it has names for, the name of a layer, and the names of A, B and alpha.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[[str], str], tuple[str, str, str | None]]] = {
    "peft": (tuple(_ORIGINAL_NAMES), lambda name: f"unet.{name}", _PEFT_PARTS),
    "unprefixed": (tuple(_ORIGINAL_NAMES), lambda name: name, _PEFT_PARTS),
    "base_model": (tuple(_ORIGINAL_NAMES), lambda name: f"base_model.model.{name}", _PEFT_PARTS),
    "diffusers": (tuple(_ORIGINAL_NAMES), lambda name: f"unet.{name}", _OLD_PARTS),
    "processors": (
        _ATTENTION,
        lambda name: f"unet.{name.removesuffix('.0').replace('.to_', '.processor.to_')}_lora",
        ("down.weight", "up.weight", None),
    ),
    "kohya": (tuple(_ORIGINAL_NAMES), lambda name: f"lora_unet_{name.replace('.', '_')}", _KOHYA_PARTS),
    "kohya sgm": (
        tuple(_ORIGINAL_NAMES),
        lambda name: f"lora_unet_{_ORIGINAL_NAMES[name].replace('.', '_')}",
        _KOHYA_PARTS,
    ),
    "lycoris": (tuple(_ORIGINAL_NAMES), lambda name: f"lycoris_{name.replace('.', '_')}", _KOHYA_PARTS),
    "diffusion_model": (tuple(_ORIGINAL_NAMES), lambda name: f"diffusion_model.{_ORIGINAL_NAMES[name]}", _PEFT_PARTS),
}
_TARGETS = r".*(attn1\.to_q|attn2\.to_out\.0|resnets\.0\.conv1|mid_block\.attentions\.0\.proj_in)"
_PEFT_CONFIGS = {
    "lora": LoraConfig(
        r=4, lora_alpha=6, target_modules=_TARGETS, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3}
    ),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=_TARGETS, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=_TARGETS, use_dora=True),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=_TARGETS),
    "loha with cores": LoHaConfig(r=2, alpha=3, target_modules=_TARGETS, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=_TARGETS),
    "lokr in whole factors": LoKrConfig(r=32, alpha=8, target_modules=_TARGETS, decompose_factor=4),
    "lokr in four": LoKrConfig(r=1, alpha=3, target_modules=_TARGETS, decompose_both=True, use_effective_conv2d=True),
}


@pytest.fixture
def write_form() -> Callable[[str, nn.Module, Path], tuple[Path, dict[str, Tensor]]]:
    """Return the function `write_form(form, unet, folder)`, which writes a random LoRA for the tiny UNet in a form.

    It returns the path of the LoRA and its effect on each weight at a scale of 1, in float64, by the weight's key.
    """

    def write(form: str, unet: nn.Module, folder: Path) -> tuple[Path, dict[str, Tensor]]:
        if form in _PEFT_CONFIGS:
            return folder, _saved_by_peft(unet, folder, _PEFT_CONFIGS[form])
        layers, name_of, (down, up, alpha) = _FORMS[form]
        tensors, deltas = {}, {}
        for i, layer in enumerate(layers):
            weight, rank = unet.get_submodule(layer).weight, 2 + i % 2
            a, b = (
                torch.randn(rank, *weight.shape[1:]),
                torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:])),
            )
            tensors |= {f"{name_of(layer)}.{down}": a, f"{name_of(layer)}.{up}": b}
            scale = 1.0
            if alpha is not None:
                tensors[f"{name_of(layer)}.{alpha}"] = torch.tensor(rank * 1.5)
                scale = 1.5
            deltas[f"{layer}.weight"] = scale * b.double().flatten(1) @ a.double().flatten(1)
        save_file(tensors, folder / "x.safetensors")
        return folder / "x.safetensors", deltas

    return write


def _saved_by_peft(unet: Any, folder: Path, config: Any) -> dict[str, Tensor]:
    """Save a random adapter as peft does, and return the effect on each weight by peft's own merge."""
    # Merged in float64, so that rounding the sums does not hide the effect.
    model = get_peft_model(copy.deepcopy(unet), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.5
    model.save_pretrained(folder)
    before = {key: value.double() for key, value in unet.state_dict().items()}
    after = model.double().merge_and_unload().state_dict()
    return {key: delta for key, value in after.items() if (delta := value - before[key]).abs().max() > 0}
