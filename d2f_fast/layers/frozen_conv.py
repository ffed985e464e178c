"""A convolution with frozen weights that does not keep its input for backward.

    y = conv2d(x, weight, bias)        dx = conv2d_input(x.shape, weight, dy)

The gradient of the input needs the weight and the input's shape; only a weight that trains needs the input itself.
torch keeps the input all the same, eager and compiled (pytorch/pytorch#133566), because one backward formula takes it
for every gradient. Of a frozen linear layer torch keeps only the weight, so linear layers need no such class.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from d2f_fast.ops import autocasts, is_channels_last

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
        # Backward has no input, so the weight alone decides the memory format that cuDNN and oneDNN compute in.
        ctx.layout = torch.channels_last if is_channels_last(x) else torch.preserve_format
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, *geometry = ctx.geometry
        weight = weight.to(grad_y.dtype, memory_format=ctx.layout)
        return conv2d_input(shape, weight, grad_y, *geometry), *[None] * 6


class FrozenConv2d(nn.Conv2d):
    """An `nn.Conv2d` that keeps no input for backward while its weight and bias are frozen.

    Its results, parameters and keys are those of `nn.Conv2d`; it is made by changing the class of one. It runs
    `nn.Conv2d`'s own forward where no gradient is wanted, the weights train, or the padding is given by name or is not
    by zeros.
    """

    def forward(self, x: Tensor) -> Tensor:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        unusual = self.padding_mode != "zeros" or isinstance(self.padding, str) or x.ndim != 4
        if trains or unusual or not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_exporting():
            return super().forward(x)
        if autocasts(x):
            # The cast is here, where autograd records it: inside the Function, dy would arrive in another type.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        geometry = self.stride, self.padding, self.dilation, self.groups
        convolve: Callable[..., Tensor] = _FrozenConv2d.apply
        return convolve(x, self.weight, self.bias, *geometry)
