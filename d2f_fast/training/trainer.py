"""`AlignedTrainer`: finetune a diffusion model as a flow-matching model. It reads from top to bottom as a run does.

batch (`data`) → inputs (`inputs`) → step (`step`) → log (`run_log`) → checkpoint (`checkpoint`, `resume`)
"""

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch, check_batch
from d2f_fast.data.depth_encoding import DepthDataset
from d2f_fast.data.source_images import SourceTargetDataset
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.lock import locked_folder
from d2f_fast.image_sizes import simplest
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import local_source
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import trained_size
from d2f_fast.training.accelerator import start_accelerator
from d2f_fast.training.agreement import Agreement
from d2f_fast.training.batches import TrainingData, check_run, data_settings, encoded_batches
from d2f_fast.training.ema import EMA
from d2f_fast.training.inputs import InputSampler
from d2f_fast.training.launch import precision_of
from d2f_fast.training.network import (
    check_trainable,
    half_base_of,
    holds_half_base,
    prepare_network,
    settle_options,
)
from d2f_fast.training.objective import make_objective
from d2f_fast.training.perceptual import load_perceptual_loss
from d2f_fast.training.resume import base_fingerprint, run_identity
from d2f_fast.training.run_checkpoints import NonFiniteRunError, RunCheckpoints
from d2f_fast.training.run_log import RunLog, check_tracker, write_options
from d2f_fast.training.signals import stop_signals
from d2f_fast.training.step import TrainingStep, keep_compiled_code, learning_rates
from d2f_fast.training.stop import Stop
from d2f_fast.training.summary import recommended_guidance, recommended_steps
from d2f_fast.training.teacher import load_teacher, start_teacher
from d2f_fast.training.teacher_options import BASE, TeacherOptions, check_teacher_task
from d2f_fast.training.trained_model import TrainedModel
from d2f_fast.training.validation import Validation, start_validation
from d2f_fast.training.validation_images import log_validation_images, thumbnail, write_validation_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class RunResult(TypedDict):
    """Result of a call of `fit`.

    Attributes:
        steps: number of optimizer steps taken, those before this call included.
        loss: last logged loss; None where it was not finite, or no step was left to take.
        skipped_steps: number of steps that changed nothing because they were not finite.
        seconds: wall time of this call.
        validation_losses: last mean loss on held-out samples in each of 8 segments of flow time, from noise to image;
            missing where none was measured.
    """

    steps: int
    loss: float | None
    skipped_steps: int
    seconds: float
    validation_losses: NotRequired[list[float]]


class AlignedTrainer(TrainedModel):
    """Train, sample and save one model.

    Args:
        model: base model; its UNet is trained in place.
        config: options of the run.
        teacher_options: options of the teacher; None for no teacher.

    Attributes:
        teacher: teacher whose velocity is learned; None where it is that of the data.
        unet: network, with its adapter in place. A LoRA run in bfloat16 holds the frozen weights of a named model in
            bfloat16; `averaged` holds the exact ones.
        config: options of the run, with what the base model settles where it was left open: objective and resolution.
        objective: objective that the network is trained on.
        tags: entries of a file's header that describe the result and how to sample it.
        command_options: further options that `config.json` records, such as the names of the model and the data.
        trainable: trained parameters by name.
        ema: average of the trained parameters; None where `ema_decay` is 0.
        optimizer: fused AdamW.
        global_step: number of optimizer steps taken.

    Raises:
        ModelError: the base model is float16, or takes an input that text-to-image training does not give.
        RefusedInputError: the options do not fit this device or model, or a package or the network of LPIPS is missing.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig, teacher_options: TeacherOptions | None = None) -> None:
        self.teacher_options = teacher_options or TeacherOptions()
        self.config = config = settle_options(self.teacher_options.settle(config), model)
        self._precision = precision_of(config)
        self.accelerator = start_accelerator(config)
        self.device = self.accelerator.device
        if config.cuda_graph and self.device.type != "cuda":
            raise RefusedInputError(f"cuda_graph needs a CUDA GPU, got {self.device.type}: leave it out")
        check_trainable(model, config)
        if config.compile != "off":
            keep_compiled_code()
        # Before a LoRA is added, and before the model moves: from a GPU each weight would be fetched on its own.
        self._base_model, self._fingerprints = base_fingerprint(model, config), model.fingerprints()
        self.teacher = load_teacher(self.teacher_options, model, config)  # before the model is rounded
        self._half_base = half_base_of(model, config)  # before the model moves, so that only one copy of its UNet does
        self.model, self.unet = model.to(self.device), model.unet
        self.objective = make_objective(config, model.flow)
        perceptual = load_perceptual_loss(config, model)
        self.trainable = prepare_network(model, config)
        self.ema = EMA(self.trainable, config.ema_decay) if config.ema_decay else None
        self._inputs = InputSampler(model, self.objective, config.seed, config.caption_dropout or 0.0)
        teacher = start_teacher(self.teacher, self.objective, model, self._precision, compile=config.compile)
        parts = self.unet, self.objective, self.trainable, self.ema
        num_processes: int = self.accelerator.num_processes
        self._training_step = TrainingStep(
            *parts, config, self.device, self._precision, num_processes, teacher, perceptual
        )
        self._training_step.starting_lora = model.starting_lora
        self._training_step.tags = self.tags = self._tags()
        self.optimizer = self._training_step.optimizer
        self._checkpoints = RunCheckpoints(self._training_step, writes=self.accelerator.is_main_process)
        self._agreement = Agreement(self.device, num_processes)
        self._learning_rate = learning_rates(config)
        self.global_step, self._samples = 0, 0
        self._data_settings: dict[str, str | float] = {}
        self.thumbnail: str | None = None
        self._validation: Validation | None = None
        self._validation_losses: list[float] | None = None
        self.command_options: dict[str, object] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: "str | Path | DiffusionPipeline",
        config: TrainingConfig | None = None,
        model_options: ModelOptions | None = None,
        teacher_options: TeacherOptions | None = None,
        *,
        context_images: int = 0,
    ) -> "AlignedTrainer":
        """Return the trainer of a hub id, a pipeline folder, a `.safetensors` file, or a loaded diffusers pipeline.

        Args:
            model: any of these; the UNet of a pipeline is trained in place, and `init_lora` changes its text encoders.
            config: options of the run; None for the defaults. A resolution that they leave open is that of the model's
                training, where its files say it, or else that of its configuration.
            model_options: options of the base model; None for the defaults, which take all from the model itself.
            teacher_options: options of the teacher; None for no teacher.
            context_images: number of images whose latents the network sees beside its own, 1 for depth. A text-to-image
                model is widened, see `BaseModel.see_images`; 0 leaves it as it is.

        Raises:
            ModelError: the model cannot be loaded or trained; see `BaseModel` and `load_pipeline`.
            RefusedInputError: the options do not fit this device or model, or the tracker is not installed.
        """
        config = config or TrainingConfig()
        check_tracker(config.report_to)  # before the model is loaded, which may take minutes
        if isinstance(model, str | Path):
            source = local_source(str(model), model_options)
            if teacher_options is not None and teacher_options.teacher == BASE:
                check_teacher_task(source, ())
            config = replace(config, resolution=config.resolution or simplest(trained_size(source, ())))
            loaded = BaseModel.load(model, options=model_options, unet_as_stored=holds_half_base(config))
        else:
            loaded = BaseModel(model, model_options)
        if context_images:
            loaded.see_images(context_images)
        return cls(loaded, config, teacher_options)

    @property
    def global_batch_size(self) -> int:
        """Number of images per step, over all processes and backward passes."""
        num_processes: int = self.accelerator.num_processes
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * num_processes

    @property
    def paths(self) -> str:
        """Path that each part of a step takes, and why, in one line."""
        return self._training_step.paths()

    # The run

    def fit(self, dataset: TrainingData, validation: TrainingData | None = None) -> RunResult:
        """Train on a dataset until `max_train_steps`, with checkpoints, log and progress bar.

        Args:
            dataset: `PairDataset`; `SourceTargetDataset`; `DepthDataset`, for a network that sees one image
                (`BaseModel.see_images`); or samples {"image": PIL image, "text": caption or captions}, and a length.
                Optional methods `key(index)` and `captions(index)` save reading cached images; see
                `data.loading.ImageDataset`.
            validation: held-out samples, whose loss is measured every `validation_steps`; None for none. Their flow
                starts as that of the training.

        Returns:
            Steps taken, last loss, skipped steps, and seconds of this call.

        Raises:
            RefusedInputError: a sample cannot be used (`DatasetError`), the checkpoint to resume from cannot be used
                (`CheckpointError`), `output_dir` holds another run or is in use by one, or the disk is full. The
                message says whether the steps so far are saved.
            InterruptedRunError: SIGTERM or SIGINT arrived; a checkpoint is saved.
            LostProcessError: another process of the run has ended.
            NonFiniteRunError: ten steps in a row were not finite, or a weight is not; the last checkpoint is intact.
        """
        check_run(dataset, validation, self.config, has_teacher=self.teacher is not None)
        batch: Batch | None = None
        main, whole = self.accelerator.is_main_process, self._training_step.is_whole
        with stop_signals(self.has_unsaved_steps, announce=main) as signals:
            stop = Stop(self._agreement, signals, self._save_unsaved_steps, main)
            with ExitStack() as stack:
                try:
                    log, batches = self._begin(dataset, validation, stack)
                except RefusedInputError as error:
                    stop.where_agreed(error, self.global_step)
                    raise
                failure: Exception | None = None
                while True:
                    if failure is None and signals.received is None:
                        try:
                            batch = next(batches, None)
                        except Exception as error:
                            failure = error
                    # What one process meets stops all of them here: none may wait for another one in a step.
                    stop.where_agreed(failure, self.global_step)
                    if batch is None:
                        break
                    loss = stop.where_a_step_fails(partial(self.step, batch), self.global_step, whole)
                    failure = self._log_and_save(log, batch, loss)
        skipped = int(self._training_step.skipped)
        result = RunResult(steps=self.global_step, loss=log.last_loss, skipped_steps=skipped, seconds=log.seconds)
        if self._validation_losses is not None:
            result["validation_losses"] = self._validation_losses
        return result

    def has_unsaved_steps(self) -> bool:
        """Return whether this process may not end at once: steps are unsaved, or other processes would wait for it."""
        return self.global_step > self._checkpoints.saved_step or self.accelerator.num_processes > 1

    def _begin(
        self, dataset: TrainingData, validation: TrainingData | None, stack: ExitStack
    ) -> tuple[RunLog, Generator[Batch]]:
        """Lock the output folder, continue from a checkpoint, and return the log and the batches, closed by `stack`."""
        config, main, self._samples = self.config, self.accelerator.is_main_process, len(dataset)
        if main:
            stack.enter_context(locked_folder(config.output_dir))
        self._training_step.tags = self.tags = self._tags(dataset)
        of_data = [dataset.options] if isinstance(dataset, DepthDataset | SourceTargetDataset) else []
        self._data_settings = data_settings(dataset)
        self._resume()
        if main:
            own = self.command_options
            write_options(config.output_dir, own, self.model.options, self.teacher_options, *of_data, config)
        logger.info("%s", self.paths)
        log = stack.enter_context(RunLog(config, self.accelerator, self.global_step))
        if self._half_base is not None:
            # A given pipeline comes back as it was.
            stack.enter_context(self._half_base.in_use(restore=not self.model.unet_as_stored))
        self._validation, self._validation_losses = None, None
        if validation is not None and config.validation_steps and main:
            parts = self.model, config, self._fingerprints, self._inputs, self._training_step
            self._validation = start_validation(validation, *parts)
        if config.validation_steps and self.global_step == 0:
            self._validate(log)
        elif self.global_step == config.max_train_steps:
            self._generate_validation_images()
        batches = encoded_batches(dataset, self.model, config, self._fingerprints, self.accelerator, self.global_step)
        return log, stack.enter_context(closing(batches))

    def step(self, batch: Batch) -> Tensor:
        """Take one optimizer step.

        Args:
            batch: this process' slice of the global batch; see `Batch`.

        Returns:
            The mean loss, float32 scalar on the device, detached: over the global batch with several processes, else
            over this slice. Reading it waits for the device.

        Raises:
            RefusedInputError: the batch is malformed; see `check_batch`. Or it has a mask, and the loss LPIPS.
        """
        check_batch(batch)
        if self.config.lpips_weight and "mask" in batch:
            raise RefusedInputError(
                "mask weighs latents, and lpips_weight compares whole images: leave one of the two out"
            )
        if self._half_base is not None:
            self._half_base.use()  # first: the condition is cast to the type of the frozen weights
        inputs = self._inputs.sample(batch, self.global_step)
        loss = self._training_step(inputs, self._learning_rate(self.global_step))
        self.global_step += 1
        return loss

    def _log_and_save(self, log: RunLog, batch: Batch, loss: Tensor) -> Exception | None:
        """Log and save the step that was taken, where it is due, and return why it could not be done.

        Raises:
            NonFiniteRunError: the run has diverged, as all processes find alike.
        """
        config, step = self.config, self.global_step
        log.count(batch["global_batch_size"])
        done = step == config.max_train_steps
        try:
            if step % config.logging_steps == 0 or done:
                if self._checkpoints.refuse_non_finite_steps(step):
                    self._checkpoints.delete_old(config, step)
                skipped, parts = int(self._training_step.skipped), self._training_step.parts()
                log.write(step, loss.item(), self._learning_rate(step), skipped, parts)
            if config.validation_steps and (done or step % config.validation_steps == 0):
                self._validate(log)
            if config.checkpointing_steps and (done or step % config.checkpointing_steps == 0):
                self._save_checkpoint(regular=not done)
        except NonFiniteRunError:
            raise
        except Exception as error:
            return error
        return None

    def _validate(self, log: RunLog) -> None:
        """Measure the loss on held-out samples, where there are any, and generate the images of validation prompts."""
        if self._validation is not None:
            with self.averaged(exact_base=False):
                self._validation_losses = self._validation.measure()
            log.write_validation(self.global_step, self._validation_losses)
        self._generate_validation_images()

    def _generate_validation_images(self) -> None:
        """Write one image for each validation prompt, in the main process, from the same noise each time."""
        config = self.config
        if config.validation_prompts and self.accelerator.is_main_process:
            steps, guidance = recommended_steps(self.tags), recommended_guidance(self.tags)
            generator = torch.Generator().manual_seed(config.seed)
            images = self.sample(config.validation_prompts, steps, guidance, generator=generator)
            write_validation_images(images, config.output_dir, self.global_step)
            log_validation_images(self.accelerator, images, self.global_step)
            self.thumbnail = thumbnail(images[0])

    def _save_checkpoint(self, *, regular: bool = False) -> None:
        """Save `checkpoint-N`; see `RunCheckpoints.save`."""
        self._checkpoints.save(self.config, self._identity(), self._samples, self.global_step, regular=regular)

    def _save_unsaved_steps(self) -> str:
        """Save a run that has to stop, and return why it could not be saved; "" where it is saved."""
        if self.global_step == self._checkpoints.saved_step:
            return ""
        try:
            self._save_checkpoint()
        except (RefusedInputError, NonFiniteRunError, OSError) as error:
            return str(error)
        return ""

    def _resume(self) -> None:
        """Continue from the checkpoint that the options name, if they name one."""
        self.global_step = self._checkpoints.resume(self.config, self._identity(), self._samples, self.global_step)

    def _identity(self) -> dict[str, object]:
        """Return the settings that a continuation must match."""
        own = run_identity(self.config, self._precision, self._base_model, self.model, self.global_batch_size)
        own |= self._data_settings
        return own if self.teacher is None else own | {"teacher": self.teacher.identity}
