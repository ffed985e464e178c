"""The samplers that the demo compares, on any network: trained on noise, on aligned flow, or on naive flow.

| sampler | spacing | start | is |
|---|---|---|---|
| ddim | trailing | t_min | DDIM, η = 0, on its trailing timesteps (equal to Euler in flow time on their nodes) |
| flow | uniform | 0 | Euler in flow time |
| flow | trailing | 0 | the same on DDIM's nodes, except for the start |
| dpm++2m | trailing | t_min | diffusers' DPMSolverMultistepScheduler, second order, lower order at the end |

A naive-flow network keeps its own state and timestep. On DDIM's nodes it is integrated between the same flow times;
for DPM-Solver++ diffusers has a form for such networks (`use_flow_sigmas`, `flow_prediction`), uniform in flow time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.formulas import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import Velocity, sample_flow, unet_velocity


@contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Keep torch from dividing an operation among threads: on tensors this small they wait for each other longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Route:
    """One way to draw with a network."""

    sampler: Literal["ddim", "flow", "dpm++2m"]
    spacing: Spacing

    @property
    def label(self) -> str:
        """Name in tables and captions."""
        names = {"ddim": "DDIM", "flow": "flow Euler", "dpm++2m": "DPM-Solver++(2M)"}
        return f"{names[self.sampler]}, {self.spacing}"


DDIM = Route("ddim", "trailing")
FLOW = Route("flow", "uniform")
FLOW_TRAILING = Route("flow", "trailing")
DPM = Route("dpm++2m", "trailing")
ROUTES = (DDIM, FLOW, FLOW_TRAILING, DPM)


def equal_route(route: Route, steps: int, flow: Flow) -> Route | None:
    """Another route that draws the same pictures: two steps of DPM-Solver++ are both of first order, which is DDIM."""
    return DDIM if route == DPM and steps <= 2 and isinstance(flow, Alignment) else None


def draw_latents(velocity: Velocity, noise: Tensor, route: Route, steps: int, flow: Flow, base: Any) -> Tensor:
    """Latents of one batch.

    Args:
        velocity: of the network, as `unet_velocity` makes it.
        noise: [B, C, H, W] from N(0, 1).
        route: which sampler.
        steps: network evaluations.
        flow: how the network is read.
        base: the base model's scheduler, whose table every sampler uses.
    """
    if route.sampler == "dpm++2m":
        return _dpm_solver(velocity, noise, steps, flow, base)
    if route.spacing == "uniform":
        return sample_flow(velocity, noise, times=flow.times(steps))  # type: ignore[return-value]
    # A naive-flow network has no trailing timesteps of its own: it takes the base model's nodes too.
    alignment = Alignment.from_scheduler(base)
    times, x_t = alignment.times(steps, "trailing"), noise
    if route.sampler == "ddim":
        # DDIM takes its noise for the diffusion state at the last timestep.
        times[0] = alignment.t_min
        x_t = alignment.to_flow(noise, times[0])
    return sample_flow(velocity, x_t, times=times)  # type: ignore[return-value]


def _dpm_solver(velocity: Velocity, noise: Tensor, steps: int, flow: Flow, base: Any) -> Tensor:
    """DPM-Solver++(2M) of diffusers, given what the network implies: noise - latents of naive flow, else the noise."""
    naive = isinstance(flow, NaiveFlow)
    scheduler = DPMSolverMultistepScheduler.from_config(
        base.config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        prediction_type="flow_prediction" if naive else "epsilon",
        use_flow_sigmas=naive,
    )
    scheduler.set_timesteps(steps)
    alignment, state = Alignment.from_scheduler(base), noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        # diffusers rounds the timesteps of flow sigmas; the network is given the exact one.
        t = 1 - sigma if naive else alignment.flow_time(timestep)
        x_t = flow.to_flow(state, t)
        slope = velocity(x_t, t.to(noise.device))
        state = scheduler.step(-slope if naive else x_t - t * slope, timestep, state).prev_sample
    return state


class Painter:
    """Draws pictures of prompts with one network.

    Args:
        model: whose UNet, autoencoder and text encoder draw.
        flow: how the UNet is read.
        guidance_scale: of every picture.
        batch: pictures in one network call, at most, before guidance doubles them; on a CPU several calls run side by
            side.
        on_batch: called with the network evaluations, in pictures, that a batch took.
    """

    def __init__(
        self,
        model: BaseModel,
        flow: Flow,
        guidance_scale: float,
        batch: int = 64,
        on_batch: Callable[[int], object] = lambda evaluations: None,
    ) -> None:
        self.model, self.flow, self.guidance_scale = model, flow.to(model.device), guidance_scale
        self._batch, self._on_batch = batch, on_batch

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], noise: Tensor, route: Route, steps: int) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] on the CPU; `noise` [B, C, h, w] is the start of each."""
        model = self.model
        unconditional = model.encode_prompts([""])["encoder_hidden_states"]
        # As many side by side as torch would use threads for one, on a CPU; of equal sizes, so that none waits.
        workers = torch.get_num_threads() if model.device.type == "cpu" else 1
        count = len(prompts)
        batches = min(count, workers * math.ceil(count / (workers * self._batch)))
        parts = [slice(count * i // batches, count * (i + 1) // batches) for i in range(batches)]
        conditions = [model.encode_prompts(prompts[part])["encoder_hidden_states"] for part in parts]

        @torch.no_grad()  # which is a property of the thread
        def draw_part(part: slice, condition: Tensor) -> Tensor:
            velocity = unet_velocity(
                model.unet, self.flow, condition, unconditional.expand_as(condition), self.guidance_scale
            )
            start = noise[part].to(model.device)
            latents = draw_latents(velocity, start, route, steps, self.flow, model.pipeline.scheduler)
            return model.decode(latents).clamp(-1, 1).cpu()

        drawn = []
        with one_thread_an_operation(), ThreadPoolExecutor(workers) as pool:
            for condition, part in zip(conditions, pool.map(draw_part, parts, conditions), strict=True):
                drawn.append(part)
                self._on_batch(len(condition) * steps)
        return torch.cat(drawn)
