"""Measure `align`, which turns latents, noise and t into the network's sample and timestep.

    pytest --benchmark benchmarks/bench_align.py

Providers: "published", the operators of the published code; "torch eager" and "torch compiled", the formula in plain
torch; and "d2f_fast", `d2f_fast.align`, which on a CPU is plain torch behind its checks. Each is compared with float64
before it is timed. Rows go to `results/<device>.csv`, with the rate of bytes and its share of the copy bandwidth.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from d2f_fast import Alignment, align
from d2f_fast.kernels.align import align_reference

SHAPES = [(1, 4, 64, 64), (16, 4, 64, 64), (16, 4, 128, 128)]
if torch.cuda.is_available():
    SHAPES += [(512, 4, 128, 128)]  # 64 MiB exceed every cache, so that the share of the copy bandwidth is meaningful
GRAPHS = [True, False] if torch.cuda.is_available() else [False]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}[DTYPE]

Provider = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def published(alignment: Alignment, device: torch.device) -> Provider:
    """Return the operators of the published objective, with a table entry before the first timestep, in float32.

    Its timesteps are one too high, which the comparison with float64 takes off. Its test for NaN is left out, because
    it waits for the device.
    """
    abar = torch.cat([torch.ones(1), alignment.schedule.alphas_cumprod.float()]).to(device)
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()
    flow_times, scales = alphas / (alphas + sigmas), alphas + sigmas
    rising = -flow_times

    def run(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        right = torch.searchsorted(rising, -t).clamp(1, len(flow_times) - 1)
        left = right - 1
        index = left + (flow_times[left] - t) / (flow_times[left] - flow_times[right])
        lower = index.floor().long().clamp(0, len(flow_times) - 2)
        weight = index - lower
        scale = (scales[lower] * (1 - weight) + scales[lower + 1] * weight).view(-1, 1, 1, 1)
        time = t.view(-1, 1, 1, 1)
        x_t = (time * latents + (1 - time) * noise).to(latents.dtype)
        return (scale * x_t).to(latents.dtype), index

    return run


def provider_of(name: str, alignment: Alignment, device: torch.device) -> Provider:
    """Return the function of a provider."""
    table = (alignment.rising_flow_times(torch.float32), alignment.t_min, alignment.num_train_timesteps)
    if name == "published":
        return published(alignment, device)
    if name == "d2f_fast":
        return lambda *operands: align(*operands, alignment)

    def plain(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return align_reference(latents, noise, t, *table)

    return torch.compile(plain, fullgraph=True, dynamic=False) if name == "torch compiled" else plain


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: "graph" if graph else "launched")
@pytest.mark.parametrize("provider", ["published", "torch eager", "torch compiled", "d2f_fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_align(measure, device, shape, provider, graph):
    alignment = Alignment.from_scheduler(
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ).to(device)
    torch._dynamo.reset()
    function = provider_of(provider, alignment, device)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        latents, noise = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))
        return latents, noise, 0.1 + 0.8 * torch.rand(shape[0], device=device)

    latents, noise, t = inputs()
    expected, expected_timestep = align(latents.double(), noise.double(), t.double(), alignment)
    with torch.no_grad():
        sample, timestep = function(latents, noise, t)
    # The published scale is interpolated in a table: 1.4e-5; its x_t is rounded once more.
    allowed = (2 if provider == "published" else 1) * ROUNDING + (2e-5 if provider == "published" else 0)
    assert ((sample - expected).square().mean() / expected.square().mean()).sqrt() <= allowed
    assert (timestep - int(provider == "published") - expected_timestep).abs().max() <= 2e-3

    @torch.no_grad()
    def run(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return function(latents, noise, t)

    case = f"{'x'.join(map(str, shape))} {str(DTYPE).removeprefix('torch.')}"
    least = 3 * latents.numel() * latents.element_size() + 2 * t.numel() * t.element_size()
    measure(run, inputs, case=case, provider=provider, bytes_moved=least, graph=graph)
