"""Compare the settings of a run with those of the checkpoint that it continues. Imports no torch.

`check_settings` refuses at once what would be refused only after the model is loaded.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import CheckpointError
from d2f_fast.files.hashes import file_sha256
from d2f_fast.files.json_file import read_json
from d2f_fast.flow.scheduler_config import form_of_config
from d2f_fast.lora.source import check_lora_file, lora_identity, lora_path, parse_lora
from d2f_fast.lora.tags import check_tags, lora_tags
from d2f_fast.models.configs import ModelConfigs
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.checkpoint import named_checkpoint
from d2f_fast.training.launch import precision_of, processes_asked_for
from d2f_fast.training.method import check_starting_tags, settle_method
from d2f_fast.training.teacher_options import TeacherOptions

TRAINABLE_FILE, AVERAGE_FILE, OPTIMIZER_FILE = "trainable.safetensors", "ema.safetensors", "optimizer.safetensors"
# Options that may differ between a run and its continuation: they change nothing but, at most, the rounding of sums.
_FREE_ON_RESUME = {
    *("output_dir", "cache_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "report_to"),
    *("resume_from_checkpoint", "logging_steps", "dataloader_num_workers", "compile", "cuda_graph"),
    *("train_batch_size", "gradient_accumulation_steps"),  # their product with the processes is compared instead
    *("gradient_checkpointing", "lora_format", "sampling_shift"),
    *("validation_steps", "validation_prompts"),
}
# Options that the model, pairs or depth settle where they are None.
_SETTLED_BY_DATA = ("resolution", "caption_dropout", "first_last_layers")


# Settings that the checkpoints of one kind of data alone have.
_OF_TASKS = ("depth_normalization", "source_noise", "pairs", "dataset_weights")


class RunState(TypedDict):
    """Content of `state.json`.

    Attributes:
        identity: settings that a continuation must match, by name.
        samples: number of samples in the dataset.
        skipped_steps: number of steps skipped because they were not finite.
    """

    identity: dict[str, object]
    samples: int
    skipped_steps: int


def settings_of(config: TrainingConfig) -> dict[str, object]:
    """Return the options of a run that must match those of the checkpoint, by name.

    Args:
        config: options of the run.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_ON_RESUME}
    if not config.lr_scheduler.startswith("constant"):  # the other schedules depend on where they end
        settings["max_train_steps"] = config.max_train_steps
    return settings | {"conv_rank": config.conv_rank or 0, "first_last_layers": bool(config.first_last_layers)}


def check_settings(
    config: TrainingConfig,
    model_options: ModelOptions,
    teacher_options: TeacherOptions,
    configs: ModelConfigs | None,
    data_settings: Mapping[str, str | float] | None = None,
) -> None:
    """Refuse an objective that the model does not take, and settings that differ from those of a checkpoint.

    Args:
        config: options of the run.
        model_options: options of the base model.
        teacher_options: options of the teacher.
        configs: configurations of the base model; None for one whose files are not on this machine yet.
        data_settings: entries of `batches.data_settings` that are known without torch; None for captioned images.

    Raises:
        RefusedInputError: the base model, or the LoRA that the run starts from, does not take the objective.
        CheckpointError: the checkpoint cannot be continued with these options, or the LoRA is missing.
    """
    # What the teacher settles is compared after the teacher itself.
    unknown = {name for name in _SETTLED_BY_DATA if getattr(config, name) is None}
    config = teacher_options.settle(config)
    if configs is None:
        unknown |= {name for name, value in dataclasses.asdict(config).items() if value is None}
    else:
        config = settle_method(config, form_of_config(configs.scheduler))
        if config.init_lora is not None:
            path = lora_path(parse_lora(config.init_lora).path)
            tags = lora_tags(path)
            check_tags(f"LoRA {path}", tags, shift=1.0)  # Its shift is not used.
            check_starting_tags(path, tags, config)
    processes = processes_asked_for(os.environ)
    known: dict[str, object] = {
        "mixed_precision": precision_of(config),
        "global_batch_size": config.train_batch_size * config.gradient_accumulation_steps * processes,
        **dict.fromkeys(_OF_TASKS),
        **(data_settings or {}),
    }
    if model_options.prediction_type is not None:
        known["prediction_type"] = model_options.prediction_type
    if teacher_options.teacher is None:
        known["teacher"] = None
    if config.init_lora is not None and config.resume_from_checkpoint is not None:
        source = parse_lora(config.init_lora)
        known["init_lora"] = lora_identity(file_sha256(check_lora_file(source.path)), source.scale)
    check_continuation(config, known, unknown)


def check_continuation(config: TrainingConfig, known: Mapping[str, object], unknown: Iterable[str]) -> None:
    """Refuse a checkpoint that is not there, is past the end of the run, or was saved under other settings.

    Its tensors are read and checked later, when it is loaded.

    Args:
        config: options of the run, settled as far as is possible without the model.
        known: further settings of this run, by the names in the checkpoint.
        unknown: names of options that only the model or the data settle, and that are not compared yet.

    Raises:
        CheckpointError: the checkpoint cannot be continued with these options.
    """
    found = named_checkpoint(config.output_dir, config.resume_from_checkpoint)
    if found is None:
        return
    folder = found.folder
    state = read_state(folder)
    check_parts(folder, has_average=config.ema_decay > 0)
    refuse_past_end(folder, found.step, config.max_train_steps)
    now = json.loads(json.dumps(settings_of(config) | dict(known)))
    refuse_changes(folder, state["identity"], now, now.keys() - set(unknown))


def check_parts(folder: Path, *, has_average: bool) -> None:
    """Refuse a checkpoint that lacks a file which a continuation reads, whatever its manifest lists.

    Args:
        folder: folder of the checkpoint.
        has_average: whether the run keeps an average of the trained parameters.

    Raises:
        CheckpointError: a file is missing.
    """
    for name in (TRAINABLE_FILE, *((AVERAGE_FILE,) if has_average else ()), OPTIMIZER_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: resume from another checkpoint")


def refuse_past_end(folder: Path, steps_taken: int, max_train_steps: int) -> None:
    """Refuse a checkpoint of more steps than the run takes.

    Args:
        folder: folder of the checkpoint.
        steps_taken: its number of steps.
        max_train_steps: number of steps at which the run ends.

    Raises:
        CheckpointError: the checkpoint is past the end.
    """
    if steps_taken > max_train_steps:
        raise CheckpointError(f"{folder} is past max_train_steps {max_train_steps}: raise max_train_steps")


def refuse_changes(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse settings that differ from those of a checkpoint.

    Args:
        folder: folder of the checkpoint, for the message.
        was: settings of the checkpoint, as JSON holds them. An option that is missing had its default.
        now: settings of this run, as JSON holds them.
        names: names of the settings to compare.

    Raises:
        CheckpointError: a setting differs; the message names it.
    """
    # A checkpoint lacks the options that are newer than it. Its run went as it does now with their defaults.
    was = json.loads(json.dumps(settings_of(TrainingConfig()))) | was
    # The objective and the teacher come first, because they settle other options.
    for name in sorted(names, key=lambda name: (name != "objective", name != "teacher", name)):
        if was.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder / 'state.json'}: {name} was {was.get(name)!r} and is now {now.get(name)!r}: resume with the"
                " options of the checkpoint, or name a new output_dir"
            )


def read_state(folder: Path) -> RunState:
    """Read the `state.json` of a checkpoint.

    Args:
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or does not come from a training run.
    """
    path = folder / "state.json"
    state = read_json(path)
    kinds = {"identity": dict, "samples": int, "skipped_steps": int}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{path} does not describe a training run: resume from another checkpoint")
    return RunState(identity=state["identity"], samples=state["samples"], skipped_steps=state["skipped_steps"])
