"""Captured steps. Without a GPU a recorder stands for torch.cuda's graphs: it notes every operation that torch
dispatches while a step is captured, and runs exactly those again, on the same tensors, at each replay."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from d2f_fast.config import TrainingConfig
from d2f_fast.training.optimizer_state import pack_optimizer
from d2f_fast.training.step_graphs import StepGraphs
from d2f_fast.training.trainer import AlignedTrainer


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


class RecordedGraph:
    """torch.cuda.CUDAGraph on a CPU."""

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
    """torch.cuda.graph on a CPU: what it records takes no effect before a replay; a host sync fails, as there."""

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
    """torch.cuda.Stream on a CPU."""

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        Recording.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the recorder in torch.cuda's place; what it is asked for, in order."""
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
    """A step: adds its inputs to what it has."""

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


def test_the_recipe_of_a_capture(events: list[str]) -> None:
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


def test_each_replay_reads_the_inputs_it_is_given_and_its_loss_stays(events: list[str]) -> None:
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


def test_at_most_four_shapes_are_captured_and_further_ones_run(
    events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
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
def test_what_a_graph_is_fixed_to_takes_another_graph(events: list[str], other: Inputs) -> None:
    step = Sum()
    graphs = StepGraphs(step.run, step.warm_up)
    graphs(Inputs(torch.ones(2, 3), {"bias": torch.ones(3)}))
    graphs(other)
    assert len(graphs) == 2
    assert step.total.tolist() == [3.0 + 3.0 * other.constant] * 3


def test_after_clear_every_shape_is_captured_anew(events: list[str]) -> None:
    step = Sum()
    graphs = StepGraphs(step.run, step.warm_up)
    inputs = Inputs(torch.ones(2, 3), {"bias": torch.ones(3)})
    graphs(inputs)
    step.total = torch.zeros(3)  # replaced: the graph still adds to the old one
    graphs.clear()
    graphs(inputs)
    assert step.total.tolist() == [3.0] * 3 and "capture into pool B, thread_local" in events


def test_the_recorder_refuses_what_a_capture_refuses(events: list[str]) -> None:
    for run in (lambda inputs: inputs.values.sum() * inputs.values[0, 0].item(), lambda inputs: torch.rand(1)):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            StepGraphs(run, lambda inputs: None)(Inputs(torch.ones(2, 3), {}))


# The training step, captured

TARGETS = ("to_q", "to_out.0", "ff.net.2")


def batch(size: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + seed)
    tensors = {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(size, 8, 16, generator=generator),
    }
    return {**tensors, **changes}


def state(trainer: AlignedTrainer) -> dict[str, Tensor]:
    """Copies of everything that a step may change."""
    tensors = {f"trainable.{name}": parameter.detach() for name, parameter in trainer.trainable.items()}
    tensors |= trainer.ema.state_dict() if trainer.ema else {}
    tensors |= {name: tensor for name, tensor in pack_optimizer(trainer.optimizer)[0].items() if "lr" not in name}
    step = trainer._training_step
    tensors |= {"skipped": step.skipped, "in a row": step.skipped_in_a_row}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., AlignedTrainer]:
    """Make a trainer of the tiny model; its learning rates are exact in float32, as a device holds them."""

    def trainer(output: str = "run", **options: Any) -> AlignedTrainer:
        defaults = {"resolution": 16, "rank": 2, "target_modules": TARGETS, "learning_rate": 2**-7}
        config = TrainingConfig(output_dir=str(tmp_path / output), **{**defaults, **options})
        return AlignedTrainer.from_pretrained(tiny_folder, config)

    return trainer


def captured(trainer: AlignedTrainer) -> AlignedTrainer:
    """Give a trainer on the CPU what one on a GPU has with --cuda_graph."""
    step = trainer._training_step
    step._lr = torch.tensor(trainer.config.learning_rate)
    step.graphs = StepGraphs(step.run, step._run_dry)
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
def test_a_captured_run_is_bit_for_bit_the_eager_one(events: list[str], make: Any, run: str) -> None:
    eager, graphed = make(**RUNS[run]), captured(make(**RUNS[run]))
    bad = batch(4, 2)
    bad["latents"][1] = float("nan")
    mask = torch.rand(3, 1, 8, 8)
    batches = [batch(4), batch(4, 1), bad, batch(3, 3, mask=mask), batch(4, 4), batch(3, 5, mask=1 - mask)]
    for number, given in enumerate(batches):
        want, got = eager.step(given), graphed.step(given)
        assert torch.equal(got, want) or number == 2
        assert_equal(state(graphed), state(eager))
        with graphed.averaged():  # between steps the weights go out and in
            pass
    assert len(graphed._training_step.graphs) == 2 and events.count("replay") == len(batches)
    assert int(graphed._training_step.skipped) == 1


def test_the_warm_up_leaves_no_trace(make: Any) -> None:
    trainer = make(adam_weight_decay=0.5)
    for given in (batch(4), batch(4, mask=torch.zeros(4, 1, 8, 8))):  # of an empty mask the loss is 0, and finite
        trainer.step(batch(4))
        before = state(trainer)
        generator = torch.Generator().manual_seed(0)
        trainer._training_step._run_dry(trainer._prepare(given, generator))
        assert_equal(state(trainer), before)
        assert all(parameter.grad is None for parameter in trainer.trainable.values())
    fresh = make()
    fresh._training_step._run_dry(fresh._prepare(batch(4), torch.Generator().manual_seed(0)))
    fresh.step(batch(4))
    other = make()
    other.step(batch(4))
    assert_equal(state(fresh), state(other))


def test_shares_of_other_global_batches_and_empty_ones(events: list[str], make: Any) -> None:
    eager, graphed = make(), captured(make())
    empty = batch(0, encoder_hidden_states=torch.empty(0, 1, 16))
    shares = [
        batch(2, offset=0, global_batch_size=4),
        batch(2, offset=0, global_batch_size=3),
        batch(2, offset=2, global_batch_size=4),
        {**empty, "offset": 1, "global_batch_size": 1},
    ]
    for share in shares:
        assert torch.equal(graphed.step(share), eager.step(share))
        assert_equal(state(graphed), state(eager))
    assert len(graphed._training_step.graphs) == 2 and events.count("replay") == 3


def test_with_several_processes_only_what_all_capture_at_once_is_captured(
    events: list[str], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = captured(make(caption_dropout=0.0))
    trainer._training_step._num_processes = 4
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    for size, whole in ((3, 12), (3, 10), (2, 10), (1, 1), (2, 8)):  # 10 are 3, 3, 2 and 2
        trainer.step(batch(size, global_batch_size=whole))
    assert len(trainer._training_step.graphs) == 2 and events.count("replay") == 2


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_a_resumed_run_is_captured_anew(events: list[str], make: Any, name: str) -> None:
    schedule = {"lr_scheduler": name, "max_train_steps": 4}
    straight = captured(make("straight", **schedule))
    for number in range(4):
        if number == 2:
            straight._save_checkpoint()
        straight.step(batch(4, number))
    resumed = captured(make("straight", **schedule, resume_from_checkpoint="latest"))
    resumed.step(batch(4, 9))  # captured with the state that the checkpoint then replaces
    resumed._resume()
    for number in (2, 3):
        resumed.step(batch(4, number))
    assert_equal(state(resumed), state(straight))


@pytest.mark.parametrize("name", ["constant", "linear"])
def test_a_captured_run_goes_on_uncaptured_and_back(events: list[str], make: Any, name: str) -> None:
    schedule = {"lr_scheduler": name, "max_train_steps": 4}  # linear: whole quarters, exact in float32
    straight = make("straight", **schedule)
    for number in range(4):
        straight.step(batch(4, number))
    first = captured(make("run", **schedule))
    for number in range(2):
        first.step(batch(4, number))
    first._save_checkpoint()
    second = make("run", **schedule, resume_from_checkpoint="latest")  # as on another device: its lr is a number
    second._resume()
    assert [(group["lr"], group["capturable"]) for group in second.optimizer.param_groups] == [(2**-7, False)]
    second.step(batch(4, 2))
    second._save_checkpoint()
    third = captured(make("run", **schedule, resume_from_checkpoint="latest"))
    third._resume()
    third.step(batch(4, 3))
    assert_equal(state(third), state(straight))


# On a GPU


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Algorithms that sum in one order; warn_only: cuBLAS is, on one stream, whatever its workspace.

    Attention by plain products: the other kernels' backward passes add in any order, and under warn_only they stay
    allowed. Compiled code knows its sizes: else a trainer that meets a second size, which it runs uncaptured, takes
    code for every size at the first one too, while the graph replays the code for that size.
    """
    torch.compiler.reset()  # code objects are shared: the trainers of other tests count towards the recompile limit
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    with sdpa_kernel(SDPBackend.MATH), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_replay_on_a_gpu_is_bit_for_bit_the_uncaptured_step(
    deterministic: None, make: Any, run: str, compile: bool
) -> None:
    plain, graphed = make(compile=compile, **RUNS[run]), make(compile=compile, cuda_graph=True, **RUNS[run])
    bad = batch(4, 2)
    bad["latents"][1] = float("nan")
    batches = [batch(4), batch(4, 1), bad, batch(3, 3), batch(4, 4), batch(3, 5)]
    for number, given in enumerate(batches):
        want, got = plain.step(given), graphed.step(given)
        assert torch.equal(got, want) or number == 2
        assert_equal(state(graphed), state(plain))
    assert len(graphed._training_step.graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_on_a_gpu_does_not_wait_for_it(make: Any, cuda_graph: bool, compile: bool) -> None:
    torch.compiler.reset()
    trainer = make(cuda_graph=cuda_graph, compile=compile, caption_dropout=0.3, mixed_precision="bf16")
    for number in range(2):  # compiling, choosing among kernels and capturing wait
        trainer.step(batch(4, number))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            trainer.step(batch(4, number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step(batch(4)).isfinite()


@pytest.mark.gpu
def test_100_captured_runs_on_a_gpu_are_bitwise_equal(deterministic: None, make: Any) -> None:
    trainer = make(cuda_graph=True, mixed_precision="bf16", ema_decay=0.0)
    start = {name: parameter.detach().clone() for name, parameter in trainer.trainable.items()}
    trainer.step(batch(4))
    results = []
    for _ in range(100):
        trainer.global_step = 0
        with torch.no_grad():
            for name, parameter in trainer.trainable.items():
                parameter.copy_(start[name])
                for value in trainer.optimizer.state[parameter].values():
                    value.zero_()
        trainer.step(batch(4))
        results.append(state(trainer))
    for result in results[1:]:
        assert_equal(result, results[0])
