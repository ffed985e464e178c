"""`AlignedTrainer`: finetune a diffusion model as a flow-matching model. Reads from top to bottom as a run does.

Every random draw of a step (posterior, noise, time, caption dropout) comes from one generator seeded by (seed, step)
and is drawn for the global batch, of which each process takes its share: a run resumes bit for bit, whatever the number
of processes.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from d2f_fast.config import Method, TrainingConfig
from d2f_fast.data.encoding import BatchEncoder, check_batch
from d2f_fast.data.loading import ImageDataset, check_dataset, load_ahead
from d2f_fast.data.order import plan_batches
from d2f_fast.errors import CheckpointError, DatasetError, ModelError, RefusedInputError
from d2f_fast.files.atomic import atomic_folder, make_folder
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.flow.alignment import Alignment
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.layers.half_base import HalfBase
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.merge import merged_unet
from d2f_fast.lora.write import save_lora
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.training.checkpoint import MANIFEST, find_checkpoint, list_checkpoints, save_checkpoint
from d2f_fast.training.ema import EMA
from d2f_fast.training.objective import Objective
from d2f_fast.training.optimizer_state import pack_optimizer, unpack_optimizer
from d2f_fast.training.publish import stock_scheduler, tags_of
from d2f_fast.training.run_log import RunLog
from d2f_fast.training.step import StepInputs, TrainingStep, keep_compiled_code, learning_rates

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


class InterruptedRunError(RuntimeError):
    """SIGTERM or SIGINT arrived; the run was saved first."""

    exit_code = 143


class NonFiniteRunError(RuntimeError):
    """Loss or gradient norm was not finite in too many steps in a row."""

    exit_code = 2


# What may differ between a run and its continuation: it changes nothing but, at most, the rounding of sums.
_FREE_ON_RESUME = {
    *("output_dir", "cache_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "report_to"),
    *("resume_from_checkpoint", "logging_steps", "dataloader_num_workers", "compile", "cuda_graph"),
    *("train_batch_size", "gradient_accumulation_steps"),  # their product with the processes is compared instead
    "gradient_checkpointing",
}


class AlignedTrainer:
    """Train, sample and save one model.

    Args:
        model: the base model; its UNet is trained in place.
        config: options of the run.

    Attributes:
        unet: the network, its adapter in place.
        alignment: of the base model, on the device.
        trainable: the parameters that train, by name.
        ema: their average; None where `ema_decay` is 0.
        optimizer: AdamW.
        global_step: optimizer steps taken.

    Raises:
        ModelError: the base is float16, or takes an input that no text-to-image training gives.
        RefusedInputError: options that this device or model cannot serve.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig) -> None:
        self.config = config
        self._precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self._precision not in ("no", "bf16"):  # before Accelerator, which refuses fp16 on a CPU in its own words
            raise RefusedInputError(f"mixed_precision must be no or bf16, got {self._precision}")
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world != self.accelerator.num_processes:  # each would train alone, and write over the others
            raise RefusedInputError(
                f"{world} processes were started, and accelerate sees {self.accelerator.num_processes}: on a CPU set"
                " ACCELERATE_USE_CPU=true"
            )
        if config.cuda_graph and self.device.type != "cuda":
            raise RefusedInputError(f"cuda_graph needs a CUDA GPU, got {self.device.type}: leave it out")
        _check_trainable(model, config)
        if config.compile:
            keep_compiled_code()
        # A few elements of each weight tell base models apart; a full finetuning takes its UNet from the checkpoint.
        # Read before the model moves: on a GPU each of them would be fetched on its own.
        unet = ("unet",) if config.adapter == "lora" else ()
        self._base = model.fingerprint(*unet, "vae", "text_encoder", "text_encoder_2", most=4096)[:16]
        self.model = model.to(self.device)
        self.unet = model.unet
        self.alignment: Alignment = model.alignment
        self.objective = Objective(
            config.objective,
            self.alignment,
            config.loss_weighting,
            config.snr_gamma,
            config.timestep_sampling,
            config.logit_mean,
            config.logit_std,
            config.flow_shift,
        )
        self.trainable = self._prepare_unet()
        self._half_base: HalfBase | None = None
        if config.adapter == "lora" and self._precision == "bf16":
            self._half_base = HalfBase(self.unet, torch.bfloat16)
        self.ema = EMA(self.trainable, config.ema_decay) if config.ema_decay else None
        self._training_step = TrainingStep(
            self.unet,
            self.objective,
            self.trainable,
            self.ema,
            config,
            self.device,
            self._precision,
            self.accelerator.num_processes,
        )
        self.optimizer = self._training_step.optimizer
        self._learning_rate = learning_rates(config)
        self.global_step, self._samples = 0, 0
        self._null_condition: dict[str, Tensor] | None = None
        self._signal: int | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path | Any, config: TrainingConfig | None = None) -> "AlignedTrainer":
        """Trainer of a hub id, a pipeline folder, a `.safetensors` file, or a loaded diffusers pipeline.

        Args:
            model: any of these; a pipeline's UNet is trained in place.
            config: options of the run; None for the defaults.

        Raises:
            ModelError: see `BaseModel` and `load_pipeline`.
        """
        base = BaseModel.load(model) if isinstance(model, str | Path) else BaseModel(model)
        return cls(base, config or TrainingConfig())

    def _prepare_unet(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name: of a new adapter, or of the whole network."""
        config, unet = self.config, self.unet
        if config.gradient_checkpointing:
            random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules())
            # With nothing random to repeat, no generator is read: that no CUDA graph could capture.
            unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=random))
        unet.train()
        if config.adapter == "full":
            unet.requires_grad_(True).float()
            trainable = dict(unet.named_parameters())
        else:
            trainable = inject_lora(
                unet,
                config.rank,
                alpha=config.lora_alpha,
                conv_rank=config.conv_rank,
                first_last_layers=config.first_last_layers,
                target_modules=config.target_modules,
                seed=config.seed,
            )
            use_fused_lora(unet)
        if self.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)  # in which cuDNN computes: else it converts at every layer
        return trainable

    # The step

    @property
    def global_batch_size(self) -> int:
        """Pictures per step over all processes and backward passes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def paths(self) -> str:
        """Which path each part of a step takes, and why, in one line."""
        return self._training_step.paths()

    def step(self, batch: Mapping[str, Any]) -> Tensor:
        """Take one optimizer step.

        Args:
            batch: this process' share, on any device: "latents" [b, C, h, w] (scaled) or "pixel_values" [b, 3, H, W] in
                [-1, 1]; "encoder_hidden_states" [b, L, D] or "input_ids" [b, L]; optional "added_cond_kwargs", and
                "mask" broadcastable to the latents; optional "offset" and "global_batch_size" where the share begins in
                the global batch, and its size.

        Returns:
            The mean loss, float32 scalar on the device, detached: over the global batch with several processes, else
            over this share. Reading it syncs with the device.

        Raises:
            RefusedInputError: see `encoding.check_batch`.
        """
        check_batch(batch)
        generator = torch.Generator(self.device).manual_seed(_step_seed(self.config.seed, self.global_step))
        if self._half_base is not None:
            self._half_base.use()
        loss = self._training_step(self._prepare(batch, generator), self._learning_rate(self.global_step))
        self.global_step += 1
        return loss

    def _prepare(self, batch: Mapping[str, Any], generator: torch.Generator) -> StepInputs:
        """What this process' share is trained on, cut from the draws of the global batch."""
        device = self.device
        posterior = self._posterior(batch)
        shape = next(iter(posterior.values())).shape
        offset, global_size = batch.get("offset", 0), batch.get("global_batch_size", shape[0])
        share = slice(offset, offset + shape[0])

        def draw(*trailing: int) -> Tensor:
            return torch.randn(global_size, *trailing, generator=generator, device=device)[share]

        posterior_noise, noise = draw(*shape[1:]), draw(*shape[1:])
        t = self.objective.sample_times(global_size, generator, device)[share]
        dropped = torch.rand(global_size, generator=generator, device=device)[share] < self.config.caption_dropout
        if "latents" in posterior:
            latents = posterior["latents"]
        else:
            latents = self.model.scale_latents(posterior["mean"] + posterior["std"] * posterior_noise)
        condition = self._condition(batch)
        for name, null in self._null().items():
            if name in condition:
                expanded = dropped.reshape(-1, *(1,) * (condition[name].ndim - 1))
                condition[name] = torch.where(expanded, null.to(condition[name].dtype), condition[name])
        mask = batch.get("mask")
        mask = None if mask is None else self._on_device(mask)
        if device.type == "cuda":
            latents, noise = (x.contiguous(memory_format=torch.channels_last) for x in (latents, noise))
        return StepInputs(latents, noise, t, condition, mask, global_size)

    def _posterior(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scaled "latents", or "mean" and "std" of the autoencoder, on the device in float32."""
        if "latents" in batch:
            return {"latents": self._on_device(batch["latents"]).float()}
        if "mean" not in batch:
            batch = self.model.encode_images(batch["pixel_values"])
        return {name: self._on_device(batch[name]).float() for name in ("mean", "std")}

    def _condition(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything that conditions the network, [b, ...] each, on the device."""
        if "encoder_hidden_states" in batch:
            condition = {"encoder_hidden_states": batch["encoder_hidden_states"]}
        else:
            with torch.no_grad():
                ids = self._on_device(batch["input_ids"])
                condition = {"encoder_hidden_states": self.model.pipeline.text_encoder(ids)[0]}
        condition |= batch.get("added_cond_kwargs") or {}
        # In the type of the frozen weights, which that of the text encoder, or of a cache, need not be; the network
        # takes sizes as they are.
        dtype = self.unet.conv_in.weight.dtype
        given = {name: self._on_device(value) for name, value in condition.items()}
        return {name: value if name == "time_ids" else value.to(dtype) for name, value in given.items()}

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the batch on the device; a GPU fetches it by itself, while the host goes on."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _null(self) -> dict[str, Tensor]:
        """Condition of the empty prompt, encoded once."""
        if self._null_condition is None:
            self._null_condition = self.model.empty_condition() if self.config.caption_dropout else {}
        return self._null_condition

    # The run

    def fit(self, dataset: ImageDataset) -> dict[str, Any]:
        """Train on a dataset until `max_train_steps`, with checkpoints, log and progress bar.

        Args:
            dataset: Samples {"image": PIL image, "text": caption or list of captions} by index, and a length. Optional
                methods `key(index)` and `captions(index)` save reading cached images; see `data.loading.ImageDataset`.

        Returns:
            {"steps", "loss", "skipped_steps", "seconds"}: the last logged loss (None where it was not finite, or there
            was no step left), and what this call took.

        Raises:
            DatasetError, CheckpointError: input that cannot be used.
            RefusedInputError: `output_dir` holds another run's checkpoints.
            InterruptedRunError: after SIGTERM or SIGINT, and a checkpoint.
            NonFiniteRunError: ten steps in a row were not finite; the last checkpoint is intact.
        """
        config = self.config
        check_dataset(dataset)
        self._samples = len(dataset)
        self._resume()
        self._write_config()
        log, started = RunLog(config, self.accelerator.is_main_process), time.monotonic()
        if config.resume_from_checkpoint is not None:
            log.cut(self.global_step)
        progress = tqdm(
            total=config.max_train_steps,
            initial=self.global_step,
            desc=config.objective,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        last_loss: float | None = None
        last_time, pictures = time.monotonic(), 0
        logger.info("%s", self.paths)
        half = nullcontext() if self._half_base is None else self._half_base.in_use()
        with self._signals(), progress, half, closing(self._batches(dataset)) as batches:
            for batch in self._saved_where_a_sample_fails(batches):
                loss = self.step(batch)
                pictures += batch["global_batch_size"]
                progress.update()
                step = self.global_step
                done = step == config.max_train_steps
                logged = step % config.logging_steps == 0 or done
                if logged:
                    self._stop_if_not_finite()
                    now = time.monotonic()
                    value, rate = loss.item(), pictures / (now - last_time)
                    last_loss, last_time, pictures = value if math.isfinite(value) else None, now, 0
                    row: dict[str, Any] = {"step": step, "loss": value, "lr": self._learning_rate(step)}
                    row |= {"images_per_second": rate, "skipped_steps": int(self._training_step.skipped)}
                    progress.set_postfix(loss=f"{value:.4f}", images_s=f"{rate:.1f}")
                    log.write(row)
                asked = self._asked_to_stop(logged)
                if asked is not None:
                    self._save_checkpoint()
                    raise InterruptedRunError(f"stopped by {signal.Signals(asked).name} after step {step}: saved")
                if config.checkpointing_steps and (done or step % config.checkpointing_steps == 0):
                    self._save_checkpoint()
                if done:
                    break
        log.close()
        seconds = time.monotonic() - started
        return {
            "steps": self.global_step,
            "loss": last_loss,
            "skipped_steps": int(self._training_step.skipped),
            "seconds": seconds,
        }

    def _batches(self, dataset: ImageDataset) -> Generator[dict[str, Any]]:
        """This process' share of each global batch from the current step on, encoded, through the cache."""
        config, accelerator = self.config, self.accelerator
        if self.global_step >= config.max_train_steps:
            return
        encoder = BatchEncoder(self.model, config)
        plans = plan_batches(
            len(dataset),
            self.global_batch_size,
            config.seed,
            self.global_step,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        left = islice(plans, config.max_train_steps - self.global_step)
        for plan, loaded in load_ahead(left, partial(encoder.load, dataset), config.dataloader_num_workers):
            yield encoder.encode(plan, loaded)

    def _saved_where_a_sample_fails(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches; a sample that cannot be used stops the run only when its steps so far are saved."""
        began = self.global_step
        try:
            yield from batches
        except DatasetError as error:
            if self.global_step == began:
                raise
            self._save_checkpoint()
            raise DatasetError(f"{error}; step {self.global_step} is saved") from error

    def _stop_if_not_finite(self) -> None:
        """Read the counters; the one place that waits for the device."""
        in_a_row = int(self._training_step.skipped_in_a_row)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteRunError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, the last at step"
                f" {self.global_step}: lower learning_rate, or check the data; the weights are those before these steps"
            )

    def _asked_to_stop(self, logged: bool) -> int | None:
        """Signal to stop for, after the step in progress; several processes agree where they log, and wait anyway.

        One that stopped by itself would leave the others inside the sum of the next step's gradients.
        """
        if self.accelerator.num_processes == 1:
            return self._signal
        if not logged:
            return None
        asked = torch.tensor(self._signal or 0, device=self.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return int(asked) or None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT; the loop stops where it sees one. A second one ends the process at once."""
        previous = {}
        self._signal = None

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, signal.SIG_DFL)

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: the caller's business
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a continuation must share with its checkpoint."""
        config = dataclasses.asdict(self.config)
        kept = {name: value for name, value in config.items() if name not in _FREE_ON_RESUME}
        if not self.config.lr_scheduler.startswith("constant"):  # the others fall towards the last step
            kept["max_train_steps"] = self.config.max_train_steps
        kept |= {"mixed_precision": self._precision, "base_model": self._base}
        return json.loads(json.dumps(kept | {"global_batch_size": self.global_batch_size}))

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            make_folder(self.config.output_dir)
            write_json(Path(self.config.output_dir) / "config.json", dataclasses.asdict(self.config))

    def _save_checkpoint(self) -> None:
        """`checkpoint-N` with everything that a continuation needs; weights that are not finite are never written."""
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            write_tensors(folder / "trainable.safetensors", {k: v.detach() for k, v in self.trainable.items()})
            if self.ema is not None:
                write_tensors(folder / "ema.safetensors", self.ema.state_dict())
            tensors, optimizer = pack_optimizer(self.optimizer)
            write_tensors(folder / "optimizer.safetensors", tensors)
            state = {"identity": self._identity(), "samples": self._samples, "optimizer": optimizer}
            write_json(folder / "state.json", state | {"skipped_steps": int(self._training_step.skipped)})

        save_checkpoint(self.config.output_dir, self.global_step, write, self.config.checkpoints_total_limit)

    def _resume(self) -> None:
        """Continue from the checkpoint that the configuration names, if it names one."""
        output, resume_from = Path(self.config.output_dir), self.config.resume_from_checkpoint
        others = list_checkpoints(output)
        if resume_from is None and others and self.global_step == 0:
            raise RefusedInputError(
                f"{output} holds {others[0][1].name} of another run: --resume_from_checkpoint latest goes on with it;"
                " else name a new output_dir"
            )
        folder = find_checkpoint(output, resume_from)
        if folder is None:
            return
        state, step = read_json(folder / "state.json"), read_json(folder / MANIFEST)["step"]
        if not isinstance(state, dict) or not {"identity", "samples", "optimizer", "skipped_steps"} <= state.keys():
            raise CheckpointError(f"{folder / 'state.json'} is not of a training run: resume from another checkpoint")
        if step > self.config.max_train_steps:
            raise CheckpointError(f"{folder} is past max_train_steps {self.config.max_train_steps}: raise it")
        if state["samples"] != self._samples:
            logger.warning(
                "the dataset had %d samples, and has %d: the run goes on, in another order than it would have",
                *(state["samples"], self._samples),
            )
        own = self._identity()
        for name in sorted(own.keys() | state["identity"].keys()):
            if own.get(name) != state["identity"].get(name):
                raise CheckpointError(
                    f"{folder / 'state.json'}: {name} was {state['identity'].get(name)!r}, now {own.get(name)!r};"
                    " resume with the options of the run, or start a new output_dir"
                )
        trained, _ = read_tensors(folder / "trainable.safetensors")
        if {k: v.shape for k, v in trained.items()} != {k: v.shape for k, v in self.trainable.items()}:
            raise CheckpointError(f"{folder / 'trainable.safetensors'} holds other parameters: it is of another model")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(trained[name])
        if self.ema is not None:
            self.ema.load_state_dict(read_tensors(folder / "ema.safetensors")[0])
        unpack_optimizer(self.optimizer, read_tensors(folder / "optimizer.safetensors")[0], state["optimizer"])
        self._training_step.optimizer_was_loaded()
        self._training_step.skipped.fill_(state["skipped_steps"])
        self.global_step = step
        logger.info("resumed from %s at step %d", folder, self.global_step)

    # Sampling and saving

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run the block with the EMA weights in the network and its frozen ones exact, in evaluation mode."""
        exact = nullcontext() if self._half_base is None else self._half_base.exact()
        average = nullcontext() if self.ema is None else self.ema.swapped()
        self.unet.eval()
        try:
            with exact, average:
                yield
        finally:
            self.unet.train()

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        method: Method = "euler",
    ) -> list[Image.Image]:
        """Pictures of prompts, with the averaged weights, by Euler in flow time from t = 0.

        Args:
            prompts: one, or several.
            num_inference_steps: network evaluations a picture (twice as many with midpoint and heun).
            guidance_scale: 1 is no guidance.
            negative_prompt: led away from; "" is the model's own empty prompt.
            height, width: pixels; None for the training resolution.
            generator: on the device or the CPU, of the noise.
            method: of the integration.

        Returns:
            One RGB picture for each prompt.

        Raises:
            RefusedInputError: the autoencoder has no latents of this height or width.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        height, width = height or self.config.resolution, width or self.config.resolution
        factor = self.model.downsampling
        if height % factor or width % factor:
            raise RefusedInputError(f"height and width must be multiples of {factor}, got {height} and {width}")
        shape = (len(prompts), self.unet.config.in_channels, height // factor, width // factor)
        drawn_on = self.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=drawn_on).to(self.device)
        positive, negative = self.model.encode_prompts(prompts), None
        added = self.model.added_cond_kwargs(positive, height, width)
        if guidance_scale != 1:
            if negative_prompt:
                negative = self.model.encode_prompts([negative_prompt] * len(prompts))
            else:
                negative = self.model.empty_condition(len(prompts))
            if added is not None:
                negative_added = self.model.added_cond_kwargs(negative, height, width) or {}
                added = {name: torch.cat([negative_added[name], value]) for name, value in added.items()}
        flow = self.objective.flow
        with self.averaged():
            velocity = unet_velocity(
                self.unet,
                flow,
                positive["encoder_hidden_states"],
                None if negative is None else negative["encoder_hidden_states"],
                guidance_scale,
                added,
            )
            times = flow.times(num_inference_steps, shift=self.config.flow_shift)
            latents = sample_flow(velocity, noise, times=times, method=method)
        return to_pil(self.model.decode(latents))  # type: ignore[arg-type]

    def save_lora(self, folder: str | Path) -> Path:
        """Write the averaged adapter as `pytorch_lora_weights.safetensors`, and check that it reloads.

        Args:
            folder: made when missing.

        Returns:
            The file.

        Raises:
            RefusedInputError: the run is a full finetuning, or the disk is full.
            CheckpointError: a weight is not finite.
            ModelError: the reloaded file does not give the same output.
        """
        if self.config.adapter != "lora":
            raise RefusedInputError("adapter is full: there is no LoRA to save; use save_pipeline")
        with self.averaged():
            return save_lora(self.unet, folder, tags_of(self.config, self.objective))

    def save_pipeline(self, folder: str | Path) -> Path:
        """Write the averaged model as a diffusers pipeline with a stock scheduler; a LoRA is merged into its weights.

        Args:
            folder: must not exist; it appears whole or not at all.

        Returns:
            The folder.

        Raises:
            RefusedInputError: `folder` exists or cannot be made, or the disk is full.
        """
        pipeline = self.model.pipeline
        with self.averaged():
            unet = merged_unet(self.unet)
        saved = type(pipeline)(
            **{**pipeline.components, "unet": unet, "scheduler": stock_scheduler(self.config, self.model)}
        )
        with atomic_folder(folder) as temporary:
            saved.save_pretrained(temporary)
            write_json(temporary / "d2f.json", tags_of(self.config, self.objective))
        return Path(folder)


def _check_trainable(model: BaseModel, config: TrainingConfig) -> None:
    """Refuse a base that would fail in its first step."""
    unet, latents = model.unet.config, model.vae.config.latent_channels
    if unet.in_channels != latents:
        raise ModelError(
            f"the UNet takes {unet.in_channels} channels and the autoencoder makes {latents}: text-to-image only"
        )
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(name) is not None:
            raise ModelError(
                f"the UNet has {name} {unet[name]}: it takes an input that no text-to-image training gives"
            )
    if any(parameter.dtype == torch.float16 for parameter in model.unet.parameters()):
        raise ModelError("the UNet is float16, whose gradients overflow: load it in bfloat16 or float32")
    if config.resolution % model.downsampling:
        raise RefusedInputError(f"resolution must be a multiple of {model.downsampling}, got {config.resolution}")


def _step_seed(seed: int, step: int) -> int:
    """Seed of the generator of a step: 63 bits that no two (seed, step) share in practice."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "little") >> 1
