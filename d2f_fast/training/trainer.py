"""`AlignedTrainer`: finetune a diffusion model as a flow-matching model. It reads from top to bottom as a run does.

batch (`data`) → inputs (`inputs`) → step (`step`) → log (`run_log`) → checkpoint (`checkpoint`, `resume`)
"""

import dataclasses
import logging
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import Tensor

from d2f_fast.config import Method, TrainingConfig
from d2f_fast.data.batch import Batch, check_batch
from d2f_fast.data.encoding import BatchEncoder
from d2f_fast.data.loading import ImageDataset, check_dataset, load_ahead
from d2f_fast.data.order import plan_batches
from d2f_fast.errors import DatasetError, RefusedInputError
from d2f_fast.files.atomic import make_folder
from d2f_fast.files.json_file import write_json
from d2f_fast.flow.alignment import Alignment
from d2f_fast.layers.half_base import HalfBase
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.generate import generate
from d2f_fast.training.checkpoint import save_checkpoint
from d2f_fast.training.ema import EMA
from d2f_fast.training.inputs import InputSampler
from d2f_fast.training.network import check_trainable, inputs_in_float32, prepare_network
from d2f_fast.training.objective import make_objective, settle_method
from d2f_fast.training.publish import publish_lora, publish_pipeline
from d2f_fast.training.resume import choose_checkpoint, load_state, run_identity, write_state
from d2f_fast.training.run_log import RunLog, check_tracker
from d2f_fast.training.signals import InterruptedRunError, StopSignals
from d2f_fast.training.step import TrainingStep, keep_compiled_code, learning_rates

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


class NonFiniteRunError(RuntimeError):
    """Loss or gradient norm was not finite in too many steps in a row."""

    exit_code = 2


class RunResult(TypedDict):
    """Result of a call of `fit`.

    Attributes:
        steps: number of optimizer steps taken, those before this call included.
        loss: last logged loss; None where it was not finite, or no step was left to take.
        skipped_steps: number of steps that changed nothing because they were not finite.
        seconds: wall time of this call.
    """

    steps: int
    loss: float | None
    skipped_steps: int
    seconds: float


class AlignedTrainer:
    """Train, sample and save one model.

    Args:
        model: base model; its UNet is trained in place.
        config: options of the run.

    Attributes:
        unet: network, with its adapter in place.
        config: options of the run, with the objective that the base model settles where it was left open.
        objective: objective that the network is trained on.
        trainable: trained parameters by name.
        ema: average of the trained parameters; None where `ema_decay` is 0.
        optimizer: fused AdamW.
        global_step: number of optimizer steps taken.

    Raises:
        ModelError: the base model is float16, or takes an input that text-to-image training does not give.
        RefusedInputError: the options do not fit this device or model, or the tracker is not installed.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig) -> None:
        self.config = config = settle_method(config, model.flow)
        self._precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.accelerator = _start_accelerator(config, self._precision)
        self.device = self.accelerator.device
        if config.cuda_graph and self.device.type != "cuda":
            raise RefusedInputError(f"cuda_graph needs a CUDA GPU, got {self.device.type}: leave it out")
        check_trainable(model, config)
        if config.compile:
            keep_compiled_code()
        # A few elements of each weight tell base models apart; a full finetuning takes its UNet from the checkpoint.
        # They are read before the model moves: from a GPU each of them would be fetched on its own.
        unet = ("unet",) if config.adapter == "lora" else ()
        self._base_model = model.fingerprint(*unet, "vae", "text_encoder", "text_encoder_2", most=4096)[:16]
        self.model = model.to(self.device)
        self.unet = model.unet
        self.objective = make_objective(config, model.flow)
        self.trainable = prepare_network(model, config)
        half = config.adapter == "lora" and self._precision == "bf16"
        self._half_base = HalfBase(self.unet, torch.bfloat16) if half else None
        self.ema = EMA(self.trainable, config.ema_decay) if config.ema_decay else None
        self._inputs = InputSampler(model, self.objective, config.seed, config.caption_dropout)
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

    @classmethod
    def from_pretrained(
        cls,
        model: "str | Path | DiffusionPipeline",
        config: TrainingConfig | None = None,
        model_options: ModelOptions | None = None,
    ) -> "AlignedTrainer":
        """Return the trainer of a hub id, a pipeline folder, a `.safetensors` file, or a loaded diffusers pipeline.

        Args:
            model: any of these; the UNet of a pipeline is trained in place.
            config: options of the run; None for the defaults.
            model_options: options of the base model; None for the defaults, which take all from the model itself.

        Raises:
            ModelError: the model cannot be loaded or trained; see `BaseModel` and `load_pipeline`.
            RefusedInputError: the options do not fit this device or model, or the tracker is not installed.
        """
        config = config or TrainingConfig()
        check_tracker(config.report_to)  # before the model is loaded, which may take minutes
        load = partial(BaseModel.load, model) if isinstance(model, str | Path) else partial(BaseModel, model)
        return cls(load(options=model_options), config)

    @property
    def global_batch_size(self) -> int:
        """Number of images per step, over all processes and backward passes."""
        num_processes: int = self.accelerator.num_processes
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * num_processes

    @property
    def alignment(self) -> Alignment:
        """Alignment of the base model, on the device; see `BaseModel.alignment`."""
        return self.model.alignment

    @property
    def paths(self) -> str:
        """Path that each part of a step takes, and why, in one line."""
        return self._training_step.paths()

    # The run

    def fit(self, dataset: ImageDataset) -> RunResult:
        """Train on a dataset until `max_train_steps`, with checkpoints, log and progress bar.

        Args:
            dataset: Samples {"image": PIL image, "text": caption or list of captions} by index, and a length. Optional
                methods `key(index)` and `captions(index)` save reading cached images; see `data.loading.ImageDataset`.

        Returns:
            Steps taken, last loss, skipped steps, and seconds of this call.

        Raises:
            DatasetError: a sample cannot be used; the steps before it are saved.
            CheckpointError: the checkpoint to resume from cannot be used.
            RefusedInputError: `output_dir` holds another run's checkpoints, or the disk is full.
            InterruptedRunError: SIGTERM or SIGINT arrived; a checkpoint is saved.
            NonFiniteRunError: ten steps in a row were not finite; the last checkpoint is intact.
        """
        config = self.config
        check_dataset(dataset)
        self._samples = len(dataset)
        self._resume()
        if self.accelerator.is_main_process:
            options = [dataclasses.asdict(part) for part in (self.model.options, config)]
            write_json(make_folder(config.output_dir) / "config.json", options[0] | options[1])
        logger.info("%s", self.paths)
        half = nullcontext() if self._half_base is None else self._half_base.in_use()
        log = RunLog(config, self.accelerator, self.global_step)
        with StopSignals() as signals, log, half, closing(self._batches(dataset)) as batches:
            for batch in self._saved_where_a_sample_fails(batches):
                loss = self.step(batch)
                log.count(batch["global_batch_size"])
                step = self.global_step
                done = step == config.max_train_steps
                logged = step % config.logging_steps == 0 or done
                if logged:
                    self._stop_if_not_finite()
                    log.write(step, loss.item(), self._learning_rate(step), int(self._training_step.skipped))
                # Several processes agree only where they log, and wait for the device anyway.
                alone = self.accelerator.num_processes == 1
                received = signals.agreed(self.device, self.accelerator.num_processes) if logged or alone else None
                if received is not None:
                    self._save_checkpoint()
                    raise InterruptedRunError(f"stopped by {signal.Signals(received).name} after step {step}: saved")
                if config.checkpointing_steps and (done or step % config.checkpointing_steps == 0):
                    self._save_checkpoint()
                if done:
                    break
        skipped = int(self._training_step.skipped)
        return RunResult(steps=self.global_step, loss=log.last_loss, skipped_steps=skipped, seconds=log.seconds)

    def _batches(self, dataset: ImageDataset) -> Generator[Batch]:
        """Yield this process' slice of each global batch from the current step on, encoded through the cache."""
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

    def step(self, batch: Batch) -> Tensor:
        """Take one optimizer step.

        Args:
            batch: this process' slice of the global batch; see `Batch`.

        Returns:
            The mean loss, float32 scalar on the device, detached: over the global batch with several processes, else
            over this slice. Reading it waits for the device.

        Raises:
            RefusedInputError: the batch is malformed; see `check_batch`.
        """
        check_batch(batch)
        if self._half_base is not None:
            self._half_base.use()  # first: the condition is cast to the type of the frozen weights
        inputs = self._inputs.sample(batch, self.global_step)
        loss = self._training_step(inputs, self._learning_rate(self.global_step))
        self.global_step += 1
        return loss

    def _stop_if_not_finite(self) -> None:
        """Stop a run that skips every step; this waits for the device."""
        in_a_row = int(self._training_step.skipped_in_a_row)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteRunError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, the last at step"
                f" {self.global_step}: lower learning_rate, or check the data; the weights are those before these steps"
            )

    def _saved_where_a_sample_fails(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; where a sample cannot be used, save the steps so far before the run stops."""
        began = self.global_step
        try:
            yield from batches
        except DatasetError as error:
            if self.global_step == began:
                raise
            self._save_checkpoint()
            raise DatasetError(f"{error}; step {self.global_step} is saved") from error

    def _save_checkpoint(self) -> None:
        """Save `checkpoint-N` with everything that a continuation needs; the main process alone writes."""
        if self.accelerator.is_main_process:
            write = partial(write_state, step=self._training_step, identity=self._identity(), samples=self._samples)
            save_checkpoint(self.config.output_dir, self.global_step, write, self.config.checkpoints_total_limit)

    def _resume(self) -> None:
        """Continue from the checkpoint that the options name, if they name one."""
        folder = choose_checkpoint(self.config, self.global_step)
        if folder is not None:
            self.global_step = load_state(
                folder, self._training_step, self._identity(), self._samples, self.config.max_train_steps
            )

    def _identity(self) -> dict[str, object]:
        """Return the settings that a continuation must match."""
        return run_identity(self.config, self._precision, self._base_model, self.model.facts, self.global_batch_size)

    # The result

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averaged weights and the exact frozen ones inside a `with` block, in evaluation mode."""
        exact = nullcontext() if self._half_base is None else self._half_base.exact()
        average = nullcontext() if self.ema is None else self.ema.swapped()
        self.unet.eval()
        try:
            with exact, average:
                yield
        finally:
            self.unet.train()

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
        """Generate one image for each prompt with the averaged weights, along flow time from t = 0.

        Args:
            prompts: one prompt, or several.
            num_inference_steps: integration steps, at least 1; "midpoint" and "heun" evaluate the network twice a step.
            guidance_scale: scale of classifier-free guidance; 1 turns it off.
            negative_prompt: prompt to steer away from; "" for the model's own empty prompt.
            height, width: size of the images in pixels; None for the training resolution.
            generator: source of the noise, on the device or the CPU; None for torch's global generator.
            method: integration method.

        Returns:
            One RGB image for each prompt.

        Raises:
            RefusedInputError: the autoencoder has no latents of this height or width, or the steps cannot be used.
        """
        cast = inputs_in_float32(self.unet) if self.config.adapter == "full" else nullcontext()
        with self.averaged(), cast:
            return generate(
                self.model.pipeline,
                prompts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                height=height or self.config.resolution,
                width=width or self.config.resolution,
                generator=generator,
                method=method,
                shift=self.config.recommended_shift,
                prediction_type="flow_prediction" if self.config.objective == "fm" else None,
                fm_form=self.config.fm_form,
            )

    def save_lora(self, folder: str | Path) -> Path:
        """Write the averaged adapter to the LoRA files of `lora_format`; see `publish_lora`."""
        with self.averaged():
            return publish_lora(self.model, self.objective, self.config, folder)

    def save_pipeline(self, folder: str | Path) -> Path:
        """Write the averaged model as a diffusers pipeline, and return its folder; see `publish_pipeline`."""
        with self.averaged():
            return publish_pipeline(self.model, self.objective, self.config, folder)


def _start_accelerator(config: TrainingConfig, precision: str) -> Accelerator:
    """Return the accelerator of this process, with the tracker of the run.

    Args:
        config: options of the run.
        precision: type of autocast, from the options or from `accelerate launch`.

    Raises:
        RefusedInputError: the precision or the tracker cannot be used, or accelerate does not see all processes.
    """
    if precision not in ("no", "bf16"):  # before Accelerator, which refuses fp16 on a CPU in its own words
        raise RefusedInputError(f"mixed_precision must be no or bf16, got {precision}")
    check_tracker(config.report_to)
    output = Path(config.output_dir)
    accelerator = Accelerator(
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output), str(output / "logs")),
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:  # each would train alone, and overwrite the files of the others
        raise RefusedInputError(
            f"{world} processes were started, and accelerate sees {accelerator.num_processes}: on a CPU set"
            " ACCELERATE_USE_CPU=true"
        )
    return accelerator
