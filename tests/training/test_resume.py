"""Resumed runs end bit-equal to uninterrupted ones, and a checkpoint that does not fit is refused."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from d2f_fast.errors import CheckpointError, RefusedInputError
from d2f_fast.files import tensor_file
from d2f_fast.files.json_file import write_json
from d2f_fast.training.checkpoint import save_checkpoint
from d2f_fast.training.optimizer_state import optimizer_tensors
from d2f_fast.training.trainer import AlignedTrainer

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"train_batch_size": 4},
    "flips, accumulation, warm-up": {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "caption_dropout": 0.3,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 5,
    },
    "random crops, no average": {"center_crop": False, "cache_latents": False, "ema_decay": 0.0},
    "full, half precision": {"adapter": "full", "mixed_precision": "bf16", "objective": "diffusion"},
}


@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_ends_bit_equal_to_an_uninterrupted_one(
    images: Any, state_of: Any, assert_equal: Any, logged_losses: Any, make_trainer: Any, run: str
) -> None:
    straight = make_trainer("straight", **RUNS[run])
    result = straight.fit(images())  # ten pictures in batches of four: three steps an epoch
    make_trainer("resumed", **RUNS[run], max_train_steps=4, checkpointing_steps=4).fit(images())
    resumed = make_trainer("resumed", **RUNS[run], resume_from_checkpoint="latest")
    assert resumed.fit(images())["loss"] == result["loss"]
    assert_equal(state_of(resumed), state_of(straight))
    assert logged_losses(resumed) == logged_losses(straight)
    assert len(set(logged_losses(straight))) == 7


def test_falling_learning_rate_resumes_exactly_and_keeps_its_end(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any
) -> None:
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    straight = make_trainer("run", **options)
    straight.fit(images())
    resumed = make_trainer("run", **options, resume_from_checkpoint="checkpoint-6")
    resumed.fit(images())
    assert_equal(state_of(resumed), state_of(straight))
    with pytest.raises(
        CheckpointError, match=r"state\.json: max_train_steps was 7 and is now 8: resume with the options"
    ):
        make_trainer("run", **options, max_train_steps=8, resume_from_checkpoint="latest").fit(images())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_channels_last_run_resumes_bit_for_bit(
    make_batch: Any, weights_of: Any, assert_equal: Any, make_trainer: Any, adapter: str
) -> None:
    def channels_last(**options: Any) -> AlignedTrainer:  # as a run on a GPU
        trainer = make_trainer(adapter=adapter, conv_rank=2 * (adapter == "lora"), train_batch_size=2, **options)
        trainer.unet.to(memory_format=torch.channels_last)
        return trainer

    straight = channels_last()
    for number in range(4):
        if number == 2:
            straight._save_checkpoint()
        straight.step(make_batch(2, number))
    resumed = channels_last(resume_from_checkpoint="latest")
    resumed._resume()
    for number in (2, 3):
        resumed.step(make_batch(2, number))
    assert_equal(weights_of(resumed), weights_of(straight))
    assert_equal(*(optimizer_tensors(trainer.optimizer, trainer.trainable) for trainer in (resumed, straight)))


def test_skipped_steps_are_counted_over_a_resumed_run(images: Any, make_non_finite: Any, make_trainer: Any) -> None:
    trainer = make_trainer(cache_latents=False, max_train_steps=4)
    make_non_finite(trainer, 2, 3)
    assert trainer.fit(images())["skipped_steps"] == 2
    resumed = make_trainer(cache_latents=False, max_train_steps=6, resume_from_checkpoint="latest")
    make_non_finite(resumed, 5, 5)
    assert resumed.fit(images())["skipped_steps"] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", 2e-2), ("objective", "fm"), ("rank", 3), ("train_batch_size", 3)),
        *(("mixed_precision", "bf16"), ("target_modules", ("to_k",))),
    ],
)
def test_resuming_with_another_option_is_refused_by_its_name(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, name: str, value: Any
) -> None:
    make_trainer(max_train_steps=1).fit(images(4))
    shown = {"train_batch_size": "global_batch_size"}.get(name, name)
    trainer = make_trainer(**{name: value}, resume_from_checkpoint="latest")
    before = state_of(trainer)
    with pytest.raises(CheckpointError, match=rf"checkpoint-1/state\.json: {shown} was .* and is now .*: resume with"):
        trainer.fit(images(4))
    assert_equal(state_of(trainer), before)


def test_resumed_run_may_split_the_global_batch_differently(images: Any, make_trainer: Any) -> None:
    make_trainer(max_train_steps=1).fit(images())
    resumed = make_trainer(train_batch_size=2, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert resumed.fit(images())["steps"] == 7


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_resuming_on_another_base_model_is_refused(
    make_config: Any, images: Any, make_trainer: Any, tiny_folder: Path, tmp_path: Path, adapter: str, part: str
) -> None:
    make_trainer(max_train_steps=1, adapter=adapter).fit(images())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).mul_(1.01)
    resuming = make_config(tmp_path / "run", adapter=adapter, resume_from_checkpoint="latest", max_train_steps=2)
    trainer = AlignedTrainer.from_pretrained(pipeline, resuming)
    if (adapter, part) == ("full", "unet"):  # whose weights are the checkpoint's
        assert trainer.fit(images())["steps"] == 2
    else:
        with pytest.raises(
            CheckpointError, match=r"state\.json: base_model was '\w{16}' and is now '\w{16}': resume with"
        ):
            trainer.fit(images())


def test_resuming_on_another_network_is_refused(
    make_config: Any, images: Any, make_trainer: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    make_trainer(max_train_steps=1, adapter="full").fit(images())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "block_out_channels": (16, 16)})
    resuming = make_config(tmp_path / "run", adapter="full", resume_from_checkpoint="latest")
    trainer = AlignedTrainer.from_pretrained(pipeline, resuming)
    with pytest.raises(
        CheckpointError, match=r"trainable\.safetensors holds the parameters of another model: resume with"
    ):
        trainer.fit(images())


def test_finished_run_resumes_without_a_step(images: Any, make_trainer: Any) -> None:
    make_trainer().fit(images())
    result = make_trainer(resume_from_checkpoint="latest").fit(images())
    assert result["steps"] == 7 and result["loss"] is None
    with pytest.raises(CheckpointError, match="checkpoint-7 is past max_train_steps 5: raise max_train_steps"):
        make_trainer(resume_from_checkpoint="latest", max_train_steps=5).fit(images())


def test_new_run_is_refused_in_a_folder_with_checkpoints(images: Any, make_trainer: Any) -> None:
    first = make_trainer(max_train_steps=3)
    first.fit(images())
    first.fit(images())  # its own: nothing is left to do
    log = Path(first.config.output_dir, "log.jsonl").read_bytes()
    with pytest.raises(RefusedInputError, match=r"run holds checkpoint-3 of an earlier run: continue it with --resume"):
        make_trainer(max_train_steps=4).fit(images())
    assert Path(first.config.output_dir, "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize(
    ("adapter", "result"), [("lora", r"\w+\.safetensors"), ("full", r"pipeline/model_index\.json")]
)
def test_folder_with_a_finished_result_and_no_checkpoint_is_refused(
    images: Any, make_trainer: Any, resume: str | None, adapter: str, result: str
) -> None:
    first = make_trainer(max_train_steps=1, checkpointing_steps=0, adapter=adapter)
    first.fit(images())
    output = Path(first.config.output_dir)
    first.save_lora(output) if adapter == "lora" else first.save_pipeline(output / "pipeline")
    log = (output / "log.jsonl").read_bytes()
    sentence = rf"run holds {result} of a finished run, and no checkpoint to continue from: name a new output_dir, or"
    with pytest.raises(RefusedInputError, match=sentence):
        make_trainer(max_train_steps=2, adapter=adapter, resume_from_checkpoint=resume).fit(images())
    assert (output / "log.jsonl").read_bytes() == log


def test_dataset_of_another_length_gives_a_warning(
    images: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(max_train_steps=1).fit(images(9))
    make_trainer(max_train_steps=2, resume_from_checkpoint="latest").fit(images(8))
    assert (
        "the dataset had 9 samples and now has 8: the run continues, in another order than it would have had"
        in caplog.text
    )


def test_checkpoint_of_something_else_is_refused(images: Any, make_trainer: Any) -> None:
    trainer = make_trainer()
    save_checkpoint(trainer.config.output_dir, 1, lambda folder: write_json(folder / "state.json", {}))
    with pytest.raises(CheckpointError, match=r"checkpoint-1/state\.json does not describe a training run"):
        make_trainer(resume_from_checkpoint="latest").fit(images())


def test_full_disk_keeps_the_previous_checkpoint_and_gives_one_line(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = tensor_file.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    straight = make_trainer("straight")
    straight.fit(images())
    with monkeypatch.context() as context:
        context.setattr(tensor_file, "save_file", full)
        with pytest.raises(RefusedInputError, match=r"the disk is full, .* free; make room") as caught:
            make_trainer().fit(images())
    assert "\n" not in str(caught.value)
    output = Path(make_trainer().config.output_dir)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-3"]
    resumed = make_trainer(resume_from_checkpoint="latest")
    resumed.fit(images())
    assert_equal(state_of(resumed), state_of(straight))


def test_no_checkpoint_is_written_when_checkpoints_are_off(images: Any, make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(checkpointing_steps=0, max_train_steps=2).fit(images())
    assert list(tmp_path.glob("run/*checkpoint*")) == []
