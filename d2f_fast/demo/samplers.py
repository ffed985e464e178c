"""Sample latents with the samplers that the demo compares, from any network: diffusion, aligned flow or naive flow.

| sampler | spacing | starts at | computes |
|---|---|---|---|
| ddim | trailing | t_min | DDIM with η = 0 on its trailing timesteps, which equals Euler in flow time on their nodes |
| flow | uniform | 0 | Euler's method in flow time |
| flow | trailing | 0 | Euler's method in flow time on DDIM's nodes, except for the first one |
| dpm++2m | trailing | t_min | diffusers' DPMSolverMultistepScheduler, second order, first order in the last step |

A naive-flow network keeps its own state and timestep. On DDIM's nodes it is integrated between the same flow times.
DPM-Solver++ has a form for such networks in diffusers (`use_flow_sigmas`, `flow_prediction`), uniform in flow time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.sampling.integrate import Velocity, sample_flow

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

SamplerName = Literal["ddim", "flow", "dpm++2m"]


@dataclass(frozen=True)
class Sampler:
    """A sampling method with the spacing of its nodes.

    Args:
        name: name of the method.
        spacing: "uniform" nodes in flow time, or the flow times of DDIM's "trailing" timesteps.
    """

    name: SamplerName
    spacing: Spacing

    @property
    def label(self) -> str:
        """Return the name in tables and captions."""
        names = {"ddim": "DDIM", "flow": "flow Euler", "dpm++2m": "DPM-Solver++(2M)"}
        return f"{names[self.name]}, {self.spacing}"


DDIM = Sampler("ddim", "trailing")
FLOW = Sampler("flow", "uniform")
FLOW_TRAILING = Sampler("flow", "trailing")
DPM = Sampler("dpm++2m", "trailing")
SAMPLERS = (DDIM, FLOW, FLOW_TRAILING, DPM)


def equal_sampler(sampler: Sampler, steps: int, flow: Flow) -> Sampler | None:
    """Return another sampler that generates the same images, or None if there is none.

    Both of two steps of DPM-Solver++ are of first order, and at first order DPM-Solver++ is DDIM.
    """
    return DDIM if sampler == DPM and steps <= 2 and isinstance(flow, Alignment) else None


def sample_latents(
    velocity: Velocity, noise: Tensor, sampler: Sampler, steps: int, flow: Flow, scheduler: "DDIMScheduler"
) -> Tensor:
    """Sample the latents of one batch.

    Args:
        velocity: flow velocity of the network, as `unet_velocity` makes it.
        noise: start noise [B, C, H, W] from N(0, 1).
        sampler: sampler to use.
        steps: network evaluations.
        flow: how the network's time and output relate to the flow: an `Alignment` or `NaiveFlow`.
        scheduler: scheduler of the base model; every sampler uses its noise schedule.

    Returns:
        Latents [B, C, H, W].
    """
    if sampler.name == "dpm++2m":
        return _dpm_solver(velocity, noise, steps, flow, scheduler)
    if sampler.spacing == "uniform":
        return _integrate(velocity, noise, flow.times(steps))
    # A naive-flow network has no trailing timesteps of its own, and is integrated on the base model's nodes too.
    alignment = Alignment.from_scheduler(scheduler)
    times, x_t = alignment.times(steps, "trailing"), noise
    if sampler.name == "ddim":
        # DDIM takes its start noise for the diffusion state at the last timestep.
        times[0] = alignment.t_min
        x_t = alignment.to_flow(noise, times[0])
    return _integrate(velocity, x_t, times)


def _integrate(velocity: Velocity, x_t: Tensor, times: Tensor) -> Tensor:
    """Integrate with Euler's method, and return the final state alone."""
    final = sample_flow(velocity, x_t, times=times)
    assert isinstance(final, Tensor)
    return final


def _dpm_solver(velocity: Velocity, noise: Tensor, steps: int, flow: Flow, base: "DDIMScheduler") -> Tensor:
    """Run diffusers' DPM-Solver++(2M) on noise - latents for a naive flow, or else on the noise in the state."""
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
        # diffusers rounds the timesteps of flow sigmas; the network is fed the exact time.
        t: Tensor = 1 - sigma if naive else alignment.flow_time(timestep)
        x_t = flow.to_flow(state, t)
        slope = velocity(x_t, t.to(noise.device))
        state = scheduler.step(-slope if naive else x_t - t * slope, timestep, state).prev_sample
    return state
