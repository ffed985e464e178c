"""Compile the parts of a training step that call a network: the call as a whole, or the network's repeated blocks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import LoraLayer
from torch import nn

from d2f_fast.config import CompiledPart
from d2f_fast.errors import RefusedInputError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


def compile_part(
    part: CompiledPart, method: Callable[_Arguments, _Result], network: nn.Module, device: torch.device
) -> tuple[Callable[_Arguments, _Result], AbstractContextManager[None]]:
    """Compile a call of a network.

    Args:
        part: part that is compiled: "full" for the whole method, "regional" for the network's repeated blocks.
        method: bound method of an object that belongs to one trainer; it calls the network.
        network: network in its final form, with its adapter in place.
        device: device that it runs on.

    Returns:
        The method, compiled or as it was, and a context in which it is called and its gradients are computed.

    Raises:
        RefusedInputError: the network has no block to compile.
    """
    if part != "full":
        return method, CompiledBlocks(network, device) if part == "regional" else nullcontext()
    assert isinstance(method, MethodType)
    return MethodType(_compiled(method.__func__, device), method.__self__), nullcontext()


class CompiledBlocks(AbstractContextManager[None]):
    """Context in which the transformer and residual blocks of a network run as compiled code.

    Blocks of the same structure at the same level of the network, which see the same sizes, share their code: Stable
    Diffusion 1.5 needs code for 22 kinds of blocks and has 38 blocks, SDXL 18 for 87. What lies between the blocks is
    not compiled, and outside the context, as in sampling and validation, nothing is.

    Args:
        network: network in its final form, with its adapter in place.
        device: device that it runs on.

    Attributes:
        kinds: number of kinds of blocks.

    Raises:
        RefusedInputError: the network has no such block.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        functions: dict[str, Callable[..., Any]] = {}
        # The text's products of several layers would reach into the blocks from outside, and differ in their strides.
        self._changes: list[tuple[Any, str, object]] = [
            (products, "wanted", False) for products in [vars(network).get("text_products")] if products is not None
        ]
        for name, block in network.named_modules():
            if isinstance(block, _BLOCKS) and "forward" not in vars(block):
                kind = str((name.split(".")[:2], block, [_constants(module) for module in block.modules()]))
                if kind not in functions:
                    functions[kind] = _compiled(type(block).forward, device, suffix=f"_{len(functions)}")
                self._changes.append((block, "forward", MethodType(functions[kind], block)))
        if not functions:
            names = " or ".join(block.__name__ for block in _BLOCKS)
            raise RefusedInputError(f"compile regional needs a UNet with a {names}, and this one has none: give full")
        self.kinds = len(functions)
        self._before: list[list[dict[str, object]]] = []

    def __enter__(self) -> None:
        # A teacher's context lies inside that of the network, whose blocks it may share.
        self._before.append([{name: vars(on)[name]} if name in vars(on) else {} for on, name, _ in self._changes])
        for on, name, value in self._changes:
            setattr(on, name, value)

    def __exit__(self, *_: object) -> None:
        for (on, name, _value), before in zip(self._changes, self._before.pop(), strict=True):
            del vars(on)[name]
            vars(on).update(before)


def _constants(module: nn.Module) -> tuple[object, ...]:
    """Return the numbers and types that compiled code of a module depends on, and that its text lacks."""
    scales = dict(module.scaling) if isinstance(module, LoraLayer) else {}
    return scales, [(parameter.dtype, parameter.requires_grad) for parameter in module.parameters(recurse=False)]


def _compiled(function: Any, device: torch.device, suffix: str = "") -> Callable[..., Any]:
    """Return a copy of a function, compiled as one graph."""
    # torch.compile counts recompiles by code object and fails at the ninth: each caller gets its own. It notes by name
    # and line of code which sizes vary.
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=function.__name__ + suffix)
    own = FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    if device.type != "cpu":
        return torch.compile(own, fullgraph=True)
    # On a CPU Inductor's conversion of convolutions to channels_last costs a sixth of the step of SD1.5 at half its
    # width (AMD EPYC, torch 2.13), and in a UNet of 8 and 16 channels it gave gradients that were 27 % wrong.
    return torch.compile(own, fullgraph=True, options={"layout_optimization": False})
