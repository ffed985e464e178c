"""Write the state of an optimizer to a safetensors file as flat tensors, and read it back.

    {parameter}.{key}       one tensor of the state of one parameter, for example "conv_in.weight.exp_avg"

The header names the optimizer's class and the format. Learning rate, betas and the other settings are not in the file:
they are options of the run, which a continuation has to give again.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_file import read_tensors, write_tensors

FORMAT = "1"


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors by `{parameter}.{key}`; they are not copies.

    Args:
        optimizer: optimizer whose state holds nothing but tensors, such as AdamW.
        trainable: its parameters by name.

    Raises:
        TypeError: the state holds something else.
    """
    tensors = {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}.{key} of {type(optimizer).__name__} is a {type(value).__name__}, and only tensors are kept"
                )
            tensors[f"{name}.{key}"] = value
    return tensors


def write_optimizer(path: Path, optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> None:
    """Write the state of an optimizer to a safetensors file.

    Args:
        path: file to write.
        optimizer: optimizer whose state holds nothing but tensors.
        trainable: its parameters by name.

    Raises:
        CheckpointError: a tensor holds NaN or an infinity.
        RefusedInputError: the disk is full.
        TypeError: the state holds something other than tensors.
    """
    write_tensors(path, optimizer_tensors(optimizer, trainable), {"format": FORMAT, "optimizer": _kind(optimizer)})


def read_optimizer(path: Path, optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> None:
    """Replace the state of an optimizer by what `write_optimizer` wrote, with the same dtypes and strides.

    Args:
        path: file to read.
        optimizer: optimizer of the same class, over the same parameters.
        trainable: its parameters by name.

    Raises:
        CheckpointError: the file is damaged, or it belongs to another optimizer or to parameters of other names or
            shapes. The optimizer's state is unchanged.
    """
    tensors, header = read_tensors(path)
    cure = "resume with the settings that the checkpoint was made with"
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no optimizer state of format {FORMAT}: resume from another checkpoint")
    if header.get("optimizer") != _kind(optimizer):
        raise CheckpointError(
            f"{path} holds the state of {header.get('optimizer')}, and the optimizer is {_kind(optimizer)}: {cure}"
        )
    state: dict[str, dict[str, Tensor]] = {name: {} for name in trainable}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in state:
            raise CheckpointError(f"{path} holds {full_name}, and no parameter has this name: {cure}")
        expected = [] if key == "step" else list(trainable[name].shape)
        if list(tensor.shape) != expected:
            got = list(tensor.shape)
            raise CheckpointError(f"{path} holds {full_name} of shape {got}, and it needs {expected}: {cure}")
        state[name][key] = tensor
    if len({frozenset(values) for values in state.values()}) > 1:
        name = min(state, key=lambda name: len(state[name]))
        raise CheckpointError(f"{path} lacks a part of the state of {name}: {cure}")
    # An optimizer that computes on the device counts its steps there, and any other one on the host.
    counts_on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainable.items():
        optimizer.state[parameter] = {
            key: _placed(value, parameter, key != "step" or counts_on_device[id(parameter)])
            for key, value in state[name].items()
        }


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimizer's class."""
    return type(optimizer).__name__


def _placed(value: Tensor, parameter: nn.Parameter, on_device: bool) -> Tensor:
    """Return a copy of a tensor from a file, with its parameter's strides where it has the parameter's shape.

    A file keeps no strides, and fused optimizers pair the memory of parameter and state, not their elements.

    Args:
        value: tensor of the state, contiguous on the CPU.
        parameter: parameter that it belongs to.
        on_device: place it on the parameter's device; else on the CPU.
    """
    device = parameter.device if on_device else torch.device("cpu")
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
    return value.to(device, copy=True)
