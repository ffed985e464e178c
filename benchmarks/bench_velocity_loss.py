"""Measure the loss of the network's output together with its gradient.

    pytest --benchmark benchmarks/bench_velocity_loss.py

Providers: "published", the operators of the published code; "torch eager" and "torch compiled", the formula in plain
torch; and "d2f_fast", `d2f_fast.aligned_loss`, which on a CPU is plain torch behind its checks. Loss and gradient are
compared with float64 before they are timed. Rows go to `results/<device>.csv`.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from d2f_fast import Alignment, aligned_loss
from d2f_fast.kernels.velocity_loss import velocity_loss_reference

SHAPES = [(1, 4, 64, 64), (16, 4, 64, 64), (16, 4, 128, 128)]
if torch.cuda.is_available():
    SHAPES += [(512, 4, 128, 128)]  # 64 MiB exceed every cache, so that the share of the copy bandwidth is meaningful
GRAPHS = [True, False] if torch.cuda.is_available() else [False]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def published(alignment: Alignment, device: torch.device) -> Provider:
    """Return the operators of the published objective for a v-prediction; its coefficients are one entry too high."""
    abar = alignment.schedule.alphas_cumprod.float().to(device)
    alphas, sigmas = abar.sqrt(), (1 - abar).sqrt()

    def run(model_output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        time = t.view(-1, 1, 1, 1)
        index = alignment.timestep(t) + 1
        lower = index.floor().long().clamp(0, len(abar) - 2)
        weight = index - lower
        alpha, sigma = (
            (table[lower] * (1 - weight) + table[lower + 1] * weight).view(-1, 1, 1, 1) for table in (alphas, sigmas)
        )
        sample = (time * latents + (1 - time) * noise) * (alpha + sigma)
        velocity = (alpha * sample - sigma * model_output) - (sigma * sample + alpha * model_output)
        return (velocity - (latents - noise)).square().mean()

    return run


def provider_of(name: str, alignment: Alignment, device: torch.device) -> Provider:
    """Return the function of a provider."""
    if name == "published":
        return published(alignment, device)
    if name == "d2f_fast":
        return lambda *operands: aligned_loss(*operands, alignment)

    def plain(model_output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        settings = (alignment.prediction_type, alignment.t_min, alignment.t_max, "flow", 5.0)
        return velocity_loss_reference(model_output, latents, noise, t, None, *settings)[0].mean()

    return torch.compile(plain, fullgraph=True, dynamic=False) if name == "torch compiled" else plain


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: "graph" if graph else "launched")
@pytest.mark.parametrize("provider", ["published", "torch eager", "torch compiled", "d2f_fast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=lambda x: str(x).split(".")[1])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_velocity_loss(measure, device, shape, layout, provider, graph):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )
    alignment = Alignment.from_scheduler(scheduler).to(device)
    torch._dynamo.reset()
    function = provider_of(provider, alignment, device)

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output, latents, noise = (torch.randn(shape, device=device).to(DTYPE) for _ in range(3))
        output = output.contiguous(memory_format=layout).requires_grad_()
        return output, latents, noise, 0.1 + 0.8 * torch.rand(shape[0], device=device)

    def run(model_output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(model_output, latents, noise, t)
        return loss, torch.autograd.grad(loss, model_output)[0]

    operands = inputs()
    exact = operands[0].detach().double().requires_grad_()
    expected = aligned_loss(exact, *(x.double() for x in operands[1:]), alignment)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    loss, gradient = run(*operands)
    # The published coefficients are off by 0.2 % on average and 1.6 % at most, and the published state is rounded to
    # the type of the latents.
    rounding = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}[DTYPE]
    allowed = 0.03 if provider == "published" else rounding
    assert (loss - expected).abs() <= max(allowed, 1e-5) * expected
    error = (gradient.double() - expected_gradient).square().mean().sqrt()
    assert gradient.dtype == DTYPE and error <= allowed * expected_gradient.square().mean().sqrt()

    case = f"{'x'.join(map(str, shape))} {str(DTYPE).removeprefix('torch.')} {str(layout).removeprefix('torch.')}"
    least = 4 * gradient.numel() * gradient.element_size()
    measure(run, inputs, case=case, provider=provider, bytes_moved=least, graph=graph)
