"""Frozen convolutions give torch's own results and keep no input for backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2f_fast.layers.frozen_conv import FrozenConv2d

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1 with stride": {"kernel_size": 1, "stride": 2},
    "dilation and groups": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "bias": False},
    "uneven": {"kernel_size": (3, 1), "stride": (2, 1), "padding": (0, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def pair(**geometry: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return torch's convolution and ours, with the same frozen weights."""
    theirs, ours = nn.Conv2d(8, 8, **geometry), nn.Conv2d(8, 8, **geometry)
    ours.load_state_dict(theirs.state_dict())
    ours.__class__ = FrozenConv2d
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def kept(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the tensors that the forward keeps for backward, without the parameters."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor
    ):
        conv(x)
    parameters = {parameter.data_ptr() for parameter in conv.parameters()}
    return [tensor for tensor in tensors if tensor.data_ptr() not in parameters]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_gradient_and_layout_equal_those_of_torch(
    geometry: str, layout: torch.memory_format, autocast: bool
) -> None:
    x = torch.randn(2, 8, 9, 7).to(memory_format=layout).requires_grad_()
    results = []
    for conv in pair(**GEOMETRIES[geometry]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv(x)
        (grad_x,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y).to(y))
        results.append((y, grad_x))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
        assert theirs.dtype == ours.dtype and theirs.stride() == ours.stride()


def test_weights_of_another_layout_give_the_gradient_of_torch() -> None:
    theirs, ours = (conv.to(memory_format=torch.channels_last) for conv in pair(kernel_size=3))
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    assert torch.equal(*(torch.autograd.grad(conv(x).square().sum(), x)[0] for conv in (theirs, ours)))


@pytest.mark.parametrize("geometry", ["3x3", "stride", "depthwise"])
def test_first_and_second_derivatives_pass_gradcheck(geometry: str) -> None:
    _, conv = pair(**GEOMETRIES[geometry])
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv.double(), x)
    assert torch.autograd.gradgradcheck(lambda x: conv(x).sin(), x)


@pytest.mark.parametrize("geometry", ["3x3", "1x1", "stride", "dilation and groups"])
def test_input_is_not_kept_where_torch_keeps_it(geometry: str) -> None:
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    theirs, ours = pair(**GEOMETRIES[geometry])
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept(theirs, x))
    assert not kept(ours, x)


def test_trainable_weights_get_their_gradient() -> None:
    theirs, ours = pair(kernel_size=3)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    for trains in ("weight", "bias"):
        for conv in (theirs, ours):
            conv.requires_grad_(False)
            getattr(conv, trains).requires_grad_(True)
            conv(x).square().sum().backward()
        assert torch.equal(getattr(theirs, trains).grad, getattr(ours, trains).grad)


@pytest.mark.parametrize("shape", [(8, 5, 5), (0, 8, 5, 5)], ids=["one image", "empty batch"])
def test_unusual_inputs_give_the_results_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    theirs, ours = pair(kernel_size=3)
    assert torch.equal(theirs(x), ours(x))
    assert torch.equal(*(torch.autograd.grad(conv(x).square().sum(), x)[0] for conv in (theirs, ours)))


@pytest.mark.slow
def test_compiled_gradient_equals_eager_in_one_graph() -> None:
    theirs, ours = pair(kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    want = torch.autograd.grad(theirs(x.sin()).square().sum(), x)[0]
    compiled = torch.compile(lambda x: ours(x.sin()), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], want, rtol=1e-6, atol=1e-6)


def test_torch_keeps_no_input_for_a_frozen_linear_layer() -> None:
    x = torch.randn(2, 9, 8, requires_grad=True)
    assert not kept(nn.Linear(8, 8).requires_grad_(False), x)
