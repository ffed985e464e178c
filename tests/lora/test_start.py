"""LoRA layers that start from a file have its effect, and files that cannot be started from are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.inject import lora_layers
from d2f_fast.lora.start import inject_start, merge_text_layers, read_start
from d2f_fast.lora.write import save_lora

FORMS = (
    *(
        "peft",
        "unprefixed",
        "base_model",
        "diffusers",
        "processors",
        "kohya",
        "kohya sgm",
        "lycoris",
        "diffusion_model",
    ),
    *("lora", "rslora", "loha", "loha with cores", "lokr", "lokr in whole factors", "lokr in four"),
)
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Any:
    """Pipeline that no test may change."""
    return StableDiffusionPipeline.from_pretrained(tiny_folder)


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    """Return the output of a UNet for a fixed input, in float64."""
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    result: torch.Tensor = unet.double().eval()(sample.double(), torch.tensor([673.16, 20.0]), text.double()).sample
    return result


@pytest.mark.parametrize("form", FORMS)
def test_output_before_the_first_step_has_the_effect_of_the_file(
    form: str, pipeline: Any, tmp_path: Path, write_form: Any
) -> None:
    path, deltas = write_form(form, pipeline.unet, tmp_path)
    base, reference, adapted = (copy.deepcopy(pipeline.unet) for _ in range(3))
    reference.double()
    with torch.no_grad():
        for key, delta in deltas.items():
            weight = reference.get_parameter(key)
            weight += 0.7 * delta.reshape(weight.shape)
    start = read_start(f"{path}:0.7", pipeline)
    trainable = inject_start(adapted, start, alpha=3.0)
    assert len(trainable) == 2 * len(deltas) == 2 * len(start.unet_layers)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    expected = output(reference)
    error = float((output(adapted) - expected).norm() / (expected - output(base)).norm())
    print(f"\n{form}: effect error {error:.1e}")
    assert error <= 1e-6


def test_ranks_and_training_scale_are_those_of_file_and_option(pipeline: Any, tmp_path: Path, write_form: Any) -> None:
    path, _ = write_form("peft", pipeline.unet, tmp_path)
    unet = copy.deepcopy(pipeline.unet)
    inject_start(unet, read_start(str(path), pipeline), alpha=6.0)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(unet).items()}
    assert set(ranks.values()) == {2, 3} and ranks["conv_in"] == 2
    assert ranks == read_start(str(path), pipeline).ranks
    assert {layer.scaling["default"] for layer in lora_layers(unet).values()} == {3.0}


def test_written_file_of_a_start_has_the_same_effect(pipeline: Any, tmp_path: Path, write_form: Any) -> None:
    path, _ = write_form("kohya", pipeline.unet, tmp_path)
    start, unet = read_start(str(path), pipeline), copy.deepcopy(pipeline.unet)
    inject_start(unet, start, alpha=3.0)
    again = read_start(str(save_lora(unet, tmp_path / "run")), pipeline)
    for name, layer in start.unet_layers.items():
        expected = layer.delta(layer.up)
        assert (again.unet_layers[name].delta(layer.up) - expected).norm() <= 1e-6 * expected.norm()


def test_layers_of_text_encoders_are_merged_and_kept(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    weight = next(module for name, module in pipeline.text_encoder.named_modules() if name.endswith(TEXT)).weight
    before, a, b = weight.detach().clone(), torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"text_encoder.text_model.{TEXT}.lora_A.weight": a, f"text_encoder.text_model.{TEXT}.lora_B.weight": b}
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ModelError, match="adapts text encoders only, and training adapts the UNet"):
        read_start(str(tmp_path / "text.safetensors"), pipeline)
    tensors |= {"unet.conv_in.lora_A.weight": torch.ones(2, 36), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "both.safetensors")
    start = read_start(f"{tmp_path / 'both.safetensors'}:0.5", pipeline)
    merge_text_layers(pipeline, start)
    torch.testing.assert_close(weight, before + 0.5 * b @ a)
    assert list(start.text_layers) == [f"text_encoder.{TEXT}"] and list(start.unet_layers) == ["conv_in"]


def test_dora_is_refused_by_name(pipeline: Any, tmp_path: Path, write_form: Any) -> None:
    path, _ = write_form("dora", pipeline.unet, tmp_path)
    with pytest.raises(ModelError, match=r"is a DoRA, which a plain LoRA cannot go on from: merge it into the model"):
        read_start(str(path), pipeline)


def test_numbers_that_overflow_together_are_refused(pipeline: Any, tmp_path: Path) -> None:
    key = "unet.conv_in"
    tensors = {
        f"{key}.lora_A.weight": torch.full((1, 4, 3, 3), 1e30),
        f"{key}.lora_B.weight": torch.full((8, 1, 1, 1), 1e30),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"unet\.conv_in holds numbers that are too large"):
        read_start(str(tmp_path / "a.safetensors"), pipeline)


def test_identity_differs_for_another_scale_and_content(pipeline: Any, tmp_path: Path, write_form: Any) -> None:
    path, _ = write_form("peft", pipeline.unet, tmp_path)
    one, half = (read_start(f"{path}{scale}", pipeline).identity for scale in ("", ":0.5"))
    write_form("peft", pipeline.unet, tmp_path)
    assert len({one, half, read_start(str(path), pipeline).identity}) == 3
