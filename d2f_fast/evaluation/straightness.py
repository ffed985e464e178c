"""Measure how straight the paths of a flow are, in equal segments of flow time.

A path that is straight and travelled at constant speed is integrated exactly by one Euler step.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.integrate import Velocity, sample_flow


@dataclass(frozen=True)
class Straightness:
    """Measures of the paths in each segment of flow time, from t = 0 on; all of them are 0 for straight paths.

    Args:
        deviation: mean of ‖velocity - (x_1 - x_0)‖² over the segment, divided by the mean of ‖x_1 - x_0‖²; its mean
            over the segments is the straightness of Liu et al., arXiv 2209.03003, equation 6, relative to the length.
        curvature: root mean square of the velocity's derivative along the path, d velocity / d t, divided by the root
            mean square of x_1 - x_0.
        step_error: root mean square of the error of one Euler step over the segment, from the exact path's state,
            divided by the root mean square of the segment's displacement.
    """

    deviation: tuple[float, ...]
    curvature: tuple[float, ...]
    step_error: tuple[float, ...]

    @property
    def mean_deviation(self) -> float:
        """Return the mean of the deviation over the segments."""
        return sum(self.deviation) / len(self.deviation)


@torch.no_grad()
def measure_straightness(
    velocity: Velocity, noise: Tensor, segments: int = 8, steps_per_segment: int = 8
) -> Straightness:
    """Measure the paths that begin at a batch of noise, on a fine Runge-Kutta integration of them.

    The velocity is evaluated five times a step of the fine integration: 320 times with the defaults.

    Args:
        velocity: function of the flow state [B, ...] and the flow time ([] float32) that returns the velocity [B, ...].
        noise: start of the paths, [B, ...] from N(0, 1).
        segments: number of equal segments of flow time, at least 1.
        steps_per_segment: steps of the fine integration in each segment, an even number.

    Raises:
        RefusedInputError: The paths are not finite, or do not move over a segment or from start to end, so that
            nothing can be measured relative to their length.
        ValueError: `segments` is below 1, or `steps_per_segment` is not a positive even number.
    """
    if segments < 1 or steps_per_segment < 2 or steps_per_segment % 2:
        raise ValueError(
            f"segments must be at least 1 and steps_per_segment even, got {segments} and {steps_per_segment}"
        )
    times = torch.linspace(0, 1, segments * steps_per_segment + 1)
    states = sample_flow(velocity, noise, times=times, method="rk4", return_intermediates=True)
    displacement = states[-1] - states[0]
    length = _mean_square(displacement)
    if not math.isfinite(length):
        raise RefusedInputError(
            "the paths of the model hold NaN or infinity: check its prediction_type, and look at its images with d2f"
            " sample"
        )
    _check_moved(length, "the paths of the model end where they begin")
    width, step = 1 / segments, 1 / (segments * steps_per_segment)
    # Simpson's rule weighs the ends of a segment, its odd nodes and its even nodes by 1, 4 and 2.
    weights = [4 if i % 2 else 2 for i in range(steps_per_segment + 1)]
    weights[0] = weights[-1] = 1
    deviation, curvature, step_error = [], [], []
    slope = velocity(states[0], times[0].to(noise.device))
    for segment in range(segments):
        first = segment * steps_per_segment
        slopes = [slope]
        for node in range(first + 1, first + steps_per_segment + 1):
            slopes.append(velocity(states[node], times[node].to(noise.device)))
        squares = [_mean_square(one - displacement) for one in slopes]
        deviation.append(sum(w * s for w, s in zip(weights, squares, strict=True)) / (3 * steps_per_segment * length))
        changes = [_mean_square(b - a) for a, b in itertools.pairwise(slopes)]
        curvature.append((sum(changes) / (len(changes) * step**2 * length)) ** 0.5)
        moved = states[first + steps_per_segment] - states[first]
        covered = _mean_square(moved)
        _check_moved(covered, f"the paths of the model do not move in part {segment + 1} of {segments} of flow time")
        step_error.append((_mean_square(moved - width * slope) / covered) ** 0.5)
        slope = slopes[-1]
    return Straightness(tuple(deviation), tuple(curvature), tuple(step_error))


def _check_moved(mean_square: float, problem: str) -> None:
    """Refuse a displacement of zero, relative to which nothing can be measured."""
    if not mean_square > 0:
        raise RefusedInputError(f"{problem}, so that their straightness is not defined: check the weights of the model")


def _mean_square(tensor: Tensor) -> float:
    """Return the mean of the squared elements."""
    return float(tensor.double().square().mean())
