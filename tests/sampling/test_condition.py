"""Sampling a network that sees images: every solver, and guidance by text and image, against loops written out."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torchdiffeq import odeint

from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.models.conv_in import widen_conv_in
from d2f_fast.sampling.integrate import Velocity, unet_velocity
from d2f_fast.sampling.multistep import sample_multistep
from d2f_fast.sampling.solve import solve
from d2f_fast.sampling.solver_options import SolverOptions

TIMES = torch.tensor([0.1, 0.35, 0.7])


class Recorder:
    """Call a network, and keep the number of samples and the further conditions of each call."""

    def __init__(self, unet: Any) -> None:
        self.conv_in, self.unet, self.batches, self.added = unet.conv_in, unet, [], None

    def __call__(self, sample: Tensor, *given: Any, added_cond_kwargs: Any = None, **options: Any) -> Any:
        self.batches.append(len(sample))
        self.added = added_cond_kwargs
        return self.unet(sample, *given, **options)


@pytest.fixture(scope="module")
def unet(tiny_folder: Path) -> Any:
    """Return the tiny network in float64, which sees one image through weights of their own."""
    network = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval().requires_grad_(False)
    widen_conv_in(network)
    torch.manual_seed(5)
    network.conv_in.weight.add_(0.1 * torch.randn_like(network.conv_in.weight))
    return network.double()


@pytest.fixture(scope="module")
def alignment(tiny_folder: Path) -> Alignment:
    return Alignment.from_scheduler(DDIMScheduler.from_pretrained(tiny_folder / "scheduler"))


@pytest.fixture
def given() -> dict[str, Tensor]:
    """Return a text and a negative text, the latents of images, and a state, for two samples."""
    random = torch.Generator().manual_seed(7)
    shapes = {"text": (2, 8, 16), "negative": (2, 8, 16), "context": (2, 4, 4, 4), "state": (2, 4, 4, 4)}
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def written_out(
    unet: Any, alignment: Alignment, given: dict[str, Tensor], text_scale: float, image_scale: float, first: bool = True
) -> Velocity:
    """Return the guided velocity from three calls of the network, by the formula of InstructPix2Pix."""

    @torch.no_grad()
    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        sample = alignment.to_sample(x_t, t)

        def one(text: Tensor, context: Tensor) -> Tensor:
            channels = [context, sample] if first else [sample, context]
            output = unet(torch.cat(channels, 1), alignment.timestep(t), text).sample
            return alignment.velocity(output, sample, t)

        text, negative, context = given["text"], given["negative"], given["context"]
        neither, image, both = one(negative, 0 * context), one(negative, context), one(text, context)
        return neither + image_scale * (image - neither) + text_scale * (both - image)

    return velocity


def ours(
    unet: Any, alignment: Alignment, given: dict[str, Tensor], text_scale: float = 1.0, **options: Any
) -> Velocity:
    """Return the velocity of this package with the context."""
    velocity = unet_velocity(
        unet, alignment, given["text"], given["negative"], text_scale, context=given["context"], **options
    )
    return torch.no_grad()(velocity)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("text_scale", "image_scale", "evaluations"),
    [(1.0, 1.0, 1), (0.0, 1.0, 1), (7.5, 1.0, 2), (7.5, 1.5, 3), (1.0, 2.0, 3), (0.0, 2.0, 3)],
)
def test_guidance_in_one_call_equals_separate_calls(
    unet: Any,
    alignment: Alignment,
    given: dict[str, Tensor],
    text_scale: float,
    image_scale: float,
    evaluations: int,
    first: bool,
) -> None:
    recorder, t = Recorder(unet), torch.tensor(0.4)
    options = {"image_guidance_scale": image_scale, "context_first": first}
    got = ours(recorder, alignment, given, text_scale, **options)(given["state"], t)
    # A scale of 0 turns guidance by text off, as 1 does.
    want = written_out(unet, alignment, given, text_scale or 1.0, image_scale, first)(given["state"], t)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    assert recorder.batches == [2 * evaluations]


def test_image_guidance_scale_of_1_changes_nothing(unet: Any, alignment: Alignment, given: dict[str, Tensor]) -> None:
    t, state = torch.tensor(0.4), given["state"]
    for text_scale in (1.0, 7.5):
        recorder = Recorder(unet)
        off = ours(recorder, alignment, given, text_scale)(state, t)
        one = ours(recorder, alignment, given, text_scale, image_guidance_scale=1.0)(state, t)
        assert torch.equal(off, one) and recorder.batches[0] == recorder.batches[1] <= 4
        above = ours(recorder, alignment, given, text_scale, image_guidance_scale=1 + 1e-9)(state, t)
        assert (above - one).abs().max() <= 1e-6 * one.abs().max() and recorder.batches[2] == 6


def test_each_sample_has_its_own_time_scale_and_conditions(
    unet: Any, alignment: Alignment, given: dict[str, Tensor]
) -> None:
    scales, t = torch.tensor([1.5, 4.0], dtype=torch.float64).reshape(2, 1, 1, 1), torch.tensor([0.3, 0.7])
    added = {"time_ids": torch.arange(4.0)[:, None]}  # two negative ones, then two positive ones
    recorder = Recorder(unet)
    options = {"added_cond_kwargs": added, "image_guidance_scale": 2.0}
    got = ours(recorder, alignment, given, scales, **options)(given["state"], t)
    assert recorder.added["time_ids"].flatten().tolist() == [0, 1, 0, 1, 2, 3]
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in given.items()}
        want = written_out(unet, alignment, one, float(scales[i]), 2.0)(one["state"], t[i])
        assert (got[i] - want[0]).abs().max() <= 1e-6 * want.abs().max()


def test_outside_of_the_interval_text_and_image_are_seen_alone(
    unet: Any, alignment: Alignment, given: dict[str, Tensor]
) -> None:
    recorder = Recorder(unet)
    options = {"image_guidance_scale": 2.0, "guidance_interval": (0.3, 0.6)}
    velocity = ours(recorder, alignment, given, 3.0, **options)
    for t, scales in ((0.2, (1.0, 1.0)), (0.4, (3.0, 2.0)), (0.7, (1.0, 1.0))):
        want = written_out(unet, alignment, given, *scales)(given["state"], torch.tensor(t))
        assert (velocity(given["state"], torch.tensor(t)) - want).abs().max() <= 1e-9 * want.abs().max()
    assert recorder.batches == [2, 6, 2]


def runge_kutta(method: str) -> Callable[[Velocity, Tensor], Tensor]:
    """Return the loop of a method from its Butcher tableau: nodes, rows of the matrix, and weights."""
    nodes, rows, weights = {
        "euler": ([0.0], [[]], [1.0]),
        "midpoint": ([0.0, 0.5], [[], [0.5]], [0.0, 1.0]),
        "heun": ([0.0, 1.0], [[], [1.0]], [0.5, 0.5]),
        "rk4": ([0.0, 0.5, 0.5, 1.0], [[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    }[method]

    def run(velocity: Velocity, state: Tensor) -> Tensor:
        for t, t_next in itertools.pairwise(TIMES):
            h, slopes = t_next - t, []
            for node, row in zip(nodes, rows, strict=True):
                moved = sum((a * slope for a, slope in zip(row, slopes, strict=True)), torch.zeros_like(state))
                slopes.append(velocity(state + h * moved, t + node * h))
            state = state + h * sum(b * slope for b, slope in zip(weights, slopes, strict=True))
        return state

    return run


def stochastic(method: str) -> Callable[[Velocity, Tensor], Tensor]:
    """Return the loop of a method that adds noise, with c = 1."""

    def run(velocity: Velocity, state: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(11)
        for t, t_next in itertools.pairwise(TIMES.tolist()):
            noise = torch.randn(state.shape, generator=random).double()
            jump = math.sqrt((1 - t) ** 2 - (1 - t_next) ** 2) * noise
            slope = velocity(state, torch.tensor(t))
            drift = slope - (state - t * slope)
            if method == "stochastic_heun":
                ahead = state + (t_next - t) * drift + jump
                slope = velocity(ahead, torch.tensor(t_next))
                drift = (drift + slope - (ahead - t_next * slope)) / 2
            state = state + (t_next - t) * drift + jump
        return state

    return run


def adaptive(velocity: Velocity, state: Tensor) -> Tensor:
    ends = TIMES[1:].double()
    return odeint(lambda t, x: velocity(x, t), state, ends, rtol=0.1, atol=0.1, method="dopri5")[-1]


def multistep(velocity: Velocity, state: Tensor) -> Tensor:
    """Take the steps of DPM-Solver++(2M) in λ = log(t / (1 - t)), as its paper states them."""
    t = TIMES.double().tolist()
    logs = [math.log(each / (1 - each)) for each in t]
    before = None
    for i in range(len(t) - 1):
        x0 = state + (1 - t[i]) * velocity(state, torch.tensor(t[i], dtype=torch.float32))
        mean = x0
        if before is not None:
            ratio = (logs[i] - logs[i - 1]) / (logs[i + 1] - logs[i])
            mean = (1 + 1 / (2 * ratio)) * x0 - before / (2 * ratio)
        shrink = (1 - t[i + 1]) / (1 - t[i])
        state, before = shrink * state - t[i + 1] * math.expm1(logs[i] - logs[i + 1]) * mean, x0
    return state


LOOPS: dict[str, Callable[[Velocity, Tensor], Tensor]] = {
    **{method: runge_kutta(method) for method in ("euler", "midpoint", "heun", "rk4")},
    **{method: stochastic(method) for method in ("euler_maruyama", "stochastic_heun")},
    "dopri5": adaptive,
    "dpm++": multistep,
}


@pytest.mark.parametrize("method", LOOPS)
def test_every_solver_with_context_equals_a_loop_written_out(
    unet: Any, alignment: Alignment, given: dict[str, Tensor], method: Any
) -> None:
    velocity = ours(unet, alignment, given, 3.0, image_guidance_scale=1.5)
    if method == "dpm++":
        got = sample_multistep(velocity, given["state"], TIMES)
    else:
        options = SolverOptions(rtol=0.1, atol=0.1) if method == "dopri5" else None
        times = TIMES[1:] if method == "dopri5" else TIMES
        got = solve(velocity, given["state"], times, method, options, torch.Generator().manual_seed(11))[-1]
    want = LOOPS[method](written_out(unet, alignment, given, 3.0, 1.5), given["state"])
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_context_decides_what_is_sampled(unet: Any, alignment: Alignment, given: dict[str, Tensor]) -> None:
    blank = given | {"context": 0 * given["context"]}
    seen, other = (solve(ours(unet, alignment, each), given["state"], TIMES)[-1] for each in (given, blank))
    assert (seen - other).abs().max() > 1e-2 * seen.abs().max()


def test_image_guidance_that_cannot_be_given_is_refused(
    unet: Any, alignment: Alignment, given: dict[str, Tensor]
) -> None:
    text, negative = given["text"], given["negative"]
    with pytest.raises(RefusedInputError, match="image_guidance_scale must be 1, which turns it off, or above, got 0"):
        unet_velocity(unet, alignment, text, negative, context=given["context"], image_guidance_scale=0)
    with pytest.raises(ValueError, match="image_guidance_scale=2 needs negative_hidden_states"):
        unet_velocity(unet, alignment, text, context=given["context"], image_guidance_scale=2)
    with pytest.raises(ValueError, match="image_guidance_scale needs context"):
        unet_velocity(unet, alignment, text, negative, image_guidance_scale=2)
