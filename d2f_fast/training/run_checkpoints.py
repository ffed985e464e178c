"""Decide which steps of a run are saved: never weights that are not finite, nor in place of the last good ones."""

import logging
import sys
from functools import partial
from pathlib import Path

import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import printable
from d2f_fast.training.checkpoint import delete_old_checkpoints, save_checkpoint
from d2f_fast.training.resume import choose_checkpoint, load_state, write_state
from d2f_fast.training.step import TrainingStep

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


class NonFiniteRunError(RuntimeError):
    """Loss or gradient norm was not finite in too many steps in a row, or the weights are not finite."""

    exit_code = 2


class RunCheckpoints:
    """Save, resume and check the state of a run.

    Args:
        step: training step whose parameters, average, optimizer and counters are the state.
        writes: whether this process writes files; one process of a run does. All processes call the same methods.

    Attributes:
        saved_step: number of steps taken in the state that is on disk; 0 where none is.
    """

    def __init__(self, step: TrainingStep, *, writes: bool) -> None:
        self._step, self._writes = step, writes
        self.saved_step = 0

    def resume(self, config: TrainingConfig, identity: dict[str, object], samples: int, steps_taken: int) -> int:
        """Load the checkpoint that the options name, say so, and return the number of steps taken.

        Args:
            config: options of the run.
            identity: settings that must match the checkpoint's.
            samples: number of samples in the dataset.
            steps_taken: number of steps that were taken before; it is returned where the options name no checkpoint.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            RefusedInputError: the output folder holds what a new run would replace.
        """
        folder = choose_checkpoint(config, steps_taken)
        if folder is None:
            return steps_taken
        self.saved_step = load_state(folder, self._step, identity, samples, config.max_train_steps)
        if self._writes:
            line = f"going on from {printable(folder)}: step {self.saved_step} of {config.max_train_steps} is done"
            print(f"d2f: {line}", file=sys.stderr)
        return self.saved_step

    def save(
        self, config: TrainingConfig, identity: dict[str, object], samples: int, steps_taken: int, *, regular: bool
    ) -> None:
        """Save `checkpoint-N` with everything that a continuation needs.

        Checkpoints beyond `checkpoints_total_limit` are deleted, but the one before this one stays until a later step
        was finite, which shows that the weights in this one are good.

        Args:
            config: options of the run.
            identity: settings that a continuation must match.
            samples: number of samples in the dataset.
            steps_taken: number of steps taken.
            regular: whether the run goes on, so that a later step can be saved in place of this one. Nothing is saved
                then while steps are being skipped. Otherwise the step is saved in any case, and none is deleted.

        Raises:
            CheckpointError: the disk is full.
            NonFiniteRunError: the weights are not finite; nothing is saved.
        """
        self.refuse_non_finite_weights(steps_taken)
        skipping = int(self._step.skipped_in_a_row) > 0
        if skipping and regular:
            logger.warning("step %d is not saved, because it was not finite and changed nothing", steps_taken)
            return
        if self._writes:
            limit = config.checkpoints_total_limit
            keep = None if skipping or limit is None else max(limit, 2)
            write = partial(write_state, step=self._step, identity=identity, samples=samples)
            save_checkpoint(config.output_dir, steps_taken, write, keep)
        self.saved_step = steps_taken

    def delete_old(self, config: TrainingConfig, steps_taken: int) -> None:
        """Delete the checkpoints beyond the limit, once a finite step has followed the newest one.

        Args:
            config: options of the run.
            steps_taken: number of steps taken, the last of which was finite.
        """
        limit = config.checkpoints_total_limit
        if self._writes and limit is not None and 0 < self.saved_step < steps_taken:
            delete_old_checkpoints(Path(config.output_dir), self.saved_step, limit)

    def refuse_non_finite_steps(self, steps_taken: int) -> bool:
        """Stop a run that skips every step or has lost its weights; this waits for the device.

        Args:
            steps_taken: number of steps taken.

        Returns:
            Whether the last step was finite.

        Raises:
            NonFiniteRunError: ten steps in a row were not finite, or a weight is not finite.
        """
        in_a_row = int(self._step.skipped_in_a_row)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteRunError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, the last at step {steps_taken}: lower"
                " learning_rate, or check the data; the weights are those before these steps"
            )
        self.refuse_non_finite_weights(steps_taken)
        return in_a_row == 0

    def refuse_non_finite_weights(self, steps_taken: int) -> None:
        """Stop a run whose weights have become infinite or NaN; this waits for the device.

        Args:
            steps_taken: number of steps taken.

        Raises:
            NonFiniteRunError: a weight is not finite.
        """
        weights = [parameter.detach() for parameter in self._step.trainable.values()]
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(weights, float("inf"))])
        if not bool(largest.isfinite().all()):
            raise NonFiniteRunError(
                f"the weights are not finite after step {steps_taken}, which is not saved: lower learning_rate, or"
                " check the data; earlier checkpoints are intact"
            )
