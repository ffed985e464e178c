"""Frozen weights in half precision give the products of autocast, and the exact weights can be restored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from d2f_fast.config import TrainingConfig
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.layers.half_base import HalfBase
from d2f_fast.lora.merge import merged_state_dict
from d2f_fast.training.trainer import AlignedTrainer


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., AlignedTrainer]:
    def trainer(output: str = "run", **options: Any) -> AlignedTrainer:
        rank = None if options.get("adapter") == "full" else 2
        config = TrainingConfig(
            output_dir=str(tmp_path / output), resolution=16, rank=rank, learning_rate=1e-2, **options
        )
        return AlignedTrainer.from_pretrained(tiny_folder, config)

    return trainer


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(4, 8, 16, generator=generator),
    }


def test_training_steps_equal_those_of_plain_autocast_bit_for_bit(make: Any) -> None:
    rounded, plain = (make(mixed_precision="bf16", conv_rank=2, first_last_layers=True) for _ in range(2))
    plain._half_base = None
    for number in range(3):
        assert torch.equal(rounded.step(batch(number)), plain.step(batch(number)))
        for name, parameter in rounded.trainable.items():
            assert torch.equal(parameter, plain.trainable[name])
    half = {p.dtype for m in rounded.unet.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    assert half == {torch.float32, torch.bfloat16}  # those of the adapter and of its base
    norms = {
        p.dtype for m in rounded.unet.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm) for p in m.parameters()
    }
    assert norms == {torch.float32}


@pytest.mark.parametrize(("adapter", "precision"), [("lora", "no"), ("full", "bf16")])
def test_runs_without_lora_or_autocast_keep_float32_weights(make: Any, adapter: str, precision: str) -> None:
    trainer = make(adapter=adapter, mixed_precision=precision)
    trainer.step(batch())
    assert {parameter.dtype for parameter in trainer.unet.parameters()} == {torch.float32}


def test_saving_and_sampling_use_the_exact_weights(make: Any, tmp_path: Path) -> None:
    trainer = make(mixed_precision="bf16")
    for number in range(2):
        trainer.step(batch(number))
    saved = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "saved"), safety_checker=None)
    images = [image.tobytes() for image in trainer.sample("ab", generator=torch.Generator().manual_seed(0))]
    trainer.save_lora(tmp_path / "lora")
    exact = make(mixed_precision="no")
    exact.global_step = trainer.global_step  # The header of the LoRA names the steps.
    with torch.no_grad():
        for name, parameter in exact.trainable.items():
            parameter.copy_(trainer.trainable[name])
            exact.ema.shadow[name].copy_(trainer.ema.shadow[name])  # type: ignore[union-attr]
    with exact.averaged():
        expected = merged_state_dict(exact.unet)
    assert [name for name, value in saved.unet.state_dict().items() if not torch.equal(value, expected[name])] == []
    expected_images = exact.sample("ab", generator=torch.Generator().manual_seed(0))
    assert [image.tobytes() for image in expected_images] == images
    exact.save_lora(tmp_path / "exact")
    name = "pytorch_lora_weights.safetensors"
    (tensors, header), (others, other_header) = (read_tensors(tmp_path / folder / name) for folder in ("lora", "exact"))
    assert header == other_header and tensors.keys() == others.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []


def test_switching_keeps_addresses_and_reads_changed_weights(make: Any) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)).requires_grad_(False)
    network[2].weight.requires_grad_(True)
    half = HalfBase(network, torch.bfloat16)
    exact = network[0].weight.clone()
    half.use()
    address = network[0].weight.data_ptr()
    assert network[0].weight.dtype == network[2].bias.dtype == torch.bfloat16
    assert network[1].weight.dtype == network[2].weight.dtype == torch.float32
    with half.exact():
        assert torch.equal(network[0].weight, exact)
        network[0].weight.mul_(2)
    half.use()
    assert network[0].weight.data_ptr() == address
    assert torch.equal(network[0].weight, (2 * exact).bfloat16())
    with pytest.raises(RuntimeError, match="inside"), half.in_use():
        raise RuntimeError("inside")
    assert torch.equal(network[0].weight, 2 * exact)
    half.restore()
    with half.exact():
        pass
    assert network[0].weight.dtype == torch.float32
