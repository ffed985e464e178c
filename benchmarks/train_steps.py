"""The training steps that are compared: one optimizer step on cached latents and text, by peft's layers or by ours.

    peft's      the loop of diffusers' LoRA scripts, with the Diff2Flow loss in plain torch in place of theirs; every
                lever that is no kernel of ours can be pulled
    d2f_fast    `AlignedTrainer.step`

All draw noise and time, take the loss and its gradients, clip them and step AdamW at a constant learning rate; none
averages weights unless its name says so.
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
from d2f_fast.training.objective import Objective

LEARNING_RATE, BETAS, MAX_NORM = 1e-4, (0.9, 0.999), 1.0
WARM_UP_STEPS = 3
EVALUATED_AT_ONCE = 4  # pictures: eagerly each of Stable Diffusion 1.5 keeps 1 GiB, beside the graph that is judged
Draws = tuple[Tensor, Tensor]  # noise and t


@dataclasses.dataclass(frozen=True)
class Levers:
    """What a step of peft's layers is given beside the network; the defaults are the scripts'.

    Args:
        adapter: none trains nothing, and takes the gradient of the latents to have a backward pass.
        input_cast: peft casts x to the type of A and B.
        compiled: "", "network" or "step": the loss with the network in it.
        mode: of torch.compile.
        channels_last: weights and latents.
        fused: AdamW in one kernel, and no loss read back to the host.
        captured: the whole step as one CUDA graph.
    """

    adapter: bool = True
    input_cast: bool = True
    compiled: str = ""
    mode: str = "default"
    channels_last: bool = False
    fused: bool = False
    captured: bool = False


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's table of noise."""
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**table, clip_sample=False, steps_offset=1)


class PeftStep:
    """One step of diffusers' LoRA scripts, and what can be made of it without a kernel.

    Attributes:
        loss: of the last step.
        draws: noise and t of the last step.
    """

    def __init__(self, case: Case, device: torch.device, levers: Levers) -> None:
        self.case, self.levers, self._device = case, levers, device
        batch, self._unet = batch_of(case, device), build(case, device)
        self._layout = torch.channels_last if levers.channels_last else torch.contiguous_format
        self._unet.to(memory_format=self._layout).train()
        self._latents = batch.pop("latents").contiguous(memory_format=self._layout)
        self._condition = batch
        self.draws: Draws = torch.empty_like(self._latents), torch.empty(case.batch, device=device)
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
        self._graph: Any = None

    def __call__(self) -> None:
        """Take one step; the first compiles and captures."""
        if not self.levers.captured:
            return self._step()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def restore(self) -> None:
        """Set parameters and optimizer to where they began, in place."""
        if self.levers.adapter:
            set_adapter(self.trainable)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def gradients(self) -> dict[str, Tensor]:
        """Of the first step after `restore`, clipped: as AdamW's first moment holds them."""
        return first_moments(self.trainable, self.optimizer) if self.levers.adapter else {}

    def evaluate(self, draws: Draws, zero_adapter: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and clipped gradients where parameters began, for given draws, a few pictures at a time; no step."""
        set_adapter(self.trainable)
        if zero_adapter:
            nn.utils.vector_to_parameters(
                torch.zeros_like(nn.utils.parameters_to_vector(self.trainable.values())), self.trainable.values()
            )
        self.optimizer.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=self._device)
        for first in range(0, self.case.batch, EVALUATED_AT_ONCE):
            part = slice(first, first + EVALUATED_AT_ONCE)
            noise, t = (tensor[part] for tensor in draws)
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
        model = self._alignment
        table = model.rising_flow_times(torch.float32)
        sample, timestep = align_reference(latents, noise, t, table, model.t_min, model.num_train_timesteps)
        output = self._unet(sample.to(self.case.dtype), timestep, **condition, return_dict=False)[0]
        settings = (model.prediction_type, model.t_min, model.t_max, "flow", 5.0)
        return velocity_loss_reference(output, latents, noise, t, None, *settings)[0].mean()

    def _step(self) -> None:
        noise, t = self.draws
        noise.normal_()
        t.uniform_()
        for parameter in self.trainable.values():
            parameter.grad = None
        loss = self._forward(self._latents, *self.draws, self._condition)
        loss.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trainable.values(), MAX_NORM)
            self.optimizer.step()
        self.loss.copy_(loss.detach())
        if not self.levers.fused:
            self._loss_read += self.loss.item()  # as the scripts do, for their progress bar

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

    Attributes:
        loss: of the last step.
    """

    def __init__(self, case: Case, device: torch.device, **options: Any) -> None:
        self.case, self.batch = case, batch_of(case, device)
        self.trainer = trainer_of(build(case, device), case, **options)
        set_adapter(self.trainer.trainable)
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        """Take one step; the first compiles and captures."""
        self.loss = self.trainer.step(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """Of the first step, clipped: as AdamW's first moment holds them."""
        return first_moments(self.trainer.trainable, self.trainer.optimizer)


def first_step_seconds(case: Case, device: torch.device, options: Mapping[str, Any]) -> float:
    """How long the first step of `TrainerStep` takes, compile and capture included: for a process of its own."""
    step = TrainerStep(case, device, **options)
    return clock.seconds_of(step, device, 1)


def trainer_of(unet: Any, case: Case, **options: Any) -> AlignedTrainer:
    """A trainer of a network, which is given what no step needs from the miniature."""
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


def trainer_draws(case: Case, device: torch.device) -> Draws:
    """Noise and t of the first step that every `AlignedTrainer` takes on a batch of this shape."""
    small = dataclasses.replace(case, network="miniature", targets=None, dtype=torch.float32)
    text = torch.zeros(case.batch, 77, CONFIGS["miniature"]["cross_attention_dim"], device=device)
    batch = {"latents": batch_of(small, device)["latents"], "encoder_hidden_states": text}
    drawn: list[Draws] = []

    def record(self: Objective, latents: Tensor, noise: Tensor, t: Tensor) -> Any:
        drawn.append((noise.clone(), t.clone()))
        raise _Drawn

    trainer = trainer_of(build(small, device), small, compile=False)
    with mock.patch.object(Objective, "inputs", record), contextlib.suppress(_Drawn):
        trainer.step(batch)
    return drawn[0]


class _Drawn(Exception):
    """The draws are known: there is nothing to run."""


def first_moments(trainable: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, Tensor]:
    """Gradients of an optimizer's first step."""
    return {name: optimizer.state[p]["exp_avg"] / (1 - BETAS[0]) for name, p in trainable.items()}
