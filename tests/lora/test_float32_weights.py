"""A network in half precision takes adapters and computes as the same network with float32 weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from d2f_fast.lora.float32_weights import computing_in_float32, float32_stand_ins
from d2f_fast.lora.inject import inject_lora, lora_layers


@pytest.fixture
def half(tiny_folder: Path) -> Any:
    """Return the tiny UNet in bfloat16, without gradients."""
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet", dtype=torch.bfloat16).requires_grad_(False)


def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 3, 16)))
    with torch.no_grad():
        result: Tensor = unet(sample, torch.tensor([314.0]), encoder_hidden_states=text, return_dict=False)[0]
    return result


def test_half_precision_network_computes_as_its_float32_copy(half: Any, tiny_folder: Path) -> None:
    exact = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").bfloat16().float()
    weights = [parameter.data_ptr() for parameter in half.parameters()]
    with computing_in_float32(half):
        assert torch.equal(output(half), output(exact))
    with pytest.raises(ValueError, match="inside"), computing_in_float32(half):
        half.conv_out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("inside")))
        output(half)
    assert [parameter.data_ptr() for parameter in half.parameters()] == weights
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_adapter_of_a_half_precision_network_starts_with_the_values_of_a_float32_network(
    half: Any, tiny_folder: Path
) -> None:
    exact = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    found, expected = inject_lora(half, 2, seed=3), inject_lora(exact, 2, seed=3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {layer.base_layer.weight.dtype for layer in lora_layers(half).values()} == {torch.bfloat16}
    weight = half.conv_in.weight
    before = weight.clone()
    with pytest.raises(ValueError, match="inside"), float32_stand_ins(half):
        assert (weight.dtype, weight.shape, weight.untyped_storage().nbytes()) == (torch.float32, before.shape, 4)
        raise ValueError("inside")
    assert torch.equal(weight, before) and weight.dtype == torch.bfloat16
