"""A convolution with frozen weights that does not keep its input for backward.

    y = conv2d(x, weight, bias)        dx = conv2d_input(x.shape, weight, dy)

The gradient of the input needs the weight and the input's shape; only a weight that trains needs the input itself.
torch keeps it all the same, eager and compiled (pytorch/pytorch#133566): one backward formula takes it for every
gradient. Of a frozen linear layer torch keeps the weight alone: nothing is to be done there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from d2f_fast.ops import autocasts

Pair = tuple[int, int]


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        ctx.save_for_backward(weight)
        ctx.geometry = x.shape, stride, padding, dilation, groups
        # With no input at hand the weight alone decides the layout that cuDNN and oneDNN compute in.
        ctx.layout = torch.channels_last if _is_channels_last(x) else torch.preserve_format
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, *geometry = ctx.geometry
        weight = weight.to(grad_y.dtype, memory_format=ctx.layout)
        return conv2d_input(shape, weight, grad_y, *geometry), *[None] * 6


class FrozenConv2d(nn.Conv2d):
    """An nn.Conv2d that keeps no input while its weight and bias are frozen; the same numbers, parameters and keys.

    Made by changing the class of an `nn.Conv2d`, whose forward it runs where there is nothing to save or another
    geometry: no gradient wanted, trainable weights, padding given by name or other than zeros.
    """

    def forward(self, x: Tensor) -> Tensor:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        unusual = self.padding_mode != "zeros" or isinstance(self.padding, str) or x.ndim != 4
        if trains or unusual or not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_exporting():
            return super().forward(x)
        if autocasts(x):
            # Here, where autograd sees it: in the Function it would cast inside, and dy come in another type.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _FrozenConv2d.apply(x, self.weight, self.bias, *geometry)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
