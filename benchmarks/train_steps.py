"""Take the training steps that bench_train_step compares: one optimizer step on latents and text in memory.

    PeftStep      the loop of diffusers' LoRA scripts with peft's layers and the Diff2Flow loss in plain torch; `Levers`
                  turn on everything that makes it faster without this package's kernels
    TrainerStep   `AlignedTrainer.step`

Both sample noise and times, compute the loss and its gradients, clip them and step AdamW at a constant learning rate.
Neither averages weights unless a row's name says so.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import clock
from benchmarks.unets import CONFIGS, Case, batch_of, build, set_adapter
from d2f_fast import AlignedTrainer, Alignment, TrainingConfig, load_miniature
from d2f_fast.kernels.align import align_reference
from d2f_fast.kernels.velocity_loss import velocity_loss_reference
from d2f_fast.lora.inject import inject_lora, lora_layers
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.compiled import CompiledBlocks
from d2f_fast.training.objective import Objective

LEARNING_RATE, BETAS, MAX_NORM = 1e-4, (0.9, 0.999), 1.0
WARM_UP_STEPS = 3
EVALUATED_AT_ONCE = 4  # images; eagerly each keeps 1 GiB with Stable Diffusion 1.5, beside the step that is compared
NoiseAndTimes = tuple[Tensor, Tensor]  # noise [B, C, H, W] and t [B]


@dataclasses.dataclass(frozen=True)
class Levers:
    """Settings of a step with peft's layers; the defaults are those of diffusers' scripts.

    Args:
        adapter: Train an adapter. Without it nothing is trained, and the gradient of the latents is computed so that
            there is a backward pass.
        input_cast: Let peft cast the input to the type of A and B.
        compiled: Part that is compiled: "" for none, "network", "step" for the loss with the network in it, or "blocks"
            for the blocks that `TrainingConfig(compile="regional")` compiles.
        mode: mode of torch.compile.
        channels_last: Keep weights and latents in the channels-last layout.
        fused: Step AdamW in one kernel, and never read the loss back to the host.
        captured: Replay the whole step as one CUDA graph.
    """

    adapter: bool = True
    input_cast: bool = True
    compiled: str = ""
    mode: str = "default"
    channels_last: bool = False
    fused: bool = False
    captured: bool = False


def scheduler() -> DDIMScheduler:
    """Return a scheduler with the noise schedule of Stable Diffusion 1.5."""
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**table, clip_sample=False, steps_offset=1)


class PeftStep:
    """A step of diffusers' LoRA scripts, with or without the levers that make it faster.

    Args:
        case: network, sizes and adapter.
        device: device of the step.
        levers: settings of the step.

    Attributes:
        loss: loss of the last step, [] float32.
        noise_and_times: noise and t of the last step.
    """

    def __init__(self, case: Case, device: torch.device, levers: Levers) -> None:
        self.case, self.levers, self._device = case, levers, device
        batch, self._unet = batch_of(case, device), build(case, device)
        self._layout = torch.channels_last if levers.channels_last else torch.contiguous_format
        self._unet.to(memory_format=self._layout).train()
        self._latents = batch.pop("latents").contiguous(memory_format=self._layout)
        self._condition = batch
        self.noise_and_times: NoiseAndTimes = torch.empty_like(self._latents), torch.empty(case.batch, device=device)
        self.loss, self._loss_read = torch.zeros((), device=device), 0.0
        self._alignment = Alignment.from_scheduler(scheduler()).to(device)
        self.trainable: Mapping[str, Any] = {"latents": self._latents.requires_grad_()}
        self.optimizer: Any = None
        if levers.adapter:
            self._latents.requires_grad_(False)
            self.trainable = inject_lora(self._unet, case.rank, target_modules=case.targets)
            set_adapter(self.trainable)
            for layer in lora_layers(self._unet).values():
                layer.cast_input_dtype_enabled = levers.input_cast
            options = {"fused": True, "capturable": device.type == "cuda"} if levers.fused else {}
            self.optimizer = torch.optim.AdamW(
                self.trainable.values(), LEARNING_RATE, BETAS, weight_decay=1e-2, **options
            )
        self._run = self._mean_loss
        if levers.compiled == "network":
            self._unet.compile(mode=levers.mode)
        elif levers.compiled == "step":
            self._run = torch.compile(self._mean_loss, fullgraph=True, mode=levers.mode)
        elif levers.compiled == "blocks":
            CompiledBlocks(self._unet, device).__enter__()
        self._graph: Any = None

    def __call__(self) -> None:
        """Take one step; the first one compiles and captures."""
        if not self.levers.captured:
            return self._step()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def restore(self) -> None:
        """Set the parameters and the optimizer back to their initial state, in place."""
        if self.levers.adapter:
            set_adapter(self.trainable)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def gradients(self) -> dict[str, Tensor]:
        """Return the clipped gradients of the first step after `restore`, read from AdamW's first moment."""
        return first_moments(self.trainable, self.optimizer) if self.levers.adapter else {}

    def evaluate(self, noise_and_times: NoiseAndTimes, zero_adapter: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the clipped gradients of the initial parameters, without taking a step.

        Args:
            noise_and_times: noise and t of the whole batch, which is computed a few images at a time.
            zero_adapter: Set A and B to zero first.
        """
        set_adapter(self.trainable)
        if zero_adapter:
            nn.utils.vector_to_parameters(
                torch.zeros_like(nn.utils.parameters_to_vector(self.trainable.values())), self.trainable.values()
            )
        self.optimizer.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=self._device)
        for first in range(0, self.case.batch, EVALUATED_AT_ONCE):
            part = slice(first, first + EVALUATED_AT_ONCE)
            noise, t = (tensor[part] for tensor in noise_and_times)
            condition = tree_map(lambda tensor, part=part: tensor[part], self._condition)
            loss = self._forward(self._latents[part], noise, t, condition) * (len(t) / self.case.batch)
            loss.backward()
            mean += loss.detach()
        nn.utils.clip_grad_norm_(self.trainable.values(), MAX_NORM)
        gradients = {name: parameter.grad for name, parameter in self.trainable.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return mean, gradients

    def _forward(self, latents: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        low = self.case.dtype != torch.float32
        with torch.autocast(self._device.type, self.case.dtype if low else torch.bfloat16, enabled=low):
            return self._run(latents, noise, t, condition)

    def _mean_loss(self, latents: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        flow = self._alignment
        table = flow.rising_flow_times(torch.float32)
        sample, timestep = align_reference(latents, noise, t, table, flow.t_min, flow.num_train_timesteps)
        output = self._unet(sample.to(self.case.dtype), timestep, **condition, return_dict=False)[0]
        settings = (flow.prediction_type, flow.t_min, flow.t_max, "flow", 5.0)
        return velocity_loss_reference(output, latents, noise, t, None, *settings)[0].mean()

    def _step(self) -> None:
        noise, t = self.noise_and_times
        noise.normal_()
        t.uniform_()
        for parameter in self.trainable.values():
            parameter.grad = None
        loss = self._forward(self._latents, *self.noise_and_times, self._condition)
        loss.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trainable.values(), MAX_NORM)
            self.optimizer.step()
        self.loss.copy_(loss.detach())
        if not self.levers.fused:
            self._loss_read += self.loss.item()  # the scripts read it for their progress bar

    def _capture(self) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


class TrainerStep:
    """`AlignedTrainer.step` on a batch in memory.

    Args:
        case: network, sizes and adapter.
        device: device of the step.
        options: options of `TrainingConfig` beside those of the case.

    Attributes:
        loss: loss of the last step, [] float32.
    """

    def __init__(self, case: Case, device: torch.device, **options: Any) -> None:
        self.case, self.batch = case, batch_of(case, device)
        self.trainer = trainer_of(build(case, device), case, **options)
        set_adapter(self.trainer.trainable)
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        """Take one step; the first one compiles and captures."""
        self.loss = self.trainer.step(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """Return the clipped gradients of the first step, read from AdamW's first moment."""
        return first_moments(self.trainer.trainable, self.trainer.optimizer)


def first_step_seconds(case: Case, device: torch.device, options: Mapping[str, Any]) -> float:
    """Return the seconds of the first `TrainerStep`, compiling and capturing included; call it in a fresh process."""
    step = TrainerStep(case, device, **options)
    return clock.seconds_of(step, device, 1)


def trainer_of(unet: Any, case: Case, **options: Any) -> AlignedTrainer:
    """Return a trainer of a network; the parts that no step uses come from the miniature."""
    small = load_miniature()
    parts = {**small.components, "unet": unet, "scheduler": scheduler()}
    config = TrainingConfig(
        output_dir=tempfile.gettempdir(),
        rank=case.rank,
        target_modules=case.targets,
        resolution=8 * case.side,
        train_batch_size=case.batch,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=MAX_NORM,
        caption_dropout=0.0,
        gradient_checkpointing=case.checkpointing,
        mixed_precision="no" if case.dtype == torch.float32 else "bf16",
        **{"ema_decay": 0.0, **options},
    )
    return AlignedTrainer(BaseModel(StableDiffusionPipeline(**parts, requires_safety_checker=False)), config)


def trainer_noise_and_times(case: Case, device: torch.device) -> NoiseAndTimes:
    """Return the noise and t that every `AlignedTrainer` samples in its first step on a batch of this shape."""
    small = dataclasses.replace(case, network="miniature", targets=None, dtype=torch.float32)
    text = torch.zeros(case.batch, 77, CONFIGS["miniature"]["cross_attention_dim"], device=device)
    batch = {"latents": batch_of(small, device)["latents"], "encoder_hidden_states": text}
    sampled: list[NoiseAndTimes] = []

    def record(self: Objective, latents: Tensor, noise: Tensor, t: Tensor) -> Any:
        sampled.append((noise.clone(), t.clone()))
        raise _Sampled

    trainer = trainer_of(build(small, device), small, compile="off")
    with mock.patch.object(Objective, "inputs", record), contextlib.suppress(_Sampled):
        trainer.step(batch)
    return sampled[0]


class _Sampled(Exception):
    """Stop a step once its noise and times are known."""


def first_moments(trainable: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, Tensor]:
    """Return the gradients of an optimizer's first step."""
    return {name: optimizer.state[p]["exp_avg"] / (1 - BETAS[0]) for name, p in trainable.items()}
