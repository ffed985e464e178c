"""`Diff2FlowScheduler`: sample along flow time in any stock diffusers pipeline.

This is the only file in diffusers' time direction: `timesteps` fall from the noise to the data. The state is the
diffusion state, so that `init_noise_sigma` is 1, and `scale_model_input` returns the state itself except within a
midpoint or Heun step. Pipelines that never scale are served, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args, overload

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from d2f_fast.config import FlowForm, Method, Spacing
from d2f_fast.errors import ModelError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import combine
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.flow.scheduler_config import NUM_TRAIN_TIMESTEPS, predicts_flow
from d2f_fast.sampling.two_stage import TwoStageSteps

# Options that a scheduler reads from the configuration of another one, whether they were given there or are defaults.
_NOISE_TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)

# A first sigma that exceeds sigma_max by more than this fraction asks for a start at t = 0; less is a rounding error.
_SIGMA_TOLERANCE = 1e-3

# Some pipelines feed the network whole timesteps, which then differ from those of the schedule by less than 1.
_TIMESTEP_TOLERANCE = 1.0


@dataclass
class Diff2FlowSchedulerOutput(BaseOutput):
    """State after a step, and the latents x̂0 that the network's output implies."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Diff2FlowScheduler(SchedulerMixin, ConfigMixin):
    """Sample a diffusion model along flow time, finetuned on flow matching or not.

        pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)

    Its Euler method equals DDIM (η = 0) between the same flow times. `prediction_type="flow_prediction"` samples naive
    rectified-flow networks.

    Args:
        num_train_timesteps: number of timesteps that the base model was trained with, as in every diffusers scheduler.
        beta_start: first beta of the base model's noise schedule.
        beta_end: last beta of the base model's noise schedule.
        beta_schedule: name of the base model's noise schedule.
        trained_betas: betas of the base model, which replace the three options before; None to use those.
        prediction_type: what the network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
        rescale_betas_zero_snr: whether the base model was trained with zero terminal SNR.
        flow_spacing: "uniform" steps in flow time, or "trailing", the flow times of DDIM's trailing timesteps.
        shift: positive factor on the sampling sigmas (1 - t) / t; 1 leaves them as they are.
        method: integration method: "euler", or "midpoint" and "heun", which call the network twice in every step but
            the last one. That is an Euler step.
        fm_form: form of "flow_prediction": "diffusers", or "published" for networks that are fed t itself; see
            `NaiveFlow`. The other prediction types ignore it.

    Raises:
        ModelError: the network predicts ε with zero terminal SNR, or the prediction type is unknown.
        ValueError: the method or the form is unknown.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 (the name and type are diffusers')
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        flow_spacing: Spacing = "uniform",
        shift: float = 1.0,
        method: Method = "euler",
        fm_form: FlowForm = "diffusers",
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        # Another scheduler that is made of this configuration replaces what is listed here by its own defaults.
        defaults = self.config.get("_use_default_values", ())
        self.register_to_config(_use_default_values=[name for name in defaults if name not in _NOISE_TABLE])
        self.order = 1 if method == "euler" else 2
        flow: Flow
        if prediction_type == "flow_prediction":
            flow = NaiveFlow(num_train_timesteps, fm_form)
        else:
            stock = DDPMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                prediction_type=prediction_type,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )
            self.alphas_cumprod = stock.alphas_cumprod
            flow = Alignment.from_scheduler(stock)
        self.flow = flow
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._nodes = torch.empty(0)
        self._stage_times = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._two_stage: TwoStageSteps | None = None

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, object], return_unused_kwargs: Literal[False] = False, **kwargs: object
    ) -> Self: ...
    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, object], return_unused_kwargs: Literal[True], **kwargs: object
    ) -> tuple[Self, dict[str, object]]: ...
    @classmethod
    def from_config(
        cls, config: Mapping[str, object], return_unused_kwargs: bool = False, **kwargs: object
    ) -> Self | tuple[Self, dict[str, object]]:
        """Return the scheduler of the model to which another scheduler's configuration belongs.

        Args:
            config: configuration of a scheduler of diffusers, for diffusion or flow matching.
            return_unused_kwargs: also return the options of `kwargs` that are unknown.
            kwargs: options that replace those of the configuration.

        Raises:
            ModelError: the configuration has no noise table, and does not belong to a flow-matching scheduler.
        """
        config = dict(config)
        # diffusers drops the values that the other scheduler took by default. Those that describe the model are kept,
        # because the defaults of this class give another noise table.
        defaults = cast(Sequence[str], config.get("_use_default_values", ()))
        config["_use_default_values"] = [name for name in defaults if name not in (*_NOISE_TABLE, "shift")]
        if predicts_flow(config):
            config["prediction_type"] = "flow_prediction"
        elif "beta_schedule" not in config | kwargs:
            raise ModelError("the configuration has no beta_schedule: give the configuration of a diffusion scheduler")
        if config.get("use_flow_sigmas"):
            config.setdefault("shift", config.get("flow_shift", 1.0))
        made: Self | tuple[Self, dict[str, object]] = super().from_config(config, return_unused_kwargs, **kwargs)
        return made

    @property
    def step_index(self) -> int | None:
        """Return the index of the next network evaluation, or None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Return the index of the first network evaluation; pipelines that start from a noised image set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later network evaluation of the schedule.

        Args:
            begin_index: index of that evaluation; 0 starts at the beginning.
        """
        self._begin_index = begin_index

    @property
    def sigmas(self) -> Tensor:
        """Return (1 - t) / t at every node, infinite at t = 0, or 1 - t for flow_prediction.

        The sigmas are [steps + 1] float32 on the CPU.
        """
        noise = 1 - self._nodes
        return noise if isinstance(self.flow, NaiveFlow) else noise / self._nodes

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Choose the nodes, the flow times between which the sampler steps.

        Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given.

        Args:
            num_inference_steps: number of steps from t = 0 to t = 1, spaced as the configuration says.
            device: device of the scheduler's `timesteps`.
            timesteps: falling diffusion timesteps at which the steps start, [steps], which may be fractional; the last
                step ends at t = 1. A first one of T - 1 starts at t_min, as in a stock scheduler; `sigmas` start at 0.
            sigmas: [steps + 1], ending in 0.0; as in diffusers (1 - t) / t, where a first one above sigma_max starts at
                t = 0, or 1 - t for flow_prediction.

        Raises:
            ValueError: none or several of the three are given, they do not fall or are outside their range, or sigmas
                do not end in 0.0.
        """
        if sum(choice is not None for choice in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        flow = self.flow
        if num_inference_steps is not None:
            nodes = flow.times(num_inference_steps, self.config["flow_spacing"], self.config["shift"])
        elif timesteps is not None:
            given = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
            least, most = sorted(flow.timestep(torch.tensor([0.0, 1.0])).tolist())
            if not bool(((given >= least) & (given <= most)).all()):
                raise ValueError(f"timesteps must be in [{least:g}, {most:g}], got {given.tolist()}")
            nodes = torch.cat([flow.flow_time(given), torch.ones(1)])
        else:
            given = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
            if len(given) == 0 or given[-1] != 0:
                raise ValueError(f"sigmas must end in 0.0 (steps + 1 values), got {given.tolist()}")
            nodes = 1 - given if isinstance(flow, NaiveFlow) else 1 / (1 + given)
        nodes = nodes.double()
        if len(nodes) < 2 or nodes[0] < 0 or not bool((nodes.diff() > 0).all()):
            raise ValueError(f"the nodes must fall from noise to data, got flow times {nodes.tolist()}")
        if sigmas is not None and nodes[0] < flow.t_min * (1 - _SIGMA_TOLERANCE):
            nodes[0] = 0
        self.num_inference_steps = len(nodes) - 1
        self._nodes = nodes.float()
        if self.order == 2:
            self._two_stage = TwoStageSteps(flow, self.config["method"], nodes)
            self._stage_times = self._two_stage.times
        else:
            self._stage_times = nodes[:-1].float()
            # As host floats they make a step one fused multiply-add, with nothing to copy to the device.
            coefficients = flow.euler_coefficients(nodes[:-1], nodes[1:])
            self._euler = list(zip(*(c.tolist() for c in coefficients), strict=True))
        self.timesteps = flow.timestep(self._stage_times).to(device)
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return what the network takes: the state itself, except for the second evaluation of a step.

        Args:
            sample: diffusion state, or several copies of it along the batch, as guidance needs them.
            timestep: ignored.
        """
        return sample if self._two_stage is None else self._two_stage.network_input(self._step_index or 0, sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Diff2FlowSchedulerOutput | tuple[Tensor, Tensor]:
        """Advance the diffusion state by one network evaluation.

        Args:
            model_output: output of the network, after guidance, same shape as `sample`.
            timestep: timestep that the network was fed. The first one of a run says where the run starts, unless
                `set_begin_index` said so; later ones are ignored, because two nodes may have the same timestep.
            sample: diffusion state, before `scale_model_input`.
            generator: ignored: the sampler is deterministic.
            return_dict: return an output object; False for a tuple of the same two tensors.

        Returns:
            The diffusion state after the step, and the latents that the output implies, in the type of `sample`.

        Raises:
            ValueError: `set_timesteps` was not called, the schedule has ended, or the first timestep is not in it.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        index = self._first_index(timestep) if self._step_index is None else self._step_index
        if index >= len(self._stage_times):
            raise ValueError(
                f"the schedule of {len(self._stage_times)} evaluations has ended: call set_timesteps again"
            )
        if self._two_stage is None:
            a, b = self._euler[index]
            moved, given = a * sample.float() + b * model_output.float(), sample
        else:
            moved, given = self._two_stage.step(index, model_output.float(), sample.float())
        self._step_index = index + 1
        # The flow time stays on the host, because CPU scalars multiply tensors of any device without a copy.
        latents = self.flow.predicted_latents(model_output, given, self._stage_times[index]).to(sample.dtype)
        moved = moved.to(sample.dtype)
        return Diff2FlowSchedulerOutput(moved, latents) if return_dict else (moved, latents)

    def _first_index(self, timestep: Tensor | float) -> int:
        """Return the index of a run's first evaluation: the one that was set, or else that of the timestep."""
        if self._begin_index is not None:
            return self._begin_index
        first = torch.as_tensor(timestep).detach().cpu().flatten()[0]
        distances = (self.timesteps.cpu() - first).abs()
        nearest: list[int] = (distances == distances.min()).nonzero().flatten().tolist()
        if not distances.min() < _TIMESTEP_TOLERANCE:
            raise ValueError(f"timestep {float(first)} is not in the schedule {self.timesteps.tolist()}")
        # Of a Heun step's two equal timesteps the run starts at the one that begins a step.
        return next((index for index in nearest if index % self.order == 0), nearest[0])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the diffusion state of latents at the current node of a run, or at `timesteps` outside a run.

        Args:
            original_samples: clean latents, [B, C, H, W].
            noise: Gaussian noise, same shape.
            timesteps: diffusion timesteps, [B] or [1]; ignored within a run, which `set_begin_index` starts. Those
                of the schedule stand for its nodes.
        """
        index = self._begin_index if self._step_index is None else self._step_index
        if self._begin_index is not None and index is not None and index < len(self._stage_times):
            t = self._stage_times[index] if self._two_stage is None else self._two_stage.state_time(index)
        else:
            t = self._flow_times(timesteps.detach().cpu(), index or 0)
        t = t.to(original_samples.device).expand(len(original_samples))
        n = self.flow.state_scale(t)
        return combine(t / n, original_samples, (1 - t) / n, noise)

    def _flow_times(self, timesteps: Tensor, first: int) -> Tensor:
        """Return the flow times of timesteps: those of equal nodes from index `first` on, or else of the table."""
        # The two differ below t_min, where the node t = 0 has the timestep of t_min.
        times = self.flow.flow_time(timesteps)
        if self.num_inference_steps is None or first >= len(self._stage_times):
            return times
        equal = timesteps.reshape(-1, 1) == self.timesteps[first:].cpu()
        return torch.where(equal.any(1), self._stage_times[first:][equal.int().argmax(1)], times.reshape(-1))

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
