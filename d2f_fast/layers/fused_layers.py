"""LoRA layers of peft on the fused path, and the rule for when peft's own forward has to run.

    Linear, 1x1 Conv2d     ops.lora_linear: base product and adapter as one operation
    other Conv2d           torch's convolution for the base and for A; B, a 1x1 convolution, added by one product

This holds on a GPU, where A and B are rounded to the type of x, the type of the base product. Elsewhere plain torch
does peft's operations in peft's order and types, so that torch.compile can trace them, and results are bit for bit
peft's: float32 adapters of a half-precision network compute in float32. Unlike in peft, x is never rounded to a
half-precision adapter's type. Each call decides from Python attributes and shapes alone.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F

from d2f_fast.layers.frozen_conv import FrozenConv2d
from d2f_fast.ops import autocasts, is_channels_last, lora_linear, runs_plain

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Adapter(NamedTuple):
    """One active adapter of a layer: its A and B, of the layer's own kind, and the scale of their product."""

    lora_a: Any  # nn.Linear or nn.Conv2d
    lora_b: Any  # of the same class as A
    scale: float


class FusedLinear(PeftLinear):
    """peft's LoRA layer of an nn.Linear, on the fused path."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not serves(self):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if not runs_plain(x.device):
            lora_a, lora_b = operands(self)
            return lora_linear(x, self.base_layer.weight, lora_a, lora_b, self.base_layer.bias)
        result = self.base_layer(x)
        dtype = result.dtype
        for lora_a, lora_b, scale in active_adapters(self):
            adapted, a_weight, b_weight = _in_one_type(x, lora_a.weight, lora_b.weight)
            result = result + _scaled(F.linear(F.linear(adapted, a_weight), b_weight), scale)
        return result.to(dtype)


class FusedConv2d(PeftConv2d):
    """peft's LoRA layer of an nn.Conv2d, on the fused path."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not serves(self):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base, fused = self.base_layer, not runs_plain(x.device)
        if fused and is_channels_last(x) and _is_linear(base):
            weight, lora_a, lora_b = (matrix.flatten(1) for matrix in (base.weight, *operands(self)))
            return lora_linear(x.permute(0, 2, 3, 1), weight, lora_a, lora_b, base.bias).permute(0, 3, 1, 2)
        result = base(x)
        dtype = result.dtype
        for lora_a, lora_b, scale in active_adapters(self):
            if fused and lora_b.groups == 1 and is_channels_last(result):
                s = lora_a._conv_forward(x, lora_a.weight if autocasts(x) else lora_a.weight.to(x.dtype), None)
                result = _expanded(result, s, _scaled(lora_b.weight, scale))
            else:
                adapted, a_weight, b_weight = _in_one_type(x, lora_a.weight, lora_b.weight)
                s = lora_a._conv_forward(adapted, a_weight, None)
                result = result + _scaled(lora_b._conv_forward(s, b_weight, None), scale)
        return result.to(dtype)


def serves(layer: LoraLayer) -> bool:
    """Return whether the fused forward, and not peft's, is the right one for a layer now."""
    if layer.disable_adapters or layer.merged:  # peft runs the base layer alone, or undoes the merge first
        return False
    return len(active_adapters(layer)) > 0 and obstacle(layer) is None  # torch 2.11 cannot trace bool() of a list


def obstacle(layer: LoraLayer, *, training: bool = False) -> str | None:
    """Return the reason why a LoRA layer has to run peft's own forward, or None where the fused forward serves it.

    Args:
        layer: LoRA layer of peft, of any class.
        training: judge the layer as if it were in training mode.
    """
    if type(layer) not in (FusedLinear, FusedConv2d):
        return f"{type(layer).__name__} layer"
    base = layer.base_layer
    if type(base) not in (nn.Linear, nn.Conv2d, FrozenConv2d):
        return f"{type(base).__name__} base layer"
    if "forward" in vars(layer):
        return "replaced forward"
    modules = [base]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            return type(layer.lora_variant[name]).__name__
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and (training or dropout.training):
            return "dropout in training"
        modules += [layer.lora_A[name], layer.lora_B[name]]
        if layer.lora_B[name].bias is not None:
            return "bias on B"
    for module in modules:
        if type(module.weight) not in (nn.Parameter, Tensor) or not module.weight.is_floating_point():
            return f"{type(module.weight).__name__} weight"  # of a quantised or sharded layer
        if "forward" in vars(module) or hooked(module):
            return "hooked layer"
    return None


def hooked(module: nn.Module) -> bool:
    """Return whether calling a module does more than run its forward."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def active_adapters(layer: LoraLayer) -> list[Adapter]:
    """Return the adapters that contribute to a layer's output, in peft's order."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return [Adapter(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in names]


def operands(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return A and B of all active adapters together, with the scales folded into B."""
    adapters = active_adapters(layer)
    lora_as = [adapter.lora_a.weight for adapter in adapters]
    lora_bs = [_scaled(adapter.lora_b.weight, adapter.scale) for adapter in adapters]
    return (lora_as[0], lora_bs[0]) if len(adapters) == 1 else (torch.cat(lora_as), torch.cat(lora_bs, 1))


def _in_one_type(x: Tensor, a_weight: Tensor, b_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, A and B in the widest of their types; autocast casts them, and caches the casts, by itself."""
    if autocasts(x):
        return x, a_weight, b_weight
    dtype = torch.promote_types(torch.promote_types(x.dtype, a_weight.dtype), b_weight.dtype)
    return x.to(dtype), a_weight.to(dtype), b_weight.to(dtype)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _is_linear(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is one linear layer applied to each pixel's channels."""
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _expanded(result: Tensor, s: Tensor, lora_b: Tensor) -> Tensor:
    """Return result + conv2d(s, lora_b), a 1x1 convolution, by one addmm; all of [B, C, H, W], channels_last."""
    batch, features, height, width = result.shape
    rows = result.permute(0, 2, 3, 1).reshape(-1, features)
    s = s.permute(0, 2, 3, 1).reshape(-1, s.shape[1])
    y = torch.addmm(rows, s, lora_b.flatten(1).t().to(result.dtype))
    return y.view(batch, height, width, features).permute(0, 3, 1, 2)
