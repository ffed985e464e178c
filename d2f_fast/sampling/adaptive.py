"""Integrate a velocity with steps whose size is chosen by an estimate of the error."""

from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.formulas import at_least_float32
from d2f_fast.sampling.integrate import Velocity, monotone_times


def sample_flow_adaptive(
    velocity: Velocity,
    x_t: Tensor,
    times: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    return_intermediates: bool = False,
) -> Tensor | list[Tensor]:
    """Solve d x_t / d t = velocity(x_t, t) by Dormand and Prince's method of fifth order, from torchdiffeq.

    The error is estimated over the whole batch, so that the steps, and in its last digits the result, depend on what
    else is in the batch. Each step waits for the GPU to decide on the next one. The solver works in float32, or in
    float64 for a float64 state.

    Args:
        velocity: function of the flow state [B, ...] and the flow time, [], that returns the velocity [B, ...].
        x_t: flow state at times[0]; at t = 0 it is noise from N(0, 1).
        times: strictly monotone flow times, at least two, at which the state is wanted; falling times go from data to
            noise (inversion). None for 0 and 1. They do not bound the steps.
        rtol: error that is tolerated in a step, relative to the state.
        atol: error that is tolerated in a step beside the relative one.
        return_intermediates: return the states at all times, times[0] included, in place of the last one alone.

    Returns:
        The state at times[-1], in the type of `x_t`; or the list of the states at all times.

    Raises:
        RefusedInputError: torchdiffeq is not installed.
        ValueError: a tolerance is not positive, or the times are not strictly monotone.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise RefusedInputError(
            'the method "dopri5" needs torchdiffeq: pip install torchdiffeq, or choose another method'
        ) from error
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}")
    start = at_least_float32(x_t)
    nodes = monotone_times(times, 1).to(start)

    def slope(t: Tensor, state: Tensor) -> Tensor:
        return velocity(state.to(x_t.dtype), t).to(start.dtype)

    states: Tensor = odeint(slope, start, nodes, rtol=rtol, atol=atol, method="dopri5").to(x_t.dtype)
    return list(states) if return_intermediates else states[-1]
