"""`align` and `aligned_loss` together: launches and operations of a call, one compiled graph, and use of the ops."""

import sys

import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from d2f_fast.flow.alignment import Alignment
from d2f_fast.kernels.align import align_launch
from d2f_fast.kernels.runtime import INTERPRET
from d2f_fast.kernels.velocity_loss import velocity_loss_launch
from d2f_fast.ops import align, aligned_loss

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def epsilon_flow():
    return Alignment.from_scheduler(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def operands(shape, dtype=torch.float32):
    output, latents, noise = torch.randn(3, *shape).to(dtype)
    t = torch.rand(shape[0])
    ends = torch.tensor([0.0, 1.0, 0.03])[: len(t) - 1]
    t[: len(ends)] = ends
    return output, latents, noise, t


def step(network, latents, noise, t, flow, weighting, mask):
    sample, timestep = align(latents, noise, t, flow)
    output = network(sample) + 0.1 * (timestep / 100).sin()[:, None, None, None]
    return aligned_loss(output, latents, noise, t, flow, weighting, mask=mask)


@pytest.mark.parametrize(
    ("backend", "fused"),
    [
        ("aot_eager", True),
        pytest.param("inductor", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_step_is_one_graph_for_every_time_and_agrees_with_eager(backend, fused, request):
    if fused:
        request.getfixturevalue("served")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    flow, network = epsilon_flow(), torch.nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    frames = []
    for seed in range(50):
        # A second batch size makes the first dimension dynamic, which takes one more graph and none after it.
        latents, noise, _, t = operands((4 + seed % 2, 4, 8, 8))
        mask, results = torch.rand(len(t), 1, 8, 8) > 0.3, []
        for function in (compiled, step):
            network.zero_grad()
            loss = function(network, latents, noise, t.clamp(seed * 0.01, 1 - seed * 0.006), flow, "flow", mask)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
        frames.append(counter.frame_count)
    assert frames == [1] + [2] * 49
    assert any("d2f_fast" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes) == fused


class Recorder(TorchDispatchMode):
    """Record what would run on a device: every operation that is neither a view nor an allocation."""

    def __init__(self):
        super().__init__()
        self.names, self.fused = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2f_fast":
            self.fused.append(args)
        elif not function.is_view and not function.name().startswith(("aten::empty", "aten::new_empty")):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def objective(output, latents, noise, t, flow, mask=None):
    """Run `align`, the loss and its gradient, for an upstream gradient of 1."""
    align(latents, noise, t, flow)
    loss = aligned_loss(output, latents, noise, t, flow, mask=mask)
    return torch.autograd.grad(loss, output, torch.ones(()))[0]


@pytest.mark.skipif(not INTERPRET, reason="launches are counted in Triton's interpreter")
@pytest.mark.parametrize("masked", [False, True])
def test_objective_takes_three_launches_and_six_operations_of_torch(served, masked, monkeypatch):
    from triton.runtime.interpreter import GridExecutor  # here: triton is optional

    output, latents, noise, t = operands((2, 4, 9, 9))
    arguments = (output.bfloat16().requires_grad_(), latents, noise, t, epsilon_flow())
    mask = torch.rand(2, 1, 9, 9) if masked else None
    with Recorder() as recorder:
        objective(*arguments, mask)
    # These are the mean over the batch, the upstream ones, and the backward pass of that mean and of a product.
    assert recorder.names == [f"aten::{x}" for x in ("mean", "ones", "div.Scalar", *("mul.Tensor",) * 2, "_to_copy")]
    assert len(recorder.fused) == 2

    launched, call = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self) or call(self, *a, **k))
    monkeypatch.setattr(torch.ops.d2f_fast, "align", align_launch)
    monkeypatch.setattr(torch.ops.d2f_fast, "velocity_loss", velocity_loss_launch)
    objective(*arguments, mask)
    assert len(launched) == 3


def test_plain_torch_takes_tens_of_operations_for_the_objective():
    output, *others = operands((2, 4, 9, 9))
    with Recorder() as recorder:
        objective(output.requires_grad_(), *others, epsilon_flow())
    assert not recorder.fused and len(recorder.names) > 80


@pytest.mark.parametrize("serves", [False, True])
def test_op_runs_where_it_serves_and_has_every_wanted_gradient(monkeypatch, serves):
    asked, module = [], sys.modules["d2f_fast.kernels.velocity_loss"]
    monkeypatch.setattr(module, "serves", lambda *operands: asked.append(operands) or serves)
    (output, latents, noise, t), flow = operands((2, 4, 6, 6)), epsilon_flow()
    wanted, mask = output.clone().requires_grad_(), torch.rand(2, 1, 6, 6)

    def fused(output, latents, mask=None):
        """Return for each call of the op whether it computed the gradient too."""
        with Recorder() as recorder:
            aligned_loss(output, latents, noise, t, flow, mask=mask)
        assert asked.pop() == (t, output, latents, noise)
        return [arguments[-1] for arguments in recorder.fused]

    assert fused(output, latents, mask) == [False] * serves and fused(wanted, latents, mask) == [True] * serves
    with torch.no_grad():
        assert fused(wanted, latents) == [False] * serves
    assert not fused(wanted, latents.clone().requires_grad_())
    assert not fused(wanted, latents, mask.clone().requires_grad_())
