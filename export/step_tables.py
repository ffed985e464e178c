"""Compute the tables of numbers that a sampler takes: which timesteps, and how far each step goes.

    sample' = A_k * sample + B_k * output

An Euler step in flow time is linear in the diffusion state (`euler_coefficients`). A schedule, a number of steps and a
prediction type therefore come down to three vectors of K numbers: the timesteps that the network is fed, A and B,
computed here in float64 and rounded once. The state starts as N(0, 1) noise.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2f_fast.export.exported_files import TABLE_INPUTS
from d2f_fast.flow.alignment import SIGMA_OF_PURE_NOISE
from d2f_fast.flow.flow import Flow


@dataclass(frozen=True)
class StepTable:
    """Everything that a sampler of K steps takes from the flow.

    Args:
        times: flow times of the nodes between steps, [K + 1], rising to 1; the first is 0, or the one
            of the noisiest timestep.
        timesteps: fractional timesteps that the network is fed, [K].
        coef_x: factor A of the state in each step, [K].
        coef_out: factor B of the network's output in each step, [K].
        alphas: weight of the latents in the network's state at the nodes, [K + 1].
        noise_scales: weight of the noise in the network's state at the nodes, [K + 1].
        sigmas: sigmas of a stock scheduler at the nodes, [K + 1], ending in 0.
    """

    times: list[float]
    timesteps: list[float]
    coef_x: list[float]
    coef_out: list[float]
    alphas: list[float]
    noise_scales: list[float]
    sigmas: list[float]

    def feed(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the inputs of the sampler graph that hold the table."""
        return {name: np.asarray(getattr(self, name), np.float32) for name in TABLE_INPUTS}


def step_table(flow: Flow, steps: int, shift: float = 1.0) -> StepTable:
    """Return the table of an Euler sampler with uniform nodes in flow time, computed in float64.

    Args:
        flow: flow that reads the network's output as a velocity.
        steps: number of steps, at least 1.
        shift: positive factor on (1 - t) / t at each node; 1 leaves the nodes uniform.
    """
    return _table(flow, flow.times(steps, shift=shift).double(), flow.sigmas(steps, shift))


def trailing_table(flow: Flow, steps: int) -> StepTable:
    """Return the table of the steps that diffusers' DDIM takes with trailing timesteps, from the noisiest one on.

    They are those of a stock `MarigoldDepthPipeline`, and equal where `steps` divides the number of timesteps; for
    others DDIM takes its last timesteps one off.

    Args:
        flow: flow of a diffusion model.
        steps: number of steps, from 1 to the number of timesteps.
    """
    trained = flow.num_train_timesteps
    timesteps = (trained * (1 - torch.arange(steps, dtype=torch.float64) / steps)).round() - 1
    nodes = torch.cat([flow.flow_time(timesteps), torch.ones(1, dtype=torch.float64)])
    sigmas = ((1 - nodes) / nodes).clamp(max=SIGMA_OF_PURE_NOISE)  # It is infinite at zero terminal SNR.
    return _table(flow, nodes, sigmas.tolist())


def _table(flow: Flow, nodes: Tensor, sigmas: list[float]) -> StepTable:
    """Return the table of Euler steps between flow times, [K + 1] float64."""
    a, b = flow.euler_coefficients(nodes[:-1], nodes[1:])
    n = flow.state_scale(nodes)
    return StepTable(
        times=nodes.tolist(),
        timesteps=flow.timestep(nodes[:-1]).tolist(),
        coef_x=a.tolist(),
        coef_out=b.tolist(),
        alphas=(nodes / n).tolist(),
        noise_scales=((1 - nodes) / n).tolist(),
        sigmas=sigmas,
    )


def write_tables(path: Path, tables: Mapping[int, StepTable]) -> None:
    """Write `steps.json`, which holds step tables by number of steps."""
    path.write_text(
        json.dumps({str(steps): asdict(table) for steps, table in tables.items()}, indent=1, allow_nan=False) + "\n"
    )
