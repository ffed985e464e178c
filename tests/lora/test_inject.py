"""LoRA: no change at the start, and a file that every stock pipeline reads as the trainer meant it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora import write
from d2f_fast.lora.inject import inject_lora, lora_layers
from d2f_fast.lora.merge import merged_state_dict
from d2f_fast.lora.read import LORA_FILE
from d2f_fast.lora.write import save_lora

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({}, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    "feed-forward": ({"target_modules": ("ff.net.0.proj", "ff.net.2")}, "transformer_blocks.0.ff.net.2"),
    "1x1 convolution": ({"target_modules": ("proj_in",)}, "down_blocks.0.attentions.0.proj_in"),
    "residual block": ({"conv_rank": 3}, "up_blocks.1.resnets.0.conv1"),
    "shortcut": ({"conv_rank": 3}, "up_blocks.0.resnets.0.conv_shortcut"),
    "downsampler": ({"conv_rank": 3}, "down_blocks.0.downsamplers.0.conv"),
    "upsampler": ({"conv_rank": 3}, "up_blocks.0.upsamplers.0.conv"),
    "first": ({"first_last_layers": True}, "conv_in"),
    "last": ({"first_last_layers": True}, "conv_out"),
}


@pytest.fixture
def unet(tiny_folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()


def stock_pipeline(tiny_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@torch.no_grad()
def forward(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    timesteps = torch.tensor([673.16, 20.0])
    dtype = unet.conv_in.weight.dtype
    return unet.eval()(sample.to(dtype), timesteps, text.to(dtype)).sample


def randomize(unet: nn.Module) -> None:
    """Make every layer's B as random as its A, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def relative(difference: Tensor, truth: Tensor) -> float:
    return (difference.norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("linear", torch.bfloat16), ("first", torch.bfloat16)],
)
def test_a_new_lora_changes_nothing_and_then_trains(unet: Any, kind: str, dtype: torch.dtype) -> None:
    options, ending = KINDS[kind]
    unet.to(dtype)
    before = forward(unet)
    inject_lora(unet, 2, **options)
    names = [name for name in lora_layers(unet) if name.endswith(ending)]
    assert names
    layer: Any = lora_layers(unet)[names[0]]
    biases = {"feed-forward", "linear", "1x1 convolution", "residual block", "shortcut", "first", "last"}
    assert kind not in biases or layer.base_layer.bias.abs().min() > 0  # a dropped bias would show
    assert torch.equal(forward(unet), before)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    assert not torch.equal(forward(unet), before)


def test_only_the_adapter_trains_and_it_is_float32_in_any_base(unet: Any) -> None:
    unet.to(torch.bfloat16)
    trainable = inject_lora(unet, 2, conv_rank=2, first_last_layers=True)
    assert trainable and all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (name in trainable), name
        assert name in trainable or parameter.dtype == torch.bfloat16
    randomize(unet)
    unet(torch.randn(1, 4, 8, 8).bfloat16(), 5, torch.randn(1, 8, 16).bfloat16()).sample.float().sum().backward()
    assert {name for name, parameter in unet.named_parameters() if parameter.grad is not None} == set(trainable)


def test_the_seed_alone_makes_the_initial_weights(tiny_folder: Path) -> None:
    drawn = []
    for seed, disturbance in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(disturbance)
        unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
        state = torch.get_rng_state()
        drawn.append({k: v.detach() for k, v in inject_lora(unet, 2, seed=seed).items()})
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not all(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"rank": 4}, True),
        ({"rank": 2, "conv_rank": 3, "first_last_layers": True}, True),
        ({"rank": 4, "alpha": 3.0}, False),
        ({"rank": 2, "alpha": 0.7, "conv_rank": 5, "first_last_layers": True}, False),
    ],
    ids=["uniform", "mixed ranks", "alpha", "alpha and mixed ranks"],
)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_stock_pipeline_reads_the_file_as_the_trainer_meant_it(
    tiny_folder: Path, tmp_path: Path, unet: Any, options: dict[str, Any], exact: bool, with_metadata: bool
) -> None:
    base = forward(unet)
    inject_lora(unet, **options)
    randomize(unet)
    path = save_lora(unet, tmp_path, {"d2f.objective": "diff2flow"})
    expected = forward(unet)
    assert relative(expected - base, base) > 0.01
    if not with_metadata:
        save_file(load_file(path), path)
    pipeline = stock_pipeline(tiny_folder)
    pipeline.load_lora_weights(tmp_path)
    got = forward(pipeline.unet)
    assert relative(got - expected, expected) <= 1e-6
    if exact:
        assert torch.equal(got, expected)


def test_the_file_has_peft_keys_folded_alpha_and_a_header(tmp_path: Path, unet: Any) -> None:
    inject_lora(unet, 2, alpha=3.0, conv_rank=5, first_last_layers=True)
    randomize(unet)
    tensors, header = read_tensors(save_lora(unet, tmp_path, {"d2f.objective": "fm"}))
    layers: dict[str, Any] = lora_layers(unet)
    assert set(tensors) == {f"unet.{name}.lora_{kind}.weight" for name in layers for kind in "AB"}
    for name, layer in layers.items():
        a, b = tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]
        assert torch.equal(a, layer.lora_A["default"].weight)
        torch.testing.assert_close(b, layer.lora_B["default"].weight * (3.0 / 2), rtol=1e-6, atol=0)
    metadata = json.loads(header["lora_adapter_metadata"])
    assert header["format"] == "pt" and header["d2f.objective"] == "fm"
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 2
    assert metadata["unet.rank_pattern"] == metadata["unet.alpha_pattern"]
    assert metadata["unet.rank_pattern"]["conv_in"] == 36 and metadata["unet.rank_pattern"]["conv_out"] == 4


def test_saving_leaves_the_network_as_it_was(tmp_path: Path, unet: Any) -> None:
    trainable = inject_lora(unet, 2, conv_rank=2)
    randomize(unet)
    expected, keys = forward(unet), list(unet.state_dict())
    unet.train()
    save_lora(unet, tmp_path)
    assert unet.training and list(unet.state_dict()) == keys
    assert {name for name, parameter in unet.named_parameters() if parameter.requires_grad} == set(trainable)
    assert torch.equal(forward(unet), expected)
    assert (tmp_path / LORA_FILE).stat().st_mode & 0o044


def test_a_lora_of_a_half_precision_base_is_saved(tmp_path: Path, unet: Any) -> None:
    unet.to(torch.bfloat16)
    inject_lora(unet, 2, alpha=3.0)
    randomize(unet)
    tensors, _ = read_tensors(save_lora(unet, tmp_path))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("factor", "difference"), [(1 / 1.5, r"\d\.\de-0[12]"), (1.001, r"\d\.\de-0[45]")], ids=["scale", "rounding"]
)
def test_a_file_that_reloads_to_another_output_is_refused(
    tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch, factor: float, difference: str
) -> None:
    inject_lora(unet, 2, alpha=3.0)
    randomize(unet)
    before = save_lora(unet, tmp_path).read_bytes()
    state_dict = write.lora_state_dict

    def wrong(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, header = state_dict(unet)
        return {key: value * factor if ".lora_B" in key else value for key, value in tensors.items()}, header

    monkeypatch.setattr(write, "lora_state_dict", wrong)
    sentence = rf"does not reload to the same output \(relative difference {difference}\): not shareable"
    with pytest.raises(ModelError, match=sentence):
        save_lora(unet, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == before


@pytest.mark.parametrize("layer", ["conv_in", "conv_out"])
def test_the_first_and_last_layer_are_as_expressive_as_full_weights(tiny_folder: Path, unet: Any, layer: str) -> None:
    change = torch.randn_like(getattr(unet, layer).weight)
    inject_lora(unet, 2, alpha=3.0, first_last_layers=True)
    adapted: Any = lora_layers(unet)[layer]
    a, b, rank = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight, adapted.r["default"]
    u, s, vh = torch.linalg.svd(change.flatten(1) / adapted.scaling["default"], full_matrices=False)
    assert len(s) <= rank
    with torch.no_grad():
        a.zero_().flatten(1)[: len(s)] = vh
        b.zero_().flatten(1)[:, : len(s)] = u * s
    full = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    with torch.no_grad():
        getattr(full, layer).weight.add_(change)
    assert relative(forward(unet) - forward(full), forward(full)) <= 1e-5


def test_merged_weights_give_the_adapted_output(tiny_folder: Path, unet: Any) -> None:
    inject_lora(unet, 2, alpha=3.0, conv_rank=3, first_last_layers=True)
    randomize(unet)
    merged = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    merged.load_state_dict(merged_state_dict(unet))
    assert relative(forward(merged) - forward(unet), forward(unet)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2, "target_modules": ("to_z",)}, "target_modules: 'to_z' is no linear or convolution layer"),
        ({"rank": 2, "target_modules": ("to_q", "to_z")}, "target_modules: 'to_z' is no linear or convolution layer"),
        ({"rank": 2, "target_modules": ("norm1",)}, "target_modules: 'norm1' is no linear or convolution layer"),
        ({"rank": 0}, "rank must be at least 1 and conv_rank at least 0, got 0 and 0"),
        ({"rank": 2, "conv_rank": -1}, "rank must be at least 1 and conv_rank at least 0, got 2 and -1"),
    ],
    ids=str,
)
def test_impossible_adapters_are_refused_and_leave_the_network_alone(
    unet: Any, options: dict[str, Any], sentence: str
) -> None:
    keys = list(unet.state_dict())
    with pytest.raises(ModelError, match=re.escape(sentence)) as caught:
        inject_lora(unet, **options)
    assert "\n" not in str(caught.value)
    assert list(unet.state_dict()) == keys
    inject_lora(unet, 2)


def test_a_second_adapter_is_refused(unet: Any) -> None:
    inject_lora(unet, 2)
    with pytest.raises(ModelError, match=r"the UNet takes no LoRA on .*: .*default.* already"):
        inject_lora(unet, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, unet: Any, bad: float) -> None:
    trainable = inject_lora(unet, 2)
    good = save_lora(unet, tmp_path).read_bytes()
    with torch.no_grad():
        next(iter(trainable.values()))[0, 0] = bad
    with pytest.raises(CheckpointError, match=r"unet\.\S+ holds NaN or infinity and is not written"):
        save_lora(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    assert (tmp_path / LORA_FILE).read_bytes() == good
