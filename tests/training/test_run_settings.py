"""Settings that a continuation must match, compared before the model is loaded."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import CheckpointError
from d2f_fast.models.configs import ModelConfigs
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.run_settings import check_parts, check_settings, read_state, refuse_changes, settings_of
from d2f_fast.training.teacher_options import TeacherOptions

SETTLED = {"objective": "diff2flow", "loss_weighting": "flow", "resolution": 64, "caption_dropout": 0.1}


def continue_run(
    tmp_path: Path, saved: dict[str, object], known: bool = True, missing: Collection[str] = (), **options: Any
) -> None:
    """Check a continuation of a run with the default settings, but those that were saved otherwise or not at all."""
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    for name in ("trainable", "ema", "optimizer"):
        save_file({}, checkpoint / f"{name}.safetensors")
    identity = settings_of(TrainingConfig()) | SETTLED | {"mixed_precision": "no", "global_batch_size": 4} | saved
    identity = {name: value for name, value in identity.items() if name not in missing}
    state = {"identity": identity, "samples": 1, "skipped_steps": 0}
    (checkpoint / "state.json").write_text(json.dumps(state))
    config = TrainingConfig(output_dir=str(tmp_path), resume_from_checkpoint="latest", **options)
    configs = ModelConfigs({}, {}, {"prediction_type": "epsilon"}) if known else None
    check_settings(config, ModelOptions(), TeacherOptions(), configs)


@pytest.mark.parametrize(
    ("saved", "options", "sentence"),
    [
        ({"loss_weighting": "min_snr"}, {}, "loss_weighting was 'min_snr' and is now 'flow'"),
        ({}, {"rank": 3}, "rank was None and is now 3"),
        ({"init_lora": "0123:1"}, {}, "init_lora was '0123:1' and is now None"),
        ({"teacher": "0123"}, {}, "teacher was '0123' and is now None"),
        ({"depth_normalization": "affine"}, {}, "depth_normalization was 'affine' and is now None"),
        ({"source_noise": 0.5}, {}, "source_noise was 0.5 and is now None"),
        ({"pairs": "0123"}, {}, "pairs was '0123' and is now None"),
        ({"dataset_weights": "1.0, 2.0"}, {}, "dataset_weights was '1.0, 2.0' and is now None"),
        ({}, {"max_train_steps": 2}, "checkpoint-3 is past max_train_steps 2: raise max_train_steps"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, saved: Any, options: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        continue_run(tmp_path, saved, **options)


def test_teacher_is_named_before_the_dropout_that_it_settles(tmp_path: Path) -> None:
    was, now = {"teacher": "a 1", "caption_dropout": 0.1}, {"teacher": "a 3", "caption_dropout": 0.0}
    with pytest.raises(CheckpointError, match="teacher was 'a 1' and is now 'a 3'"):
        refuse_changes(tmp_path, was, now, now)


@pytest.mark.parametrize("known", [True, False], ids=["local model", "model of the hub"])
def test_settings_that_only_the_model_settles_are_not_compared(tmp_path: Path, known: bool) -> None:
    continue_run(tmp_path, {"base_model": "0123"}, known, learning_rate=1e-4, resolution=None)


def test_options_that_are_newer_than_the_checkpoint_had_their_defaults(tmp_path: Path) -> None:
    newer = ("lpips_weight", "lpips_net", "target_modules", "conv_rank", "first_last_layers", "adam_beta1")
    continue_run(tmp_path, {}, missing=newer, learning_rate=1e-4)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"adam_beta1 was 0\.9 and is now 0\.8: resume with the options"):
        continue_run(tmp_path / "other", {}, missing=newer, adam_beta1=0.8)


@pytest.mark.parametrize("was", [True, False, "full"])
def test_part_that_is_compiled_may_change(tmp_path: Path, was: object) -> None:
    continue_run(tmp_path, {"compile": was}, learning_rate=1e-4, compile="regional")


@pytest.mark.parametrize("missing", ["trainable.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_checkpoint_without_a_file_that_is_read_is_refused(missing: str, tmp_path: Path) -> None:
    for name in {"trainable.safetensors", "ema.safetensors", "optimizer.safetensors"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{missing} is missing: resume from another checkpoint"):
        check_parts(tmp_path, has_average=True)
    if missing == "ema.safetensors":
        check_parts(tmp_path, has_average=False)


@pytest.mark.parametrize("change", [{"identity": None}, {"samples": "7"}, {"skipped_steps": []}])
def test_state_of_another_form_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    state = {"identity": {}, "samples": 7, "skipped_steps": 0}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(CheckpointError, match=r"state\.json does not describe a training run"):
        read_state(tmp_path)
