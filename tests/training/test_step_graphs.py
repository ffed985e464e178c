"""Captured steps. Without a GPU a recorder stands for torch.cuda's graphs: it notes every operation that torch
dispatches while a step is captured, and runs exactly those again, on the same tensors, at each replay."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from d2f_fast.training.step_graphs import StepGraphs
from d2f_fast.training.trainer import AlignedTrainer


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


class RecordedGraph:
    """Stand in for torch.cuda.CUDAGraph on a CPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    @torch.no_grad()
    def replay(self) -> None:
        Recording.events.append("replay")
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, tensors_of(function(*args, **kwargs)), strict=True):
                if address(old) != address(new):  # else a view, or an operation in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Stand in for torch.cuda.graph on a CPU: recorded operations take effect at a replay, and a host sync fails."""

    events: list[str]

    def __init__(self, graph: RecordedGraph, pool: Any, capture_error_mode: str) -> None:
        super().__init__()
        self.graph, self.made, self.before = graph, dict[int, Tensor](), list[tuple[Any, Any]]()
        self.events.append(f"capture into pool {pool}, {capture_error_mode}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(function)
        if any(banned in name for banned in ("_local_scalar_dense", "is_nonzero", "aten.equal", "rand", "dropout")):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if function._schema.is_mutable:
            for tensor in tensors_of((args, kwargs)):
                if address(tensor) not in self.made:
                    storage = tensor.untyped_storage()
                    self.before.append((storage, storage.clone()))
        given = {address(tensor) for tensor in tensors_of((args, kwargs))}
        result = function(*args, **kwargs)
        outputs = tensors_of(result)
        self.made |= {address(tensor): tensor for tensor in outputs if address(tensor) not in given}
        if not name.startswith("profiler"):
            self.graph.calls.append((function, args, kwargs, outputs))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, before in reversed(self.before):
            storage.copy_(before)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))


class Stream:
    """Stand in for torch.cuda.Stream on a CPU."""

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        Recording.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the graphs of torch.cuda by the recorder, and return the list of its events."""
    Recording.events = []
    pools = iter("ABCDEF")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        Recording.events.append(f"on {stream.name}")
        yield
        Recording.events.append("on main")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return Recording.events


# StepGraphs alone


class Inputs(NamedTuple):
    values: Tensor
    more: dict[str, Tensor]
    constant: int = 1


class Sum:
    """Step that adds its inputs to a total."""

    def __init__(self) -> None:
        self.total, self.runs, self.addresses = torch.zeros(3), 0, set[int]()

    def run(self, inputs: Inputs) -> Tensor:
        self.runs += 1
        self.addresses.add(address(inputs.values))
        self.total += inputs.constant * (inputs.values.sum(0) + inputs.more["bias"])
        return self.total.sum() * 1

    def warm_up(self, inputs: Inputs) -> None:
        Recording.events.append("warm-up")
        self.addresses.add(address(inputs.values))


def test_capture_follows_the_recipe(events: list[str]) -> None:
    step = Sum()
    graphs = StepGraphs(step.run, step.warm_up)
    graphs(Inputs(torch.ones(2, 3), {"bias": torch.ones(3)}))
    expected = ["side waits for main", "on side", *["warm-up"] * 3, "on main", "main waits for side"]
    assert events == [*expected, "capture into pool A, thread_local", "replay"]
    events.clear()
    graphs(Inputs(torch.ones(2, 3), {"bias": torch.ones(3)}))
    assert events == ["replay"]
    events.clear()
    graphs(Inputs(torch.ones(1, 3), {"bias": torch.ones(3)}))
    assert events == [*expected, "capture into pool A, thread_local", "replay"]  # one pool for all
    assert step.runs == 2 and len(graphs) == 2


def test_replay_reads_its_own_inputs_and_its_loss_is_not_overwritten(events: list[str]) -> None:
    step, seen = Sum(), []
    graphs = StepGraphs(step.run, step.warm_up)
    total = torch.zeros(3)
    for size in (2, 5, 2, 2, 5):
        inputs = Inputs(torch.randn(size, 3).t().contiguous().t(), {"bias": torch.randn(3)})
        total = total + inputs.values.sum(0) + inputs.more["bias"]
        seen.append((graphs(inputs), total.sum()))
        torch.testing.assert_close(step.total, total)
    for got, expected in seen:
        torch.testing.assert_close(got, expected)
    assert len(step.addresses) == 2 and events.count("replay") == 5


def test_shapes_beyond_the_first_four_run_uncaptured(events: list[str], caplog: pytest.LogCaptureFixture) -> None:
    step, expected = Sum(), torch.zeros(3)
    graphs = StepGraphs(step.run, step.warm_up)
    for size in (1, 2, 3, 4, 5, 6, 5, 1):
        inputs = Inputs(torch.full((size, 3), 2.0), {"bias": torch.ones(3)})
        expected += 2.0 * size + 1
        assert graphs(inputs) == expected.sum()
    assert len(graphs) == 4 and step.runs == 4 + 3 and events.count("replay") == 5
    assert [r.message for r in caplog.records] == ["more than 4 shapes: steps of further shapes run uncaptured"]


@pytest.mark.parametrize(
    "other",
    [
        Inputs(torch.ones(2, 3), {"bias": torch.ones(3)}, constant=2),
        Inputs(torch.ones(2, 3), {"bias": torch.ones(1)}),
        Inputs(torch.ones(2, 3).double(), {"bias": torch.ones(3)}),
        Inputs(torch.ones(2, 3), {"more": torch.zeros(3), "bias": torch.ones(3)}),
    ],
    ids=["constant", "shape", "type", "names"],
)
def test_inputs_of_another_kind_get_another_graph(events: list[str], other: Inputs) -> None:
    step = Sum()
    graphs = StepGraphs(step.run, step.warm_up)
    graphs(Inputs(torch.ones(2, 3), {"bias": torch.ones(3)}))
    graphs(other)
    assert len(graphs) == 2
    assert step.total.tolist() == [3.0 + 3.0 * other.constant] * 3


def test_every_shape_is_captured_again_after_clear(events: list[str]) -> None:
    step = Sum()
    graphs = StepGraphs(step.run, step.warm_up)
    inputs = Inputs(torch.ones(2, 3), {"bias": torch.ones(3)})
    graphs(inputs)
    step.total = torch.zeros(3)  # replaced: the graph still adds to the old one
    graphs.clear()
    graphs(inputs)
    assert step.total.tolist() == [3.0] * 3 and "capture into pool B, thread_local" in events


def test_recorder_refuses_the_operations_that_a_capture_refuses(events: list[str]) -> None:
    for run in (lambda inputs: inputs.values.sum() * inputs.values[0, 0].item(), lambda inputs: torch.rand(1)):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            StepGraphs(run, lambda inputs: None)(Inputs(torch.ones(2, 3), {}))


# The training step, captured


@pytest.fixture
def make_exact(make_trainer: Callable[..., AlignedTrainer]) -> Callable[..., AlignedTrainer]:
    """Return a function that makes trainers whose learning rates are exact in float32, as a device holds them."""
    return partial(make_trainer, learning_rate=2**-7)


@pytest.fixture
def full_state_of(state_of: Callable[[AlignedTrainer], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return a function that copies everything that a step may change, the counters of skipped steps included."""

    def state(trainer: AlignedTrainer) -> dict[str, Tensor]:
        step = trainer._training_step
        counters = {"skipped": step.skipped.clone(), "skipped in a row": step.skipped_in_a_row.clone()}
        return state_of(trainer) | counters

    return state


def captured(trainer: AlignedTrainer) -> AlignedTrainer:
    """Let a trainer on the CPU capture its steps, as one on a GPU does with --cuda_graph."""
    step = trainer._training_step
    step._lr = torch.tensor(trainer.config.learning_rate)
    step.graphs = StepGraphs(step.run, step.warm_up)
    for group in trainer.optimizer.param_groups:
        group |= {"lr": step._lr, "capturable": True}
    return trainer


RUNS: dict[str, dict[str, Any]] = {
    "lora": {"caption_dropout": 0.3},
    "accumulation, warm-up of the learning rate": {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 4,
    },
    "full, no average": {"adapter": "full", "ema_decay": 0.0},
    "half precision, checkpointed": {"mixed_precision": "bf16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("run", RUNS)
def test_captured_run_is_bit_equal_to_the_eager_one(
    make_batch: Any, full_state_of: Any, assert_equal: Any, events: list[str], make_exact: Any, run: str
) -> None:
    eager, graphed = make_exact(**RUNS[run]), captured(make_exact(**RUNS[run]))
    bad = make_batch(4, 2)
    bad["latents"][1] = float("nan")
    mask = torch.rand(3, 1, 8, 8)
    batches = [
        make_batch(4),
        make_batch(4, 1),
        bad,
        make_batch(3, 3, mask=mask),
        make_batch(4, 4),
        make_batch(3, 5, mask=1 - mask),
    ]
    for number, given in enumerate(batches):
        want, got = eager.step(given), graphed.step(given)
        assert torch.equal(got, want) or number == 2
        assert_equal(full_state_of(graphed), full_state_of(eager))
        with graphed.averaged():  # between steps the weights go out and in
            pass
    assert len(graphed._training_step.graphs) == 2 and events.count("replay") == len(batches)
    assert int(graphed._training_step.skipped) == 1


@pytest.fixture
def make_with_lpips(
    make_one_level_trainer: Callable[..., AlignedTrainer], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AlignedTrainer]:
    """Return a function that makes trainers with a checkpointed decoder, and a stand-in for LPIPS in their loss."""

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.features = nn.Conv2d(3, 4, 3)

        def forward(self, in0: Tensor, in1: Tensor) -> Tensor:
            return (self.features(in0) - self.features(in1)).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr("d2f_fast.training.perceptual._load_network", lambda config: Distance())
    monkeypatch.setattr("d2f_fast.training.launch._LPIPS_PACKAGES", ())
    options = {"distill": True, "lpips_weight": 0.5, "gradient_checkpointing": True, "caption_dropout": 0.0}
    return partial(make_one_level_trainer, learning_rate=2**-7, **options)


@pytest.fixture
def check_lpips(make_batch: Any, full_state_of: Any, assert_equal: Any) -> Callable[..., None]:
    """Return a function that asserts that two trainers take equal steps, bit for bit, with equal parts of the loss."""

    def check(graphed: AlignedTrainer, plain: AlignedTrainer) -> None:
        for number in range(3):
            given = make_batch(4, number, noise=torch.randn(4, 4, 8, 8))
            assert torch.equal(graphed.step(given), plain.step(given))
            parts = plain._training_step.parts()
            assert graphed._training_step.parts() == parts and min(parts.values()) > 0
            assert_equal(full_state_of(graphed), full_state_of(plain))
        assert len(graphed._training_step.graphs) == 1

    return check


def test_captured_steps_with_lpips_are_bit_equal_to_the_eager_ones(
    make_with_lpips: Any, check_lpips: Any, events: list[str]
) -> None:
    check_lpips(captured(make_with_lpips()), make_with_lpips())
    assert events.count("replay") == 3


def test_warm_up_changes_nothing(
    make_batch: Any, next_inputs: Any, full_state_of: Any, assert_equal: Any, make_exact: Any
) -> None:
    trainer = make_exact(adam_weight_decay=0.5)
    for given in (
        make_batch(4),
        make_batch(4, mask=torch.zeros(4, 1, 8, 8)),
    ):  # the loss of an empty mask is 0, which is finite
        trainer.step(make_batch(4))
        before = full_state_of(trainer)
        trainer._training_step.warm_up(next_inputs(trainer, given))
        assert_equal(full_state_of(trainer), before)
        assert all(parameter.grad is None for parameter in trainer.trainable.values())
    fresh = make_exact()
    fresh._training_step.warm_up(next_inputs(fresh, make_batch(4)))
    fresh.step(make_batch(4))
    other = make_exact()
    other.step(make_batch(4))
    assert_equal(full_state_of(fresh), full_state_of(other))


def test_slices_of_other_global_batches_and_empty_slices(
    make_batch: Any, full_state_of: Any, assert_equal: Any, events: list[str], make_exact: Any
) -> None:
    eager, graphed = make_exact(), captured(make_exact())
    empty = make_batch(0, encoder_hidden_states=torch.empty(0, 1, 16))
    slices = [
        make_batch(2, offset=0, global_batch_size=4),
        make_batch(2, offset=0, global_batch_size=3),
        make_batch(2, offset=2, global_batch_size=4),
        {**empty, "offset": 1, "global_batch_size": 1},
    ]
    for one in slices:
        assert torch.equal(graphed.step(one), eager.step(one))
        assert_equal(full_state_of(graphed), full_state_of(eager))
    assert len(graphed._training_step.graphs) == 2 and events.count("replay") == 3


def test_several_processes_capture_only_steps_that_all_of_them_capture(
    make_batch: Any, events: list[str], make_exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = captured(make_exact(caption_dropout=0.0))
    trainer._training_step._num_processes = 4
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    for size, whole in ((3, 12), (3, 10), (2, 10), (1, 1), (2, 8)):  # 10 are 3, 3, 2 and 2
        trainer.step(make_batch(size, global_batch_size=whole))
    assert len(trainer._training_step.graphs) == 2 and events.count("replay") == 2


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_resumed_run_is_captured_again(
    make_batch: Any, full_state_of: Any, assert_equal: Any, events: list[str], make_exact: Any, name: str
) -> None:
    schedule = {"lr_scheduler": name, "max_train_steps": 4}
    straight = captured(make_exact("straight", **schedule))
    for number in range(4):
        if number == 2:
            straight._save_checkpoint()
        straight.step(make_batch(4, number))
    resumed = captured(make_exact("straight", **schedule, resume_from_checkpoint="latest"))
    resumed.step(make_batch(4, 9))  # captured with the state that the checkpoint then replaces
    resumed._resume()
    for number in (2, 3):
        resumed.step(make_batch(4, number))
    assert_equal(full_state_of(resumed), full_state_of(straight))


@pytest.mark.parametrize("name", ["constant", "linear"])
def test_captured_run_continues_uncaptured_and_captured_again(
    make_batch: Any, full_state_of: Any, assert_equal: Any, events: list[str], make_exact: Any, name: str
) -> None:
    schedule = {"lr_scheduler": name, "max_train_steps": 4}  # linear: whole quarters, exact in float32
    straight = make_exact("straight", **schedule)
    for number in range(4):
        straight.step(make_batch(4, number))
    first = captured(make_exact("run", **schedule))
    for number in range(2):
        first.step(make_batch(4, number))
    first._save_checkpoint()
    second = make_exact("run", **schedule, resume_from_checkpoint="latest")  # as on another device: its lr is a number
    second._resume()
    assert [(group["lr"], group["capturable"]) for group in second.optimizer.param_groups] == [(2**-7, False)]
    second.step(make_batch(4, 2))
    second._save_checkpoint()
    third = captured(make_exact("run", **schedule, resume_from_checkpoint="latest"))
    third._resume()
    third.step(make_batch(4, 3))
    assert_equal(full_state_of(third), full_state_of(straight))


# On a GPU


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Use algorithms that sum in one order, and only warn about cuBLAS, which does so on one stream.

    Attention uses plain products: the backward passes of the other kernels add in any order, and a warning does not
    stop them. Code is compiled for fixed sizes: a trainer that met a second size uncaptured would use code for every
    size also at the first one, while the graph replays the code for that size alone.
    """
    torch.compiler.reset()  # the trainers of other tests count towards the recompile limit
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    with sdpa_kernel(SDPBackend.MATH), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "full", "regional"])
@pytest.mark.parametrize("run", RUNS)
def test_replay_on_a_gpu_is_bit_equal_to_the_uncaptured_step(
    make_batch: Any,
    full_state_of: Any,
    assert_equal: Any,
    deterministic: None,
    make_exact: Any,
    run: str,
    compile: str,
) -> None:
    plain, graphed = (
        make_exact(compile=compile, **RUNS[run]),
        make_exact(compile=compile, cuda_graph=True, **RUNS[run]),
    )
    bad = make_batch(4, 2)
    bad["latents"][1] = float("nan")
    batches = [make_batch(4), make_batch(4, 1), bad, make_batch(3, 3), make_batch(4, 4), make_batch(3, 5)]
    for number, given in enumerate(batches):
        want, got = plain.step(given), graphed.step(given)
        assert torch.equal(got, want) or number == 2
        assert_equal(full_state_of(graphed), full_state_of(plain))
    assert len(graphed._training_step.graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "full", "regional"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_step_on_a_gpu_does_not_wait_for_it(make_batch: Any, make_exact: Any, cuda_graph: bool, compile: str) -> None:
    torch.compiler.reset()
    trainer = make_exact(cuda_graph=cuda_graph, compile=compile, caption_dropout=0.3, mixed_precision="bf16")
    for number in range(2):  # compiling, choosing among kernels and capturing wait
        trainer.step(make_batch(4, number))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            trainer.step(make_batch(4, number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step(make_batch(4)).isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "full", "regional"])
def test_replay_with_lpips_on_a_gpu_is_bit_equal_and_does_not_wait(
    make_batch: Any, make_with_lpips: Any, check_lpips: Any, deterministic: None, compile: str
) -> None:
    graphed, plain = make_with_lpips(compile=compile, cuda_graph=True), make_with_lpips(compile=compile)
    check_lpips(graphed, plain)
    given = make_batch(4, noise=torch.randn(4, 4, 8, 8))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [trainer.step(given) for trainer in (graphed, plain)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*losses)


@pytest.mark.gpu
def test_100_captured_runs_on_a_gpu_are_bitwise_equal(
    make_batch: Any, full_state_of: Any, assert_equal: Any, deterministic: None, make_exact: Any
) -> None:
    trainer = make_exact(cuda_graph=True, mixed_precision="bf16", ema_decay=0.0)
    start = {name: parameter.detach().clone() for name, parameter in trainer.trainable.items()}
    trainer.step(make_batch(4))
    results = []
    for _ in range(100):
        trainer.global_step = 0
        with torch.no_grad():
            for name, parameter in trainer.trainable.items():
                parameter.copy_(start[name])
                for value in trainer.optimizer.state[parameter].values():
                    value.zero_()
        trainer.step(make_batch(4))
        results.append(full_state_of(trainer))
    for result in results[1:]:
        assert_equal(result, results[0])
