"""Take one optimizer step, from sampled inputs to averaged weights.

    zero the gradients → for each micro-batch: teacher, align, network, loss, backward → clip, AdamW, EMA, counters

It samples no random number and never waits for the device: it reads tensors of fixed shapes and the learning rate, and
changes tensors in place, on the device. So the same code runs eagerly, with its loss compiled, or captured whole as a
CUDA graph (`step_graphs`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn.attention import SDPBackend

from d2f_fast.config import TrainingConfig
from d2f_fast.layers.fused_lora import lora_paths
from d2f_fast.ops import kernel_path
from d2f_fast.training.agreement import connecting, sum_over_processes
from d2f_fast.training.compiled import compile_part
from d2f_fast.training.ema import EMA
from d2f_fast.training.inputs import StepInputs
from d2f_fast.training.objective import Objective
from d2f_fast.training.step_graphs import MAX_GRAPHS, StepGraphs

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from d2f_fast.lora.start import StartingLora
    from d2f_fast.training.perceptual import PerceptualLoss
    from d2f_fast.training.teacher import Teacher

_COMPILED = {
    "off": "not compiled (--compile makes later steps faster)",
    "full": "compiled (--compile)",
    "regional": "blocks of the UNet compiled (--compile regional)",
}
# Loss of each sample, [b], and its two parts, latent loss and LPIPS, [2, b], or None for a loss without LPIPS; from
# latents, noise, t, condition and mask of a micro-batch.
LossPerSample = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor | None], tuple[Tensor, Tensor | None]]


class TrainingStep:
    """Compute the loss of this process' slice of the batch, and train on it.

    Args:
        unet: network, with its adapter in place.
        objective: objective that the network is trained on.
        trainable: trained parameters by name.
        ema: their average; None keeps no average.
        config: options of the run.
        device: device of all of these.
        precision: "bf16" computes the network under bfloat16 autocast, "no" in its own type.
        num_processes: number of processes that sum their gradients.
        teacher: teacher whose velocity is learned; None learns that of the data.
        perceptual: LPIPS, whose multiple by `lpips_weight` is added to the loss; None adds nothing.

    Attributes:
        optimizer: fused AdamW over the trained parameters.
        skipped: number of steps that changed nothing because they were not finite, int64 on the device.
        skipped_in_a_row: number of such steps since the last finite one, int64 on the device.
        loss: loss of each sample of one micro-batch, and its parts; `compile` may compile it.
        graphs: captured steps; None where `cuda_graph` is off.
        starting_lora: LoRA file that the adapter started from, which is named where it is saved; None for none.
        tags: entries of a file's header that describe the run, which checkpoints write.
    """

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        objective: Objective,
        trainable: Mapping[str, nn.Parameter],
        ema: EMA | None,
        config: TrainingConfig,
        device: torch.device,
        precision: str,
        num_processes: int = 1,
        teacher: "Teacher | None" = None,
        perceptual: "PerceptualLoss | None" = None,
    ) -> None:
        self.unet, self.objective, self.trainable, self.ema = unet, objective, trainable, ema
        self.config, self._device, self._precision, self._num_processes = config, device, precision, num_processes
        self._teacher, self._perceptual = teacher, perceptual
        # Mean latent loss and mean LPIPS of the last step, which a captured step writes to in place.
        self._parts = None if perceptual is None else torch.zeros(2, device=device)
        on_gpu = device.type == "cuda"
        # In a captured graph a Python number would stay what it was at capture.
        self._lr = torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate
        # The fused optimizer honours found_inf, so that a non-finite step is skipped without waiting for the device.
        self.optimizer = torch.optim.AdamW(
            trainable.values(),
            lr=self._lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self._whole = True
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.loss: LossPerSample
        self.loss, self._compiled_blocks = compile_part(config.compile, self._loss, unet, device)
        self.graphs = StepGraphs(self.run, self.warm_up) if config.cuda_graph else None
        self.starting_lora: StartingLora | None = None
        self.tags: dict[str, str] = {}
        if config.cuda_graph and num_processes > 1:
            with connecting():
                torch.distributed.all_reduce(torch.zeros(1, device=device))  # connects, which a capture does not allow

    def __call__(self, inputs: StepInputs, learning_rate: float) -> Tensor:
        """Take one step.

        Args:
            inputs: this process' slice of the batch.
            learning_rate: learning rate of this step.

        Returns:
            The mean loss, float32 scalar on the device, detached: over the global batch with several processes, which
            sum it with the gradients, else over the slice.
        """
        if isinstance(self._lr, Tensor):
            self._lr.fill_(learning_rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        # All processes must capture and replay their all-reduce together. Slices differ by one sample at most: where
        # one slice has the mean size, all have it.
        alike = len(inputs.latents) * self._num_processes == inputs.global_size
        if self.graphs is None or not len(inputs.latents) or (self._num_processes > 1 and not alike):
            return self.run(inputs)
        return self.graphs(inputs)

    def run(self, inputs: StepInputs, *, dry: bool = False) -> Tensor:
        """Compute loss and gradients, and update; this is the part that is captured.

        Args:
            inputs: tensors that stay where they are.
            dry: act as in a step that is not finite, which changes nothing but the counters of skipped steps, and
                leave out the other processes, which may meet a new shape at another time.

        Returns:
            The mean loss; see `__call__`.
        """
        total = torch.full((), float("nan") if dry else 0.0, device=self._device)
        parts = None if self._parts is None else self._parts.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        with self._compiled_blocks:
            for first in range(0, len(inputs.latents), self.config.train_batch_size):
                per_sample, by_part = self._part_loss(inputs.part(first, self.config.train_batch_size), self.loss)
                # A sum over the global batch: the size of the micro-batches and slices changes nothing.
                torch.autograd.backward(per_sample.sum() / inputs.global_size)
                total += per_sample.detach().sum()
                if parts is not None and by_part is not None:
                    parts += by_part.sum(1)
        summed = self._num_processes > 1 and not dry
        self._update([total] if parts is None else [total, parts], summed=summed)
        count = inputs.global_size if summed else max(len(inputs.latents), 1)
        if parts is not None:
            parts /= count
        return total / count

    @torch.no_grad()
    def losses(self, inputs: StepInputs) -> Tensor:
        """Return the loss of each sample, [b] float32, without training on it and without the compiled code.

        Args:
            inputs: samples of one micro-batch.
        """
        return self._part_loss(inputs, self._loss)[0].float()

    def parts(self) -> dict[str, float]:
        """Return the parts of the last step's loss by name, without weights, or {} for a loss of one part.

        They are means over the same samples as the loss. The host waits for the device.
        """
        return {} if self._parts is None else dict(zip(("latent_loss", "lpips"), self._parts.tolist(), strict=True))

    def _part_loss(self, part: StepInputs, loss: LossPerSample) -> tuple[Tensor, Tensor | None]:
        """Return the losses of each sample of a micro-batch, against the teacher where there is one."""
        latents, noise = part.latents, part.noise
        if self._teacher is not None:
            with self._autocast():
                latents, noise = self._teacher.line(latents, noise, part.t, part.condition)
        with self._autocast():
            return loss(latents, noise, part.t, part.condition, part.mask)

    def is_whole(self) -> bool:
        """Return whether a step that failed has left weights and average as they were; a captured one does not say."""
        return self._whole and self.graphs is None

    def warm_up(self, inputs: StepInputs) -> None:
        """Run a step that changes no weight and no counter, but leaves compiled code, plans and optimizer state behind.

        Args:
            inputs: tensors that stay where they are.
        """
        counters = [self.skipped, self.skipped_in_a_row]
        before = [counter.clone() for counter in counters]
        self.run(inputs, dry=True)
        torch._foreach_copy_(counters, before)
        self.optimizer.zero_grad(set_to_none=True)  # else the capture would hold these gradients beside its own

    def state_was_replaced(self) -> None:
        """Drop the captured steps, which hold the optimizer state from before a checkpoint was loaded."""
        if self.graphs is not None:
            self.graphs.clear()

    def paths(self) -> str:
        """Return in one line which path each part of the step takes, and why."""
        config, device = self.config, self._device
        dtype: torch.dtype = torch.bfloat16 if self._precision == "bf16" else self.unet.dtype
        graphs = [] if device.type != "cuda" else ["no CUDA graph (--cuda_graph records one)"]
        if self.graphs is not None:
            graphs = [f"recorded as a CUDA graph for each of {MAX_GRAPHS} shapes (--cuda_graph)"]
        loss = "Triton kernels of this package"
        if kernel_path(device) != "triton":
            missing = "Triton is not installed" if device.type == "cuda" else "the kernels of this package need a GPU"
            loss = f"PyTorch, as {missing}"
        return "; ".join([
            f"training runs on {device} in {str(dtype).removeprefix('torch.')}",
            _COMPILED[config.compile],
            *graphs,
            f"loss: {loss}",
            f"LoRA: {lora_paths(self.unet, device, dtype)}",
            f"attention: {_attention(self.unet, device, dtype)}",
        ])  # fmt: skip

    def _autocast(self) -> torch.autocast:
        """Return the context in which a network is computed. Each drops the casts of weights that it has kept."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def _loss(
        self, latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Align, call the network and compare; return the loss of each sample, and its parts where it has LPIPS."""
        state, timestep = self.objective.inputs(latents, noise, t)
        added = {name: x for name, x in condition.items() if name not in ("encoder_hidden_states", "context")} or None
        sample = state.to(self.unet.conv_in.weight.dtype)  # unet.dtype walks through every module
        if "context" in condition:
            sample = torch.cat([condition["context"], sample], 1)
        output = self.unet(
            sample,
            timestep,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        loss = self.objective.loss(output, latents, noise, t, mask=mask, reduction="none")
        if self._perceptual is None:
            return loss, None
        lpips = self._perceptual(self.objective.flow.predicted_latents(output, state, t), latents)
        return loss + self.config.lpips_weight * lpips, torch.stack([loss, lpips]).detach()

    def _update(self, losses: list[Tensor], *, summed: bool) -> None:
        """Clip, step and average, or change nothing where loss or gradient is not finite; never wait for the device.

        Args:
            losses: loss of this slice, and further sums over it; replaced by those of all processes where summed.
            summed: sum losses and gradients over the processes.
        """
        for parameter in self.trainable.values():
            if parameter.grad is None:  # this slice is empty
                parameter.grad = torch.zeros_like(parameter)
        if summed:
            # Summed here, once a step, and not by DDP: slices may be empty, or need unequal numbers of backward passes.
            together = [*losses, *(p.grad for p in self.trainable.values() if p.grad is not None)]
            flat = torch.cat([tensor.reshape(-1) for tensor in together])
            sum_over_processes(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in together])
            torch._foreach_copy_(together, [part.view_as(tensor) for part, tensor in zip(parts, together, strict=True)])
        self._whole = False
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.config.max_grad_norm, foreach=True)
        not_finite = ~torch.isfinite(norm + losses[0])
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = not_finite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(skip=not_finite)
        self.skipped += not_finite
        self.skipped_in_a_row.add_(1).mul_(not_finite)
        self._whole = True


def keep_compiled_code() -> None:
    """Let Inductor keep its code in the user's cache folder, unless the environment names another folder.

    Its own default is below /tmp, which is cleared. It puts that default into the environment when it is imported.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "d2f_fast", "inductor")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # there is no home, or it belongs to someone else: Inductor's own choice serves
        return
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.path.abspath(default_cache_dir())):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    # Also keep graphs with an autograd Function, which torch leaves out by default: the key holds both traced passes.
    functorch_config.autograd_cache_allow_custom_autograd_functions = True


def learning_rates(config: TrainingConfig) -> Callable[[int], float]:
    """Return a function from the number of steps taken to the learning rate, by diffusers' schedule of that name."""
    # torch's schedulers read a learning rate that lives on the device back to the host at every step. This one drives
    # a stand-in, and is asked for its factor alone.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler,
        stand_in,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: config.learning_rate * factor(step)


def _attention(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Return which of torch's attention kernels serves the network's first attention layer."""
    attention = next((module for module in unet.modules() if isinstance(module, Attention)), None)
    if attention is None:
        return "none"
    if type(attention.processor) is not AttnProcessor2_0:
        return type(attention.processor).__name__
    shape = 1, attention.heads, 1024, attention.inner_dim // attention.heads
    query = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    return f"PyTorch's {SDPBackend(torch._fused_sdp_choice(query, query, query)).name.lower()}"
