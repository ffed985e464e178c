"""Continue a run from a checkpoint: choose it, check that it belongs to the run, and load it.

checkpoint-N/trainable.safetensors      the trained parameters by name
checkpoint-N/ema.safetensors            their averages, where the run keeps them
checkpoint-N/optimizer.safetensors      the state of AdamW
checkpoint-N/state.json                 what a continuation must match, and the counters
checkpoint-N/pytorch_lora_weights.safetensors    with a LoRA, its averaged weights, to sample with; not read again
"""

import json
import logging
from pathlib import Path

import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import CheckpointError
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.checkpoint import MANIFEST, find_checkpoint, refuse_used_folder
from d2f_fast.training.optimizer_state import read_optimizer, write_optimizer
from d2f_fast.training.publish import write_checkpoint_lora
from d2f_fast.training.run_settings import (
    AVERAGE_FILE,
    OPTIMIZER_FILE,
    TRAINABLE_FILE,
    RunState,
    check_parts,
    read_state,
    refuse_changes,
    refuse_past_end,
    settings_of,
)
from d2f_fast.training.step import TrainingStep

logger = logging.getLogger(__name__)


def base_fingerprint(model: BaseModel, config: TrainingConfig) -> str:
    """Return a fingerprint of the base model that a continuation must match.

    A few elements of each weight tell base models apart. A full finetuning takes its UNet from the checkpoint, so that
    the base's does not count.

    Args:
        model: base model of the run, before it is changed.
        config: options of the run.
    """
    unet = ("unet",) if config.adapter == "lora" else ()
    return model.fingerprint(*unet, "vae", "text_encoder", "text_encoder_2", most=4096)[:16]


def run_identity(
    config: TrainingConfig, precision: str, base_model: str, model: BaseModel, global_batch_size: int
) -> dict[str, object]:
    """Return the settings that must match the checkpoint's, by name, as JSON holds them.

    Args:
        config: options of the run.
        precision: "bf16" or "no", the type of autocast.
        base_model: fingerprint of the base model.
        model: base model of the run: what it is taken for, and the LoRA that the run started from.
        global_batch_size: number of samples a step, over all processes and backward passes.
    """
    identity = settings_of(config)
    identity |= {"mixed_precision": precision, "base_model": base_model, "global_batch_size": global_batch_size}
    facts, start = model.facts, model.starting_lora
    identity |= {"prediction_type": facts.prediction_type, "rescale_betas_zero_snr": facts.zero_snr}
    identity["vae_reflection_padding"] = facts.vae_reflection_padding
    if start is not None:  # its file may have moved, but must be the same
        identity["init_lora"] = start.identity
    as_json: dict[str, object] = json.loads(json.dumps(identity))
    return as_json


def choose_checkpoint(config: TrainingConfig, step: int) -> Path | None:
    """Return the verified checkpoint that the options name; None begins the run from its start.

    Args:
        config: options of the run.
        step: number of steps that this trainer has taken before.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        RefusedInputError: the output folder holds what a new run would replace; see `refuse_used_folder`.
    """
    if step == 0:
        refuse_used_folder(config.output_dir, config.resume_from_checkpoint)
    return find_checkpoint(config.output_dir, config.resume_from_checkpoint)


def write_state(folder: Path, step: TrainingStep, identity: dict[str, object], samples: int) -> None:
    """Write everything that a continuation needs into the folder of a checkpoint.

    Args:
        folder: empty folder, whose name ends with "-" and the number of steps taken.
        step: training step whose parameters, average, optimizer and counters are kept.
        identity: settings that a continuation must match.
        samples: number of samples in the dataset.

    Raises:
        CheckpointError: a tensor holds NaN or an infinity.
        RefusedInputError: the disk is full.
    """
    write_tensors(folder / TRAINABLE_FILE, {name: p.detach() for name, p in step.trainable.items()})
    if step.ema is not None:
        write_tensors(folder / AVERAGE_FILE, step.ema.state_dict())
    write_optimizer(folder / OPTIMIZER_FILE, step.optimizer, step.trainable)
    state: RunState = {"identity": identity, "samples": samples, "skipped_steps": int(step.skipped)}
    write_json(folder / "state.json", state)
    if step.config.adapter == "lora":
        # `save_checkpoint` ends the folder's name with the number of steps.
        steps, batch_size = int(folder.name.rpartition("-")[2]), int(str(identity["global_batch_size"]))
        write_checkpoint_lora(folder, step, steps, batch_size)


def load_state(
    folder: Path, step: TrainingStep, identity: dict[str, object], samples: int, max_train_steps: int
) -> int:
    """Load what `write_state` wrote, in place, and return the number of optimizer steps taken.

    Args:
        folder: verified checkpoint.
        step: training step whose parameters, average, optimizer and counters are replaced.
        identity: settings of this run, which must match the checkpoint's.
        samples: number of samples in the dataset of this run; another number than before is logged as a warning.
        max_train_steps: number of steps at which this run ends.

    Raises:
        CheckpointError: the checkpoint belongs to another run or model, or is past the end of this run.
    """
    steps_taken = int(read_json(folder / MANIFEST)["step"])
    state = read_state(folder)
    check_parts(folder, has_average=step.ema is not None)
    refuse_past_end(folder, steps_taken, max_train_steps)
    if state["samples"] != samples:
        logger.warning(
            "the dataset had %d samples and now has %d: the run continues, in another order than it would have had",
            *(state["samples"], samples),
        )
    refuse_changes(folder, state["identity"], identity, identity.keys() | state["identity"].keys())
    trained, _ = read_tensors(folder / TRAINABLE_FILE)
    if {name: x.shape for name, x in trained.items()} != {name: x.shape for name, x in step.trainable.items()}:
        raise CheckpointError(
            f"{folder / 'trainable.safetensors'} holds the parameters of another model: resume with the model of the"
            " checkpoint"
        )
    with torch.no_grad():
        for name, parameter in step.trainable.items():
            parameter.copy_(trained[name])
    if step.ema is not None:
        step.ema.load_state_dict(read_tensors(folder / AVERAGE_FILE)[0])
    read_optimizer(folder / OPTIMIZER_FILE, step.optimizer, step.trainable)
    step.state_was_replaced()
    step.skipped.fill_(state["skipped_steps"])
    return steps_taken
