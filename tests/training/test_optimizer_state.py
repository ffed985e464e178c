"""The state of an optimizer comes back bit for bit, and the state of another one is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.training.optimizer_state import optimizer_tensors, read_optimizer, write_optimizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "AdamW amsgrad, lr a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), amsgrad=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_continues_bit_equal_from_the_file(
    tmp_path: Path, assert_equal: Any, kind: str, dtype: torch.dtype
) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model(dtype)
        parameters = list(model.parameters())
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:]}]
        return model, OPTIMIZERS[kind](groups)

    model, optimizer = make()
    train(model, optimizer, range(0, 3))
    path, weights = tmp_path / "optimizer.safetensors", copy.deepcopy(model.state_dict())
    named = dict(model.named_parameters())
    write_optimizer(path, optimizer, named)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, named).items()}
    dtypes = {name: tensor.dtype for name, tensor in saved.items()}
    train(model, optimizer, range(3, 6))

    resumed, other = make()
    resumed.load_state_dict(weights)
    read_optimizer(path, other, dict(resumed.named_parameters()))
    loaded = optimizer_tensors(other, dict(resumed.named_parameters()))
    assert_equal(loaded, saved)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == dtypes
    train(resumed, other, range(3, 6))
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(optimizer_tensors(other, dict(resumed.named_parameters())), optimizer_tensors(optimizer, named))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_file_holds_flat_tensors_by_parameter_and_key(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    write_optimizer(tmp_path / "a.safetensors", optimizer, dict(model.named_parameters()))
    tensors, header = read_tensors(tmp_path / "a.safetensors")
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert tensors.keys() == {f"{name}.{key}" for name, _ in model.named_parameters() for key in keys}
    assert header == {"format": "1", "optimizer": "AdamW"}


def test_state_has_the_strides_of_its_parameter(tmp_path: Path) -> None:
    def make() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        return {"kernel": parameter}, torch.optim.AdamW([parameter], fused=True)

    (parameters, optimizer), (others, other) = make(), make()
    parameters["kernel"].grad = torch.randn_like(parameters["kernel"])
    optimizer.step()
    write_optimizer(tmp_path / "a.safetensors", optimizer, parameters)
    read_optimizer(tmp_path / "a.safetensors", other, others)
    for key in ("exp_avg", "exp_avg_sq"):
        loaded, saved = other.state[others["kernel"]][key], optimizer.state[parameters["kernel"]][key]
        assert loaded.stride() == saved.stride() == parameters["kernel"].stride()
        assert torch.equal(loaded, saved)


MISFITS: dict[str, str] = {
    "another optimizer": "holds the state of AdamW, and the optimizer is SGD: resume with",
    "another name": r"holds b\.exp_avg, and no parameter has this name: resume with",
    "another shape": r"holds a\.exp_avg of shape \[2, 3\], and it needs \[2, 4\]: resume with",
    "counter with a shape": r"holds a\.step of shape \[1\], and it needs \[\]: resume with",
    "a missing tensor": "lacks a part of the state of b: resume with",
    "another file": "holds no optimizer state of format 1: resume from another checkpoint",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_state_of_another_optimizer_is_refused_and_changes_nothing(tmp_path: Path, misfit: str) -> None:
    def parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
        return dict(zip("abc", (nn.Parameter(torch.zeros(shape)) for shape in shapes), strict=False))

    def optimizer_of(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(parameters.values())
        optimizer.step()
        return optimizer

    path, saved = tmp_path / "optimizer.safetensors", parameters((2, 3), (3,))
    write_optimizer(path, optimizer_of(saved), saved)
    tensors, header = read_tensors(path)
    trainable = parameters((2, 4) if misfit == "another shape" else (2, 3), (3,))
    if misfit == "another name":
        del trainable["b"]
    elif misfit == "counter with a shape":
        write_tensors(path, tensors | {"a.step": torch.ones(1)}, header)
    elif misfit == "a missing tensor":
        del tensors["b.exp_avg"]
        write_tensors(path, tensors, header)
    elif misfit == "another file":
        write_tensors(path, tensors)
    optimizer = torch.optim.SGD(trainable.values()) if misfit == "another optimizer" else optimizer_of(trainable)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors {MISFITS[misfit]}") as caught:
        read_optimizer(path, optimizer, trainable)
    assert "\n" not in str(caught.value)
    assert str(optimizer.state_dict()) == str(before)


def test_state_other_than_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([parameter])
    optimizer.state[parameter]["n_iter"] = 3
    with pytest.raises(TypeError, match=r"^weight\.n_iter of LBFGS is a int, and only tensors are kept$"):
        write_optimizer(tmp_path / "a.safetensors", optimizer, {"weight": parameter})
    assert not (tmp_path / "a.safetensors").exists()
