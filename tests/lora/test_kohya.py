"""Kohya files against the key rules of the programs that read them, on the real block structure of three families.

The rules of each program are restated here from its behaviour. How many layers each of them found in files with peft's
keys was measured in the programs themselves, and the restated rules must find as many.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from d2f_fast.lora.family import family_of
from d2f_fast.lora.key_names import sgm_name
from d2f_fast.lora.kohya import kohya_header, kohya_layer_names, kohya_state_dict
from d2f_fast.lora.targets import CONVOLUTION_TARGETS, FIRST_LAYER, LAST_LAYER, LINEAR_TARGETS

ATTENTION = tuple(target for target in LINEAR_TARGETS if target.startswith("to_"))
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "feed-forward": LINEAR_TARGETS,
    "convolutions": (*LINEAR_TARGETS, *CONVOLUTION_TARGETS),
    "first and last": (*LINEAR_TARGETS, *CONVOLUTION_TARGETS, FIRST_LAYER, LAST_LAYER),
}
FAMILIES = ("sd1", "sd2", "sdxl")
# What a program makes of a file: the layer, by its name in diffusers, that each key is applied to.
Lookup = Callable[[str], str | None]


def layers_of(unet: nn.Module, targets: str) -> list[str]:
    """Return the names of the layers that training adapts for a choice of targets."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(f".{name}".endswith(f".{target}") for target in TARGETS[targets])
    ]


def adapter_of(layers: Iterable[str], kernel_rank: int = 3) -> dict[str, torch.Tensor]:
    """Return an adapter of ones with peft's keys: rank 2 everywhere but in convolutions of 3 x 3."""
    tensors = {}
    for name in layers:
        is_kernel = name.split(".")[-1] in ("conv", "conv1", "conv2", "conv_in", "conv_out")
        rank, kernel = (kernel_rank, (3, 3)) if is_kernel else (2, ())
        tensors[f"unet.{name}.lora_A.weight"] = torch.ones(rank, 5, *kernel)
        tensors[f"unet.{name}.lora_B.weight"] = torch.ones(4, rank, *(1 for _ in kernel))
    return tensors


# Rules of the programs


@functools.cache
def checkpoint_names(unet: Any) -> dict[str, str]:
    """Return the name of each layer in a checkpoint of Stability's code, counted as that code builds its blocks."""
    places = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    index = 0
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            index += 1
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{index}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
        if block.downsamplers:
            index += 1
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    places["mid_block.attentions.0"] = "middle_block.1"
    index = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{index}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        if block.upsamplers:
            place = 2 if hasattr(block, "attentions") else 1  # It follows the last layer's attention, if there is one.
            places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    residual = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    names = {}
    for name in layers_of(unet, "first and last"):
        block = next(place for place in places if name == place or name.startswith(f"{place}."))
        leaf = name.removeprefix(block).removeprefix(".")
        names[name] = ".".join(filter(None, (places[block], residual.get(leaf, leaf))))
    return names


def version(header: dict[str, str]) -> str:
    """Return the family that A1111 and Forge read from a header: it hides files of another one, or applies nothing."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if header.get("ss_v2") == "True" else "sd1" if header else "unknown"


def comfyui(unet: Any, header: dict[str, str]) -> Lookup:
    """Look the key up among the checkpoint's names, the diffusers names, and those of diffusers' old processors."""
    known = {}
    for name, place in checkpoint_names(unet).items():
        known[f"lora_unet_{place.replace('.', '_')}"] = name
        known[f"lora_unet_{name.replace('.', '_')}"] = name
        known[f"unet.{name.replace('.to_', '.processor.to_')}".removesuffix(".0")] = name
    return known.get


def forge(unet: Any, header: dict[str, str]) -> Lookup:
    """Use ComfyUI's names, after a check of the version in the header."""
    return comfyui(unet, header) if version(header) == unet.family else no_layer


def a1111(unet: Any, header: dict[str, str]) -> Lookup:
    """Rewrite diffusers names by formulas that count three layers a level, and take other names as they are."""
    known = {place.replace(".", "_"): name for name, place in checkpoint_names(unet).items()}
    leaves = {"conv1": "in_layers_2", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}

    def lookup(key: str) -> str | None:
        rest = key.removeprefix("lora_unet_")
        if rest == key:
            return None
        rewritten = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}.get(rest, rest)
        if found := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", rest):
            index = 3 * int(found[2]) + int(found[4]) + (found[1] == "down")
            leaf = leaves.get(found[5], found[5]) if found[3] == "resnets" else found[5]
            side = "input" if found[1] == "down" else "output"
            rewritten = f"{side}_blocks_{index}_{int(found[3] == 'attentions')}_{leaf}"
        elif found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", rest):
            is_attention = found[1] == "attentions"
            leaf = found[3] if is_attention else leaves.get(found[3], found[3])
            rewritten = f"middle_block_{1 if is_attention else 2 * int(found[2])}_{leaf}"
        elif found := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", rest):
            rewritten = f"input_blocks_{3 * int(found[1]) + 3}_0_op"
        elif found := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", rest):
            rewritten = f"output_blocks_{3 * int(found[1]) + 2}_{2 if int(found[1]) else 1}_conv"
        return known.get(rewritten)

    return lookup if version(header) == unet.family else no_layer


def kohya(unet: Any, header: dict[str, str]) -> Lookup:
    """Look the key up among the layers of four kinds of blocks in kohya's own network, named as that network does."""
    kinds = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    blocks = tuple(f"{name}." for name, module in unet.named_modules() if type(module).__name__ in kinds)
    names = {name: place if unet.family == "sdxl" else name for name, place in checkpoint_names(unet).items()}
    known = {f"lora_unet_{own.replace('.', '_')}": name for name, own in names.items() if name.startswith(blocks)}
    return known.get


def no_layer(key: str) -> None:
    """Apply a key to no layer."""


READERS: dict[str, Callable[[Any, dict[str, str]], Lookup]] = {
    "comfyui": comfyui,
    "forge": forge,
    "a1111": a1111,
    "kohya": kohya,
}
# What a program drops of every file, whatever its names.
# Layers of text encoders, and the names that each program looks up for them in a file of the family. ComfyUI, Forge and
# A1111 know those of kohya's scripts, which name the modules of the text encoders of transformers 4.
TEXT_LAYERS = tuple(
    f"{component}.encoder.layers.{layer}.{leaf}"
    for component in ("text_encoder", "text_encoder_2")
    for layer in (0, 1)
    for leaf in (*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
)
DROPPED: dict[str, set[str]] = {"comfyui": set(), "forge": set(), "a1111": set(), "kohya": {FIRST_LAYER, LAST_LAYER}}


# Tests


@pytest.fixture
def network(family_unet: Any, family: str) -> Any:
    unet = family_unet(family)
    unet.family = family
    return unet


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_maps_every_layer(network: Any, targets: str, reader: str) -> None:
    layers = layers_of(network, targets)
    tensors = adapter_of(layers)
    header = kohya_header(network, tensors, "run", "epsilon")
    names = kohya_layer_names(network, layers)
    lookup = READERS[reader](network, header)
    found = {name: lookup(key) for name, key in names.items()}
    assert {name for name, got in found.items() if got is None} == DROPPED[reader] & set(layers)
    assert all(got in (name, None) for name, got in found.items())
    assert {key.partition(".")[0] for key in kohya_state_dict(network, tensors)} == set(names.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_maps_every_layer_of_the_text_encoders(network: Any) -> None:
    """Check the prefix of the family, the prefix of transformers 4, and that the UNet's names stay as they are."""
    count = 2 if family_of(network) == "sdxl" else 1
    layers = [name for name in TEXT_LAYERS if count == 2 or name.startswith("text_encoder.")]
    prefixes = {"text_encoder": "lora_te1_" if count == 2 else "lora_te_", "text_encoder_2": "lora_te2_"}
    known = {}
    for name in layers:
        component, _, module = name.partition(".")
        known[f"{prefixes[component]}text_model_{module.replace('.', '_')}"] = name
    if count == 2:
        layers.append("text_encoder_2.text_projection")
        known["lora_te2_text_projection"] = layers[-1]
    unet_layers = layers_of(network, "first and last")
    names = kohya_layer_names(network, [*unet_layers, *layers])
    assert {names[name]: name for name in layers} == known
    assert {name: names[name] for name in unet_layers} == kohya_layer_names(network, unet_layers)
    text = {f"{name}.lora_{half}.weight": torch.ones(9, 9) for name in layers for half in "AB"}
    tensors = adapter_of(unet_layers) | text
    assert kohya_header(network, tensors, "run", "epsilon") == kohya_header(
        network, adapter_of(unet_layers), "run", "epsilon"
    )
    assert {key.partition(".")[0] for key in kohya_state_dict(network, tensors)} == set(names.values())


@pytest.mark.parametrize(
    ("family", "counts"), [("sd1", (0, 64, 128, 130)), ("sd2", (0, 64, 128, 130)), ("sdxl", (0, 162, 211, 213))]
)
def test_restated_rules_find_as_many_layers_of_peft_files_as_the_programs(
    network: Any, counts: tuple[int, ...]
) -> None:
    header = kohya_header(network, adapter_of(["conv_in"]), "run", "epsilon")
    lookups = {name: reader(network, header) for name, reader in READERS.items()}
    for targets, count in zip(TARGETS, counts, strict=True):
        keys = [f"unet.{name}" for name in layers_of(network, targets)]
        found = {name: sum(lookup(key) is not None for key in keys) for name, lookup in lookups.items()}
        assert found == {"comfyui": count, "forge": count, "a1111": 0, "kohya": 0}
        # Forge applies nothing of a file whose header says nothing.
        assert not any(map(forge(network, {}), keys))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_restated_rules_lose_layers_where_the_programs_do(network: Any, family: str) -> None:
    """Check that each family needs its own kind of names."""
    layers = layers_of(network, "convolutions")
    header = kohya_header(network, adapter_of(layers), "run", "epsilon")
    if family == "sdxl":
        lookup = a1111(network, header)
        lost = [name for name in layers if lookup(f"lora_unet_{name.replace('.', '_')}") is None]
        assert lost == ["up_blocks.0.upsamplers.0.conv"]
    else:
        lookup = kohya(network, header)
        assert [name for name in layers if lookup(f"lora_unet_{sgm_name(name, network)}")] == []


@pytest.mark.parametrize(
    ("family", "prediction_type", "expected"),
    [
        ("sd1", "epsilon", ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "epsilon")),
        ("sd1", "flow_prediction", ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "flow_prediction")),
        ("sd2", "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "diffusers", "epsilon")),
        ("sd2", "v_prediction", ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "diffusers", "v")),
        (
            "sdxl",
            "v_prediction",
            (
                "sdxl_base_v1-0",
                "False",
                "stable-diffusion-xl-v1-base/lora",
                "https://github.com/Stability-AI/generative-models",
                "v",
            ),
        ),
    ],
)
def test_header_names_the_family_and_the_prediction(
    network: Any, prediction_type: str, expected: tuple[str, ...]
) -> None:
    header = kohya_header(network, adapter_of(layers_of(network, "first and last")), "my run", prediction_type)
    version, v2, architecture, implementation, prediction = expected
    assert header == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_network_args": json.dumps({"conv_dim": "3", "conv_alpha": "3"}),
        "ss_base_model_version": version,
        "ss_v2": v2,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "my run",
        "modelspec.prediction_type": prediction,
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
    }


def test_header_of_an_unknown_network_names_no_family(unet: Any) -> None:
    header = kohya_header(unet, adapter_of(layers_of(unet, "attention")), "run", "epsilon")
    assert not any(name in header for name in ("ss_base_model_version", "ss_v2", "modelspec.architecture"))
    assert "ss_network_args" not in header and header["ss_network_dim"] == "2"


@pytest.mark.parametrize("family", ["sd1"])
def test_alpha_of_each_layer_is_its_rank(network: Any) -> None:
    tensors = adapter_of(layers_of(network, "first and last"))
    kohya = kohya_state_dict(network, tensors)
    for name, key in kohya_layer_names(network, layers_of(network, "first and last")).items():
        assert torch.equal(kohya[f"{key}.lora_down.weight"], tensors[f"unet.{name}.lora_A.weight"])
        assert torch.equal(kohya[f"{key}.lora_up.weight"], tensors[f"unet.{name}.lora_B.weight"])
        alpha = kohya[f"{key}.alpha"]
        assert alpha.ndim == 0 and alpha.dtype == torch.float32
        assert alpha == len(kohya[f"{key}.lora_down.weight"])
