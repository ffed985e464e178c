"""The moving average, against diffusers' EMAModel; bit-exact where it must not change anything."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.training import ema as ema_module
from d2f_fast.training.ema import EMA


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    """Make a vector, a channels-last kernel, a scalar, and a matrix of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bias": torch.randn(64, generator=generator),
        "kernel": torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "scale": torch.randn((), generator=generator),
        "odd": torch.randn(7, 13, generator=generator),
    }
    return {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}


@torch.no_grad()
def train_step(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for parameter in parameters.values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.detach().reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_average_equals_that_of_diffusers(decay: float) -> None:
    parameters = make_parameters()
    ema, oracle = EMA(parameters, decay=decay), EMAModel(parameters.values(), decay=decay)
    for step in range(150):  # decay 0.9 is reached at step 81
        train_step(parameters, step)
        ema.step()
        oracle.step(parameters.values())
        for ours, theirs in zip(ema.shadow.values(), oracle.shadow_params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    rms = [(o - t).square().mean().sqrt() for o, t in zip(ema.shadow.values(), oracle.shadow_params, strict=True)]
    assert max(rms) <= 1e-7


def test_average_of_few_parameters_at_a_time_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    averages = []
    for most in (2**26, 100):
        monkeypatch.setattr(ema_module, "MOST_ELEMENTS", most)
        parameters = make_parameters()
        ema = EMA(parameters)
        for step in range(3):
            train_step(parameters, step)
            ema.step(skip=torch.tensor(step == 1))
        averages.append(bits(ema.state_dict()))
        assert [sum(ema.shadow[name].numel() for name in names) for names in ema._groups] == (
            [444] if most > 444 else [64, 288, 92]
        )
    assert averages[0] == averages[1]


def test_late_weight_is_exact_where_one_minus_decay_in_float32_is_not() -> None:
    parameters = {"weight": torch.nn.Parameter(torch.zeros(()))}
    ema = EMA(parameters, decay=0.9999)
    ema.load_state_dict({"shadow.weight": torch.tensor(0.0), "updates": torch.tensor(10**6)})
    with torch.no_grad():
        parameters["weight"].fill_(1.0)
    ema.step()
    assert ema.shadow["weight"].item() == pytest.approx(1e-4, rel=1e-6)  # 1 - float32(0.9999) is 1.7e-4 off


def test_without_warmup_the_average_has_its_closed_form() -> None:
    parameters = {"weight": torch.nn.Parameter(torch.tensor(0.0))}
    ema = EMA(parameters, decay=0.9, warmup=False)
    with torch.no_grad():
        parameters["weight"].fill_(1.0)
    for k in range(1, 30):
        ema.step()
        assert ema.shadow["weight"].item() == pytest.approx(1 - 0.9**k, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_averaged_in_float32(dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    ema = EMA(parameters, decay=0.999, warmup=False)
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for step in range(20):
        train_step(parameters, step)
        ema.step()
        for name, parameter in parameters.items():
            expected[name] += (1 - 0.999) * (parameter.detach().double() - expected[name])
    for name, shadow in ema.shadow.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor(1.0), torch.tensor(3.0)], ids=str)
def test_skipped_step_changes_no_bit_even_with_nan_parameters(skip: torch.Tensor) -> None:
    parameters = make_parameters()
    with torch.no_grad():
        parameters["bias"][:8] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 1e-45, -1e-45, 3.0, -3.0])
    ema = EMA(parameters)
    before = bits(ema.state_dict())
    with torch.no_grad():
        parameters["bias"][:8] = torch.tensor([1.0, -1.0, math.nan, math.inf, -math.inf, 1e38, math.nan, -1e38])
        parameters["odd"].fill_(math.nan)
    ema.step(skip=skip)
    assert bits(ema.state_dict()) == before


@pytest.mark.parametrize("skip", [torch.tensor(False), torch.tensor(0.0)], ids=str)
def test_step_not_skipped_equals_a_step_without_the_option(skip: torch.Tensor) -> None:
    parameters = make_parameters()
    ema, plain = EMA(parameters), EMA(parameters)
    for step in range(3):
        train_step(parameters, step)
        ema.step(skip=skip)
        plain.step()
    assert bits(ema.state_dict()) == bits(plain.state_dict())


def test_skipped_steps_leave_the_warmup_where_it_was() -> None:
    parameters = make_parameters()
    ema, plain = EMA(parameters), EMA(parameters)
    for step in range(6):
        train_step(parameters, step)
        skipped = step % 2 == 1
        ema.step(skip=torch.tensor(skipped))
        if not skipped:
            plain.step()
    assert bits(ema.state_dict()) == bits(plain.state_dict())


def test_step_reads_nothing_back_to_the_host() -> None:
    with FakeTensorMode():  # tensors without values: any read of one raises
        parameters = {"weight": torch.nn.Parameter(torch.empty(3, 4)), "bias": torch.nn.Parameter(torch.empty(4))}
        ema = EMA(parameters)
        with pytest.raises(DataDependentOutputException):
            bool(ema.shadow["bias"].sum() > 0)
        ema.step()
        ema.step(skip=torch.empty((), dtype=torch.bool))


def test_compiled_step_follows_the_warmup_without_recompiling() -> None:
    parameters = make_parameters()
    ema, plain = EMA(parameters, decay=0.3), EMA(parameters, decay=0.3)
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(ema.step, backend=count_graphs, fullgraph=True)
    for step in range(8):
        train_step(parameters, step)
        skip = torch.tensor(step == 4)
        compiled(skip)
        plain.step(skip)
    assert graphs == 1
    for name, shadow in ema.shadow.items():
        torch.testing.assert_close(shadow, plain.shadow[name], rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_captured_step_follows_the_warmup_and_skips() -> None:
    parameters = {name: torch.nn.Parameter(p.detach().cuda()) for name, p in make_parameters().items()}
    ema, plain = EMA(parameters, decay=0.3), EMA(parameters, decay=0.3)
    skip = torch.zeros((), dtype=torch.bool, device="cuda")
    start = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ema.step(skip)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.step(skip)
    ema.load_state_dict(start)
    for step in range(8):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1 * step)
        skip.fill_(step == 4)
        graph.replay()
        plain.step(skip)
    assert bits(ema.state_dict()) == bits(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_shows_the_average_and_gives_the_trained_weights_back(dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    ema = EMA(parameters)
    for step in range(3):
        train_step(parameters, step)
        ema.step()
    trained = bits(parameters)
    addresses = [parameter.data_ptr() for parameter in parameters.values()]

    with ema.swapped():
        for name, parameter in parameters.items():
            assert torch.equal(parameter, ema.shadow[name].to(dtype))
            assert parameter.requires_grad
        assert bits(parameters) != trained
        assert torch.is_grad_enabled()
    assert bits(parameters) == trained

    with pytest.raises(RuntimeError, match="sampling failed"), ema.swapped():
        raise RuntimeError("sampling failed")
    assert bits(parameters) == trained
    assert [parameter.data_ptr() for parameter in parameters.values()] == addresses


def test_average_goes_on_bit_equal_after_a_save_and_a_load(tmp_path: Path) -> None:
    parameters = make_parameters()
    ema = EMA(parameters)
    for step in range(3):
        train_step(parameters, step)
        ema.step()
    write_tensors(tmp_path / "ema.safetensors", ema.state_dict())
    resumed = EMA(parameters)
    addresses = [tensor.data_ptr() for tensor in resumed.state_dict().values()]
    resumed.load_state_dict(read_tensors(tmp_path / "ema.safetensors")[0])
    assert bits(resumed.state_dict()) == bits(ema.state_dict())
    assert [tensor.data_ptr() for tensor in resumed.state_dict().values()] == addresses
    for step in range(3, 6):
        train_step(parameters, step)
        ema.step()
        resumed.step()
    assert bits(resumed.state_dict()) == bits(ema.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shadow.bias": None}, r"shadow\.bias is missing"),
        ({"updates": None}, "updates is missing"),
        ({"shadow.more": torch.ones(1)}, r"shadow\.more is unknown"),
        ({"shadow.odd": torch.ones(13, 7)}, r"shadow\.odd has shape \[13, 7\], not \[7, 13\]"),
    ],
)
def test_state_of_other_parameters_is_refused_and_changes_nothing(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    ema = EMA(make_parameters())
    before = bits(ema.state_dict())
    state = {name: tensor + 1 for name, tensor in ema.state_dict().items()} | change
    with pytest.raises(CheckpointError, match=f"^EMA state: {message}; resume with the settings"):
        ema.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
    assert bits(ema.state_dict()) == before


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        EMA(make_parameters(), decay=decay)


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters to average"):
        EMA({})
