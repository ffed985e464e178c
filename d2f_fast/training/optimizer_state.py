"""Turn the state of an optimizer into tensors and JSON, and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2f_fast.errors import CheckpointError


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested state into tensors and a JSON tree that names them, both exact.

    Args:
        state: dicts (keys str, int, float, bool, None or tuples of them), lists, tuples, tensors, str, int, float,
            bool, None, nested. A dict's subclass comes back as a dict.

    Returns:
        Tensors by their path in `state`, for `write_tensors`, and what `write_json` takes.

    Raises:
        TypeError: `state` holds something else.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state, "state", tensors)


def unpack_state(tensors: Mapping[str, Tensor], state_json: Any) -> Any:
    """Build what `pack_state` took, its tensors as copies on the CPU.

    Raises:
        CheckpointError: `state_json` is not from `pack_state`, or names a tensor that is not in `tensors`.
    """
    try:
        return _unpack(state_json, tensors)
    except KeyError as error:
        raise CheckpointError(f"training state: {error.args[0]} is missing; resume from another checkpoint") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"training state: not understood ({error}); resume from another checkpoint") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Split an optimizer's state into tensors and a JSON tree, both exact, as `pack_state` does."""
    return pack_state(
        {"type": type(optimizer).__name__, "shapes": _shapes(optimizer), "optimizer": optimizer.state_dict()}
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state_json: Any) -> None:
    """Load what `pack_optimizer` took into an optimizer of the same kind over the same parameters.

    Raises:
        CheckpointError: the state is damaged, or from another kind of optimizer, other groups or other shapes.
    """
    packed = unpack_state(tensors, state_json)
    cure = "resume with the settings that the checkpoint was made with"
    if not isinstance(packed, dict) or packed.keys() != {"type", "shapes", "optimizer"}:
        raise CheckpointError("optimizer state: not an optimizer's; resume from another checkpoint")
    if packed["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"optimizer state: of {packed['type']}, the optimizer is {type(optimizer).__name__}; {cure}"
        )
    if packed["shapes"] != _shapes(optimizer):
        raise CheckpointError(f"optimizer state: its parameters have other groups, numbers or shapes; {cure}")
    state = packed["optimizer"]
    try:
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for key in saved:  # a learning rate that lives on the device must come back there
                if isinstance(saved[key], Tensor) and isinstance(group.get(key), Tensor):
                    saved[key] = saved[key].to(group[key].device)
        optimizer.load_state_dict(state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, exact in state["state"].items():
            # load_state_dict puts each tensor on its device, but rounds it to its parameter's dtype.
            parameter = parameters[index]
            restored = _restore_dtype(optimizer.state[parameter], exact)
            optimizer.state[parameter] = {name: _laid_out(value, parameter) for name, value in restored.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"optimizer state: does not fit ({error!r}); {cure}") from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn `value` into JSON; what JSON has no form for becomes an object with one key that starts with "$"."""
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors are named {name}: keys must differ as text")
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, float):  # Python prints floats so that they are read back bit for bit
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        items = {key: _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in items):
            return items
        return {"$dict": [[_pack(key, f"{name}.key", tensors), item] for key, item in items.items()]}
    if type(value) in (list, tuple):
        packed = [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return packed if type(value) is list else {"$tuple": packed}
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint does not store")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if len(value) == 1 and tag == "$tensor":
        return tensors[value[tag]].clone()  # a copy: the file stays mapped, and state is updated in place
    if len(value) == 1 and tag == "$float":
        return float(value[tag])
    if len(value) == 1 and tag == "$tuple":
        return tuple(_unpack(item, tensors) for item in value[tag])
    if len(value) == 1 and tag == "$dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value[tag]}
    raise ValueError(f"unknown tag {tag}")


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """List the parameters' shapes, group by group."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A state tensor with its parameter's strides: a file has none, and fused optimizers pair memory, not elements."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _restore_dtype(loaded: Any, exact: Any) -> Any:
    """Take values from `exact`, and the devices of its tensors from `loaded`."""
    if isinstance(exact, Tensor):
        return loaded if loaded.dtype == exact.dtype else exact.to(loaded.device)
    if isinstance(exact, dict):
        return {key: _restore_dtype(loaded[key], item) for key, item in exact.items()}
    if isinstance(exact, list | tuple):
        return type(exact)(_restore_dtype(*pair) for pair in zip(loaded, exact, strict=True))
    return exact
