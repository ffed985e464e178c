"""Keep an exponential moving average of the trained parameters.

    shadow = shadow - weight * (shadow - parameter)
    weight = max(1 - decay, 9 / (10 + k)), and 1 at k = 0          k = averages taken so far

This is the rule of `diffusers.training_utils.EMAModel`. Shadows are float32 whatever the parameters are: in bfloat16 an
update of relative size 1e-4 would round to nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from d2f_fast.errors import CheckpointError

MOST_ELEMENTS = 2**26  # of the parameters that are averaged together, 256 MB in float32


class EMA:
    """Exponential moving average of parameters, updated in place without waiting for the device.

    The counter and the weight are tensors on the parameters' device, and all state keeps its address, so that `step`
    can be compiled or captured in a CUDA graph.

    Args:
        parameters: trainable parameters by name, on their final device; they are read at each `step`.
        decay: weight of the old average in [0, 1] once the average is warm.
        warmup: let the decay rise as (1 + k) / (10 + k), from 0 at the first step, until it reaches `decay`; False uses
            `decay` from the first step on.

    Attributes:
        shadow: averages by parameter name, float32.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float = 0.9999, warmup: bool = True) -> None:
        if not parameters:
            raise ValueError("there are no parameters to average")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.parameters = dict(parameters)
        self.decay = decay
        self.warmup = warmup
        self.shadow = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self.parameters.items()
        }
        # The differences of all parameters together would take as much memory as the parameters.
        self._groups, size = list[list[str]](), MOST_ELEMENTS
        for name, tensor in self.shadow.items():
            if size + tensor.numel() > MOST_ELEMENTS:
                self._groups.append([])
                size = 0
            self._groups[-1].append(name)
            size += tensor.numel()
        self._updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.shadow.values())).device)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Move the average towards the parameters: `shadow.lerp_(parameter.float(), weight)` for each.

        Args:
            skip: 0-dim tensor, bool or float, on the parameters' device. If it is true or not 0, no bit of the average
                changes, even if parameters are NaN, and the step is not counted. None averages always.
        """
        weight = self._weight()
        keep = None if skip is None else skip == 0
        for names in self._groups:
            shadow = [self.shadow[name] for name in names]
            difference = torch._foreach_sub(shadow, [self.parameters[name].float() for name in names])
            torch._foreach_mul_(difference, weight)
            if keep is not None:
                # The differences are zeroed as integers, to +0.0, which changes nothing when it is subtracted. As
                # floats, 0 * NaN is NaN, and 0 * -1 is -0.0, which turns a shadow of -0.0 into 0.0.
                torch._foreach_mul_([tensor.view(torch.int32) for tensor in difference], keep.to(torch.int32))
            torch._foreach_sub_(shadow, difference)
        self._updates += 1 if keep is None else keep

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Hold the averages in the parameters inside a `with` block; then the trained values return, bit for bit.

        The parameters keep their storage. Memory for one copy of them is needed.
        """
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        trained = [parameter.clone() for parameter in parameters]
        try:
            torch._foreach_copy_(parameters, list(self.shadow.values()))
            yield
        finally:
            torch._foreach_copy_(parameters, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as one flat dictionary of tensors (not copies): `shadow.{name}` and `updates`."""
        return {f"shadow.{name}": tensor for name, tensor in self.shadow.items()} | {"updates": self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the result of `state_dict`, from any device, into this average.

        Raises:
            CheckpointError: a key is missing or unknown, or a shape differs; nothing is changed.
        """
        own = self.state_dict()
        for key in sorted(own.keys() ^ state.keys()):
            raise CheckpointError(
                f"EMA state: {key} is {'missing' if key in own else 'unknown'}; resume with the settings that the "
                "checkpoint was made with"
            )
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise CheckpointError(
                    f"EMA state: {key} has shape {list(state[key].shape)}, not {list(tensor.shape)}; resume with the "
                    "settings that the checkpoint was made with"
                )
        for key, tensor in own.items():
            tensor.copy_(state[key])

    def _weight(self) -> Tensor:
        """Return the weight of the parameters in the new average, 1 - decay at this step, as a 0-dim float32 tensor."""
        weight = torch.full_like(self._updates, 1 - self.decay, dtype=torch.float32)
        if not self.warmup:
            return weight
        # This is 1 - (1 + k) / (10 + k) without the cancellation, and 1 at k = 0.
        rising = torch.maximum(9 / (10 + self._updates), self._updates == 0)
        return torch.maximum(rising, weight)
