"""Count how often one call of the objective (align, loss, and the loss' gradient) launches work on the device.

    pytest --benchmark benchmarks/bench_launches.py

Nothing is timed and no GPU is needed. Providers: "published", the operators of the published code without their test
for NaN; "torch", the formula in plain torch; and "d2f_fast". Columns of `results/<device>-launches.csv`:

    eager            torch operations other than views and allocations, each of which is one launch on a GPU
    triton_launches  launches of this package's kernels, counted by a stand-in for Triton's launcher
    compiled         kernels that Inductor generates for this device, and this package's launches
"""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_align, bench_velocity_loss
from d2f_fast import Alignment

MOST = 4  # our launches: align before the network, then the loss, its sum, and the scaling of the gradient
KERNELS = {"align": ("_align_kernel",), "velocity_loss": ("_error_kernel", "_sum_kernel")}


class Recorder(TorchDispatchMode):
    """Count what would run on a device; this package's ops are launched with kernels that only count."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "d2f_fast":
            module = sys.modules[f"d2f_fast.kernels.{name}"]
            with mock.patch.multiple(module, **dict.fromkeys(KERNELS[name], self)):
                return getattr(module, f"{name}_launch")(*args)
        self.operations += not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty"))
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_: Any, **__: Any) -> None:
            self.launches += 1

        return launch


def objective(provider: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return align and loss of one provider as a function of a given network output."""
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    alignment, device = (
        Alignment.from_scheduler(DDIMScheduler(**table, prediction_type="v_prediction")),
        torch.device("cpu"),
    )
    before, after = (bench.provider_of(provider, alignment, device) for bench in (bench_align, bench_velocity_loss))

    def run(output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return after(output, latents, noise, t), *before(latents, noise, t)

    return run


@pytest.mark.parametrize("provider", ["published", "torch eager", "d2f_fast"])
def test_launches(record, monkeypatch, provider):
    for name in KERNELS:  # the ops take the path of a GPU
        monkeypatch.setattr(sys.modules[f"d2f_fast.kernels.{name}"], "serves", lambda *_: provider == "d2f_fast")
    output, latents, noise, t = *torch.randn(3, 16, 4, 64, 64), torch.rand(16)
    output, run, upstream = output.requires_grad_(), objective(provider), torch.ones(())

    def call(function: Callable[..., tuple[Tensor, ...]]) -> None:
        torch.autograd.grad(function(output, latents, noise, t)[0], output, upstream)

    call(run)  # makes tables
    with Recorder() as recorder:
        call(run)
    torch.compiler.reset()
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        call(torch.compile(run, fullgraph=True))
    row = {"case": "16x4x64x64 v_prediction", "provider": provider.removesuffix(" eager"), "eager": recorder.operations}
    compiled = metrics.generated_kernel_count + recorder.launches
    record("launches", {**row, "triton_launches": recorder.launches, "compiled": compiled})
    assert recorder.launches <= MOST and (provider == "d2f_fast") == (recorder.launches > 0)
