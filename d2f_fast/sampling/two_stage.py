"""`TwoStageSteps`: midpoint and Heun steps in two network evaluations, on the state that the network takes.

    midpoint: x' = x + (t' - t) v(x + (t_2 - t) v(x, t), t_2),   t_2 = (t + t') / 2
    Heun:     x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v(x, t), t')) / 2,   t_2 = t'

with the flow state x = n * sample. The last step is an Euler step, as in every scheduler of diffusers whose `order` is
2: N steps take 2 N - 1 evaluations, and pipelines that divide a schedule between two models count on it.
"""

import torch
from torch import Tensor

from d2f_fast.config import Method
from d2f_fast.flow.flow import Flow


class TwoStageSteps:
    """Take the steps of a schedule, one evaluation of the network after the other.

    After the first evaluation of a step the state stays that of the step's start, so that another model may take over
    after every evaluation. `network_input` returns what the second evaluation takes. A pipeline that does not call it
    gets the state of the second evaluation instead, and that of the start is kept here.

    Args:
        flow: map between the network's output and the velocity.
        method: "midpoint" or "heun".
        nodes: flow times between which the sampler steps, [steps + 1] float64 on the CPU.

    Attributes:
        times: flow times of the evaluations, [2 * steps - 1] float32 on the CPU.
    """

    def __init__(self, flow: Flow, method: Method, nodes: Tensor) -> None:
        self._flow = flow
        self._method = method
        second = (nodes[:-1] + nodes[1:]) / 2 if method == "midpoint" else nodes[1:]
        self.times = torch.stack([nodes[:-1], second], 1).flatten()[:-1].float()
        self._nodes = nodes.float()
        self._forget_step()

    def _forget_step(self) -> None:
        """Forget what is kept between the two evaluations of a step."""
        self._start: Tensor | None = None
        self._first_output: Tensor | None = None
        self._input_shape: torch.Size | None = None

    def state_time(self, index: int) -> Tensor:
        """Return the flow time of the state before an evaluation: that of the step's start where the state stays."""
        stays = self._first_output is not None and self._start is None
        return self._nodes[index // 2] if stays else self.times[index]

    def network_input(self, index: int, sample: Tensor) -> Tensor:
        """Return what the network takes in an evaluation: the state itself, except in the second one of a step.

        Args:
            index: index of the evaluation.
            sample: diffusion state, or several copies of it along the batch, as guidance needs them.
        """
        self._input_shape = sample.shape
        if self._first_output is None or self._start is not None:
            return sample
        output = torch.cat([self._first_output] * (len(sample) // len(self._first_output)))
        return self._second_state(index, sample.float(), output).to(sample.dtype)

    def step(self, index: int, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after an evaluation, and the one that the network was given.

        Args:
            index: index of the evaluation.
            model_output: output of the network, float32, same shape as `sample`.
            sample: diffusion state before `network_input`, float32.
        """
        start, first_output, shape = self._start, self._first_output, self._input_shape
        self._forget_step()
        if first_output is not None:
            given = self._second_state(index, sample, first_output) if start is None else sample
            return self._end(index, sample if start is None else start, first_output, given, model_output), given
        if index % 2 or index == len(self.times) - 1:
            end = self._nodes[index // 2 + 1]
            return self._euler(sample, model_output, self.times[index], end), sample
        self._first_output = model_output
        if shape is not None and shape[1:] == sample.shape[1:] and shape[0] % len(sample) == 0:
            return sample, sample
        self._start = sample
        return self._second_state(index + 1, sample, model_output), sample

    def _second_state(self, index: int, start: Tensor, first_output: Tensor) -> Tensor:
        """Return the state at the second evaluation of a step, whose index is given."""
        return self._euler(start, first_output, self.times[index - 1], self.times[index])

    def _euler(self, sample: Tensor, model_output: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Return the state that an Euler step from t to t_next leads to."""
        velocity = self._flow.velocity(model_output, sample, t)
        return self._flow.to_sample(self._flow.to_flow(sample, t) + (t_next - t) * velocity, t_next)

    def _end(self, index: int, start: Tensor, first_output: Tensor, second: Tensor, second_output: Tensor) -> Tensor:
        """Return the state after a step, from the states and outputs of its two evaluations."""
        t, t_second, t_end = self.times[index - 1], self.times[index], self._nodes[index // 2 + 1]
        slope = self._flow.velocity(second_output, second, t_second)
        if self._method == "heun":
            slope = (self._flow.velocity(first_output, start, t) + slope) / 2
        return self._flow.to_sample(self._flow.to_flow(start, t) + (t_end - t) * slope, t_end)
