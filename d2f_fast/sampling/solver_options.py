"""Options of solvers and of guidance that the stock pipelines do not have. Imports no torch."""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import get_args

from d2f_fast.config import Method, SamplingMethod, StochasticMethod, at_least, check_options, option, positive
from d2f_fast.errors import RefusedInputError

DEFAULT_RTOL, DEFAULT_ATOL, DEFAULT_DIFFUSION = 1e-5, 1e-6, 1.0
_METHODS = {"rtol": ("dopri5",), "atol": ("dopri5",), "diffusion": get_args(StochasticMethod)}


def check_method_of_source(method: SamplingMethod) -> None:
    """Refuse a method that adds noise where the flow starts from an image.

    Args:
        method: Integration method.

    Raises:
        RefusedInputError: It is a stochastic method, whose formula needs a start of noise alone.
    """
    if method in get_args(StochasticMethod):
        raise RefusedInputError(
            f"method {method} needs a flow that starts from noise, and this one starts from an image: give --method"
            " euler or rk4"
        )


@dataclass(frozen=True)
class SolverOptions:
    """Hold the options that only some of the integration methods have.

    Args:
        guidance_interval: Lowest and highest flow time at which guidance is on. Elsewhere the prompt alone is used, in
            half the time. An error where guidance is off. Default: guidance at all times.
        rtol: Relative error of a step of --method dopri5; an error with another method. Default: 1e-5.
        atol: Absolute error of a step of --method dopri5; an error with another method. Default: 1e-6.
        diffusion: Strength of the noise that --method euler_maruyama and stochastic_heun add and take out again. 0 adds
            none. An error with another method. Default: 1.

    Raises:
        RefusedInputError: An option has a value that it does not take.
    """

    guidance_interval: tuple[float, float] | None = option("sampling", None, metavar="LOW HIGH")
    rtol: float | None = option("sampling", None, positive(1.0))
    atol: float | None = option("sampling", None, positive(1.0))
    diffusion: float | None = option("sampling", None, at_least(0, 100.0))

    def __post_init__(self) -> None:
        """Refuse values that an option does not take."""
        check_options(self)
        if self.guidance_interval is not None:
            lowest, highest = self.guidance_interval
            if not 0 <= lowest < highest <= 1:
                raise RefusedInputError(
                    f"guidance_interval must be two rising flow times from 0 to 1, got {lowest} and {highest}"
                )

    def check(self, method: SamplingMethod, guidance_scale: float) -> None:
        """Refuse options that have no effect, and a method whose package is missing.

        Args:
            method: Integration method.
            guidance_scale: Scale of classifier-free guidance.

        Raises:
            RefusedInputError: An option cannot be used; the message says what to change.
        """
        for name, methods in _METHODS.items():
            if getattr(self, name) is not None and method not in methods:
                raise RefusedInputError(
                    f"{name} has no effect with the method {method}: leave it out, or give --method {methods[0]}"
                )
        if self.guidance_interval is not None and guidance_scale <= 1:
            raise RefusedInputError(
                f"guidance_interval has no effect with guidance_scale {guidance_scale:g}, which turns guidance off:"
                " leave it out"
            )
        if method == "dopri5" and find_spec("torchdiffeq") is None:
            raise RefusedInputError(
                'the method "dopri5" needs torchdiffeq: pip install torchdiffeq, or choose another method'
            )

    def given(self) -> dict[str, object]:
        """Return the options that were given, by name."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def needs_solver(self, method: SamplingMethod) -> bool:
        """Return whether the stock pipelines cannot serve these options with a method."""
        return method not in get_args(Method) or self.guidance_interval is not None
