"""The trainer: one step against closed forms, and runs that end bit-equal however they were interrupted.

Run as a script, this file is the process that gets killed: it imports torch once and forks a child for every run.
"""

import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data import cache
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.order import batch_indices
from d2f_fast.errors import CheckpointError, DatasetError, ModelError, RefusedInputError
from d2f_fast.files import tensor_file
from d2f_fast.files.json_file import write_json
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.training.checkpoint import find_checkpoint, save_checkpoint, verify_checkpoint
from d2f_fast.training.optimizer_state import pack_optimizer
from d2f_fast.training.trainer import AlignedTrainer, InterruptedRunError, NonFiniteRunError


class Pictures:
    """Ten random pictures with captions; `pause` is how long reading one takes."""

    def __init__(self, length: int = 10, pause: float = 0.0) -> None:
        self.length, self.pause = length, pause

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.pause)
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        return {"image": Image.fromarray(pixels), "text": ["abc"[index % 3] * 2, "d e"]}


def config(output_dir: Path, **options: Any) -> TrainingConfig:
    defaults = {
        "resolution": 16,
        "rank": 2,
        "target_modules": ("to_q", "to_out.0", "ff.net.2"),
        "max_train_steps": 7,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "learning_rate": 1e-2,
    }
    return TrainingConfig(output_dir=str(output_dir), **{**defaults, **options})


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., AlignedTrainer]:
    """Make a trainer of the tiny model; the first argument names its output folder."""

    def trainer(output: str = "run", **options: Any) -> AlignedTrainer:
        return AlignedTrainer.from_pretrained(tiny_folder, config(tmp_path / output, **options))

    return trainer


def state(trainer: AlignedTrainer) -> dict[str, Tensor]:
    """Copies of everything that a step may change: weights, average, optimizer."""
    tensors = {f"trainable.{name}": parameter.detach() for name, parameter in trainer.trainable.items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.state_dict().items()} if trainer.ema else {}
    return {name: tensor.clone() for name, tensor in (tensors | pack_optimizer(trainer.optimizer)[0]).items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def losses(trainer: AlignedTrainer) -> list[float]:
    """What the log says of each step."""
    rows = [json.loads(line) for line in (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in sorted(rows, key=lambda row: row["step"])]


def batch(size: int = 4, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(size, 8, 16, generator=generator),
    }
    return {**tensors, **changes}


def gradients(trainer: AlignedTrainer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.trainable.items() if parameter.grad is not None}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Relative distance of two sets of tensors."""
    assert first.keys() == second.keys() and first
    one, other = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
    return ((one - other).norm() / other.norm()).item()


# One step


def drawn(trainer: AlignedTrainer, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, time and text condition of the trainer's next step, before it is taken."""
    from d2f_fast.training.trainer import _step_seed

    generator = torch.Generator().manual_seed(_step_seed(trainer.config.seed, trainer.global_step))
    latents, noise, t, condition, _, _ = trainer._prepare(given, generator)
    return latents, noise, t, condition["encoder_hidden_states"]


def closed_form(
    objective: str, unet: Any, ddim: Any, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    """Loss of an ε-predicting network in float64, from the paper's equations and diffusers' own table alone."""
    if objective == "fm":
        state = t[:, None, None, None] * latents + (1 - t)[:, None, None, None] * noise
        return (unet(state, 1000 * (1 - t), text).sample - (noise - latents)).square().mean()
    table = ddim.alphas_cumprod.double().sqrt() / (
        ddim.alphas_cumprod.double().sqrt() + (1 - ddim.alphas_cumprod.double()).sqrt()
    )
    timestep = np.interp(t.numpy(), table.numpy()[::-1], np.arange(1000)[::-1])
    if objective == "diffusion":
        steps = torch.from_numpy(timestep).round().long()
        sample = ddim.add_noise(latents, noise, steps)
        return (unet(sample, steps, text).sample - noise).square().mean()
    assert table[-1] < t.min() and t.max() < table[0]  # the paper's formulas hold inside the table
    t = t[:, None, None, None].double()
    alpha, sigma = t / (t**2 + (1 - t) ** 2).sqrt(), (1 - t) / (t**2 + (1 - t) ** 2).sqrt()
    sample = (alpha * latents + sigma * noise).float()
    output = unet(sample, torch.from_numpy(timestep).float(), text).sample
    velocity = (sample - (alpha + sigma) * output) / alpha
    return (velocity - (latents - noise)).square().mean()


@pytest.mark.parametrize("objective", ["diff2flow", "fm", "diffusion"])
def test_the_loss_of_a_step_is_the_closed_form(make: Any, tiny_folder: Path, objective: str) -> None:
    trainer = make(objective=objective, caption_dropout=0.0, seed=4)
    given = batch()
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    ddim = DDIMScheduler.from_pretrained(tiny_folder / "scheduler")
    with torch.no_grad():
        expected = closed_form(objective, unet, ddim, *drawn(trainer, given))
    assert trainer.step(given).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("options", "weight"), [
    ({"loss_weighting": "native"}, lambda t: t**2),  # 1 / Q² of an ε-prediction
    ({"loss_weighting": "min_snr", "snr_gamma": 0.3}, lambda t: (0.3 * ((1 - t) / t) ** 2).clamp(max=1)),
], ids=["native", "min_snr"])  # fmt: skip
def test_the_weighting_asked_for_is_trained_on(
    make: Any, tiny_folder: Path, options: dict[str, Any], weight: Callable[[Tensor], Tensor]
) -> None:
    trainer = make(caption_dropout=0.0, seed=4, **options)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    ddim = DDIMScheduler.from_pretrained(tiny_folder / "scheduler")
    draws = drawn(trainer, batch())
    with torch.no_grad():
        each = [closed_form("diff2flow", unet, ddim, *(x[i : i + 1] for x in draws)) for i in range(4)]
    weights = weight(draws[2].double())
    assert 0.01 < weights.min() < 0.9
    expected = (weights * torch.stack(each)).mean()
    assert trainer.step(batch()).item() == pytest.approx(expected.item(), rel=1e-4)


TIMES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "timestep_sampling": (
        {"timestep_sampling": "mode"},
        lambda u, z: 1 - u - 1.29 * ((torch.pi / 2 * u).cos() ** 2 - 1 + u),
    ),
    "logit_mean": ({"timestep_sampling": "logit_normal", "logit_mean": -0.7}, lambda u, z: (z - 0.7).sigmoid()),
    "logit_std": ({"timestep_sampling": "logit_normal", "logit_std": 0.4}, lambda u, z: (0.4 * z).sigmoid()),
    "flow_shift": ({"flow_shift": 3.0}, lambda u, z: 3 * u / (1 + 2 * u)),
}


@pytest.mark.parametrize("option", TIMES)
def test_the_density_asked_for_is_trained_on(make: Any, option: str) -> None:
    from d2f_fast.training.trainer import _step_seed

    options, sigma = TIMES[option]
    trainer, times = make(**options), list[Tensor]()
    compute = trainer._training_step.loss

    def noting(latents: Tensor, noise: Tensor, t: Tensor, *others: Any) -> Tensor:
        times.append(t)
        return compute(latents, noise, t, *others)

    trainer._training_step.loss = noting
    trainer.step(batch())
    generator = torch.Generator().manual_seed(_step_seed(trainer.config.seed, 0))
    torch.randn(2, *batch()["latents"].shape, generator=generator)  # of the posterior, and of the state
    state = generator.get_state()
    u = torch.rand(4, generator=generator).double()
    z = torch.randn(4, generator=generator.set_state(state)).double()
    torch.testing.assert_close(1 - times[0].double(), sigma(u, z), rtol=0, atol=1e-6)


def test_the_captions_of_the_dropped_share_become_the_empty_prompt(make: Any) -> None:
    trainer = make(caption_dropout=0.5)
    given = batch(64)
    text = drawn(trainer, given)[-1]
    null = trainer.model.encode_prompts([""])["encoder_hidden_states"][0]
    dropped = (text == null).flatten(1).all(1)
    assert 20 <= dropped.sum() <= 44
    assert torch.equal(text[~dropped], given["encoder_hidden_states"][~dropped])


def test_a_step_takes_every_form_of_picture_text_and_mask(make: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    prompts = ["a b", "c"]
    model: BaseModel = make().model
    posterior = model.encode_images(pixels)
    tokenizer = model.pipeline.tokenizer
    ids = tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt").input_ids
    text = model.encode_prompts(prompts)

    def loss(**given: Any) -> float:
        return make().step(given).item()

    whole = loss(pixel_values=pixels, **text)
    assert loss(**posterior, **text) == whole
    assert loss(pixel_values=pixels, input_ids=ids) == whole
    ones = torch.ones(2, 1, 8, 8)
    assert loss(pixel_values=pixels, **text, mask=ones) == pytest.approx(whole, rel=1e-6)
    assert loss(pixel_values=pixels, **text, mask=0 * ones) == 0
    certain = posterior | {"std": torch.zeros_like(posterior["std"])}
    assert loss(latents=posterior["mean"] * 0.5, **text) == pytest.approx(loss(**certain, **text), rel=1e-6)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4), (3, 2)])
def test_the_split_into_backward_passes_changes_nothing(make: Any, size: int, accumulation: int) -> None:
    whole = make(train_batch_size=4, max_grad_norm=1e9)
    parts = make(train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=1e9)
    given = batch(mask=torch.rand(4, 1, 8, 8))
    assert parts.step(given).item() == pytest.approx(whole.step(given).item(), rel=1e-6)
    assert distance(gradients(parts), gradients(whole)) <= 1e-5


@pytest.mark.parametrize("shares", [(2, 2), (3, 1), (4, 0)])
def test_the_gradients_of_the_shares_sum_to_those_of_the_global_batch(make: Any, shares: tuple[int, ...]) -> None:
    whole = make(max_grad_norm=1e9)
    loss = whole.step(batch()).item()
    total, summed, offset = 0.0, {name: torch.zeros_like(g) for name, g in gradients(whole).items()}, 0
    for size in shares:
        one = make(max_grad_norm=1e9)
        part = {name: tensor[offset : offset + size] for name, tensor in batch().items()}
        total += one.step({**part, "offset": offset, "global_batch_size": 4}).item() * size / 4
        summed = {name: summed[name] + g for name, g in gradients(one).items()}
        offset += size
    assert total == pytest.approx(loss, rel=1e-6)
    assert distance(summed, gradients(whole)) <= 1e-5


def test_every_weight_trains_in_full_finetuning(make: Any) -> None:
    trainer = make(adapter="full")
    before = {name: parameter.detach().clone() for name, parameter in trainer.unet.named_parameters()}
    first = trainer.step(batch()).item()
    assert before.keys() == trainer.trainable.keys()
    assert [name for name, old in before.items() if torch.equal(old, trainer.trainable[name])] == []
    trainer.global_step = 0  # the same draws again
    assert trainer.step(batch()).item() < first


def test_bfloat16_trains_float32_weights_to_nearly_the_same_loss(make: Any) -> None:
    loss = make(mixed_precision="bf16").step(batch())
    assert loss.dtype == torch.float32
    exact = make(mixed_precision="no").step(batch()).item()
    assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.03)


def test_float16_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedInputError, match="mixed_precision must be no or bf16, got fp16"):
        make(mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RefusedInputError, match="mixed_precision must be no or bf16, got fp16"):
        make()


# Steps that are not finite


@pytest.mark.parametrize("where", ["latents", "encoder_hidden_states", "loss alone"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted(make: Any, where: str, value: float) -> None:
    trainer = make(caption_dropout=0.0)
    trainer.step(batch())
    before = state(trainer)
    bad, compute = batch(), trainer._training_step.loss
    if where == "loss alone":  # its gradient is finite
        trainer._training_step.loss = lambda *arguments: compute(*arguments) + value
    else:
        bad[where][1] = value
    loss = trainer.step(bad)
    trainer._training_step.loss = compute
    assert not loss.isfinite()
    assert_equal(state(trainer), before)
    assert (int(trainer._training_step.skipped), trainer.global_step) == (1, 2)
    assert trainer.step(batch()).isfinite()
    assert int(trainer._training_step.skipped_in_a_row) == 0
    after = state(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in before if name.startswith("trainable."))


def poison(trainer: AlignedTrainer, first: int, last: int) -> None:
    """Make the autoencoder give NaN in the given steps."""
    encode = trainer.model.encode_images

    def encode_images(pixel_values: Tensor) -> dict[str, Tensor]:
        posterior, step = encode(pixel_values), trainer.global_step + 1
        return {**posterior, "mean": posterior["mean"] * (float("nan") if first <= step <= last else 1)}

    trainer.model.encode_images = encode_images  # type: ignore[method-assign]


def test_ten_such_steps_in_a_row_stop_the_run_and_nothing_is_lost(make: Any) -> None:
    trainer = make(cache_latents=False, max_train_steps=20, checkpointing_steps=4)
    poison(trainer, 6, 20)
    sentence = (
        r"loss or gradient was not finite in 10 steps in a row, the last at step 15: lower learning_rate, or check the"
        r" data; the weights are those before these steps"
    )
    with pytest.raises(NonFiniteRunError, match=sentence):
        trainer.fit(Pictures())
    reference = make("reference", cache_latents=False, max_train_steps=5)
    reference.fit(Pictures())
    assert_equal(state(trainer), state(reference))
    folder = find_checkpoint(trainer.config.output_dir, "latest")
    assert folder is not None and verify_checkpoint(folder) == 12
    assert_equal(
        read_tensors(folder / "trainable.safetensors")[0], {k: v.detach() for k, v in trainer.trainable.items()}
    )
    lines = (folder.parent / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["loss"] is None for row in rows] == [False] * 5 + [True] * 9
    assert rows[-1]["skipped_steps"] == 9


def test_skipped_steps_are_counted_over_a_resumed_run(make: Any) -> None:
    trainer = make(cache_latents=False, max_train_steps=4)
    poison(trainer, 2, 3)
    assert trainer.fit(Pictures())["skipped_steps"] == 2
    resumed = make(cache_latents=False, max_train_steps=6, resume_from_checkpoint="latest")
    poison(resumed, 5, 5)
    assert resumed.fit(Pictures())["skipped_steps"] == 3


def test_nine_such_steps_do_not_stop_the_run(make: Any) -> None:
    trainer = make(cache_latents=False, max_train_steps=12)
    poison(trainer, 2, 10)
    assert trainer.fit(Pictures())["skipped_steps"] == 9


# Runs that are interrupted

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
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(make: Any, run: str) -> None:
    straight = make("straight", **RUNS[run])
    result = straight.fit(Pictures())  # ten pictures in batches of four: three steps an epoch
    make("resumed", **RUNS[run], max_train_steps=4, checkpointing_steps=4).fit(Pictures())
    resumed = make("resumed", **RUNS[run], resume_from_checkpoint="latest")
    assert resumed.fit(Pictures())["loss"] == result["loss"]
    assert_equal(state(resumed), state(straight))
    assert losses(resumed) == losses(straight)
    assert len(set(losses(straight))) == 7


def test_a_falling_learning_rate_resumes_exactly_and_keeps_its_end(make: Any) -> None:
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    straight = make("run", **options)
    straight.fit(Pictures())
    resumed = make("run", **options, resume_from_checkpoint="checkpoint-6")
    resumed.fit(Pictures())
    assert_equal(state(resumed), state(straight))
    with pytest.raises(CheckpointError, match=r"state\.json: max_train_steps was 7, now 8; resume with the options"):
        make("run", **options, max_train_steps=8, resume_from_checkpoint="latest").fit(Pictures())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", 2e-2), ("objective", "fm"), ("rank", 3), ("train_batch_size", 3)),
        *(("mixed_precision", "bf16"), ("target_modules", ("to_k",))),
    ],
)
def test_resuming_with_another_option_is_refused_by_its_name(make: Any, name: str, value: Any) -> None:
    make(max_train_steps=1).fit(Pictures(4))
    shown = {"train_batch_size": "global_batch_size"}.get(name, name)
    trainer = make(**{name: value}, resume_from_checkpoint="latest")
    before = state(trainer)
    with pytest.raises(CheckpointError, match=rf"checkpoint-1/state\.json: {shown} was .*, now .*; resume with"):
        trainer.fit(Pictures(4))
    assert_equal(state(trainer), before)


def test_resuming_may_split_the_same_global_batch_otherwise(make: Any) -> None:
    make(max_train_steps=1).fit(Pictures())
    resumed = make(train_batch_size=2, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    assert resumed.fit(Pictures())["steps"] == 7


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_resuming_on_another_base_model_is_refused(
    make: Any, tiny_folder: Path, tmp_path: Path, adapter: str, part: str
) -> None:
    make(max_train_steps=1, adapter=adapter).fit(Pictures())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).mul_(1.01)
    resuming = config(tmp_path / "run", adapter=adapter, resume_from_checkpoint="latest", max_train_steps=2)
    trainer = AlignedTrainer.from_pretrained(pipeline, resuming)
    if (adapter, part) == ("full", "unet"):  # whose weights are the checkpoint's
        assert trainer.fit(Pictures())["steps"] == 2
    else:
        with pytest.raises(CheckpointError, match=r"state\.json: base_model was '\w{16}', now '\w{16}'; resume with"):
            trainer.fit(Pictures())


def test_resuming_on_another_network_is_refused(make: Any, tiny_folder: Path, tmp_path: Path) -> None:
    make(max_train_steps=1, adapter="full").fit(Pictures())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "block_out_channels": (16, 16)})
    resuming = config(tmp_path / "run", adapter="full", resume_from_checkpoint="latest")
    trainer = AlignedTrainer.from_pretrained(pipeline, resuming)
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors holds other parameters: it is of another model"):
        trainer.fit(Pictures())


def test_a_finished_run_resumes_to_its_end_at_once(make: Any) -> None:
    make().fit(Pictures())
    result = make(resume_from_checkpoint="latest").fit(Pictures())
    assert result["steps"] == 7 and result["loss"] is None
    with pytest.raises(CheckpointError, match="checkpoint-7 is past max_train_steps 5: raise it"):
        make(resume_from_checkpoint="latest", max_train_steps=5).fit(Pictures())


def test_a_new_run_does_not_mix_with_another_ones_checkpoints(make: Any) -> None:
    first = make(max_train_steps=3)
    first.fit(Pictures())
    first.fit(Pictures())  # its own: nothing is left to do
    log = Path(first.config.output_dir, "log.jsonl").read_bytes()
    with pytest.raises(RefusedInputError, match=r"run holds checkpoint-3 of another run: --resume"):
        make(max_train_steps=4).fit(Pictures())
    assert Path(first.config.output_dir, "log.jsonl").read_bytes() == log


def test_a_dataset_of_another_length_is_told(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(max_train_steps=1).fit(Pictures(9))
    make(max_train_steps=2, resume_from_checkpoint="latest").fit(Pictures(8))
    assert "the dataset had 9 samples, and has 8: the run goes on, in another order than it would have" in caplog.text


def test_a_log_that_holds_other_lines_is_cut_all_the_same(make: Any) -> None:
    trainer = make(max_train_steps=1)
    trainer.fit(Pictures())
    log = Path(trainer.config.output_dir, "log.jsonl")
    row = log.read_bytes()
    log.write_bytes(row + b'\xff\xfe\n{"a": 1}\n[1]\n' + row.replace(b'"step": 1', b'"step": 2'))
    make(max_train_steps=1, resume_from_checkpoint="latest").fit(Pictures())
    assert log.read_bytes() == row


def test_a_log_that_cannot_be_written_stops_no_run(
    make: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, opened = make(max_train_steps=2), Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "log.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    assert trainer.fit(Pictures())["steps"] == 2
    assert "log.jsonl: step 1 is not logged (No space left on device)" in caplog.text


def test_a_checkpoint_of_something_else_is_refused(make: Any) -> None:
    trainer = make()
    save_checkpoint(trainer.config.output_dir, 1, lambda folder: write_json(folder / "state.json", {}))
    with pytest.raises(CheckpointError, match=r"checkpoint-1/state\.json is not of a training run"):
        make(resume_from_checkpoint="latest").fit(Pictures())


def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file = tensor_file.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    straight = make("straight")
    straight.fit(Pictures())
    with monkeypatch.context() as context:
        context.setattr(tensor_file, "save_file", full)
        with pytest.raises(RefusedInputError, match=r"the disk is full, .* free; make room") as caught:
            make().fit(Pictures())
    assert "\n" not in str(caught.value)
    output = Path(make().config.output_dir)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-3"]
    resumed = make(resume_from_checkpoint="latest")
    resumed.fit(Pictures())
    assert_equal(state(resumed), state(straight))


def test_no_checkpoint_is_written_where_none_is_asked_for(make: Any, tmp_path: Path) -> None:
    make(checkpointing_steps=0, max_train_steps=2).fit(Pictures())
    assert list(tmp_path.glob("run/*checkpoint*")) == []


def test_an_interrupt_saves_restores_the_handlers_and_lets_the_trainer_go_on(make: Any, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    class Interrupting(Pictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if trainer.global_step == 2 and trainer._signal is None:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    trainer = make(checkpointing_steps=0)
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after step 3: saved"):
        trainer.fit(Interrupting())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in tmp_path.glob("run/*checkpoint*")] == ["checkpoint-3"]
    trainer.fit(Pictures())
    straight = make("straight")
    straight.fit(Pictures())
    assert_equal(state(trainer), state(straight))


# Data


def test_a_half_filled_cache_gives_the_same_bits(make: Any) -> None:
    first = make("first")
    first.fit(Pictures())
    files = sorted(Path(first.config.output_dir).glob("cache/*/*.safetensors"))
    assert len(files) > 10
    for file in files[::2]:
        file.unlink()
    second = make("second", cache_dir=str(Path(first.config.output_dir) / "cache"))
    second.fit(Pictures())
    assert_equal(state(second), state(first))


def test_the_second_run_over_the_same_pictures_encodes_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make("first", random_flip=True, cache_dir=str(Path(make().config.output_dir) / "cache"))
    first.fit(Pictures())
    second = make("second", random_flip=True, cache_dir=first.config.cache_dir)
    second._null()
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(second.model, name, lambda *arguments: pytest.fail("the cache was not used"))
    second.fit(Pictures())
    assert_equal(state(second), state(first))


def test_tensorboard_shows_what_the_log_says(make: Any, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(report_to="tensorboard", max_train_steps=3)
    trainer.fit(Pictures())
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == [1, 2, 3]
    assert [event.value for event in shown] == pytest.approx(losses(trainer), rel=1e-6)
    assert {"lr", "images_per_second"} <= set(events.Tags()["scalars"])


def test_the_last_step_is_logged_and_rates_count_every_picture(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(train_batch_size=2, gradient_accumulation_steps=2, logging_steps=3, checkpointing_steps=0)
    step, now = trainer.step, 0.0

    def slow(batch: Any) -> Tensor:
        nonlocal now
        now += 0.5
        return step(batch)

    trainer.step = slow  # type: ignore[method-assign]
    monkeypatch.setattr("d2f_fast.training.trainer.time", SimpleNamespace(monotonic=lambda: now))
    assert trainer.fit(Pictures())["seconds"] == 3.5
    rows = [json.loads(line) for line in (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()]
    # Ten pictures are batches of 4, 4 and 2.
    assert [(row["step"], row["images_per_second"]) for row in rows] == [(3, 10 / 1.5), (6, 10 / 1.5), (7, 4 / 0.5)]


def test_an_image_folder_trains_as_the_same_pictures_in_memory(make: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        Pictures()[index]["image"].save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("abcde"[index])

    class InMemory(Pictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index) | {"text": "abcde"[index]}

    options = {"random_flip": True, "train_batch_size": 5}  # each picture in each epoch, one way or the other
    from_folder, in_memory = make("folder", **options), make("memory", **options)
    uncached = make("uncached", cache_latents=False, **options)
    from_folder.fit(CaptionedImages(tmp_path / "pictures"))
    in_memory.fit(InMemory(5))
    uncached.fit(InMemory(5))
    assert_equal(state(from_folder), state(in_memory))
    assert_equal(state(uncached), state(in_memory))


def test_a_cache_that_cannot_be_written_is_no_bad_sample(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(hashes: Any, path: Path) -> str:
        raise RefusedInputError("cannot write the cache")

    monkeypatch.setattr(cache.FileHashes, "__call__", full)
    (tmp_path / "pictures").mkdir()
    Pictures()[0]["image"].save(tmp_path / "pictures" / "0.png")
    (tmp_path / "pictures" / "0.txt").write_text("a")
    with pytest.raises(RefusedInputError, match=r"^cannot write the cache$") as caught:
        make().fit(CaptionedImages(tmp_path / "pictures"))
    assert not isinstance(caught.value, DatasetError)


class Watched(Pictures):
    """Pictures that note the threads that read them; some cannot be read."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__()
        self.threads, self.broken = set[int](), broken

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.threads.add(threading.get_ident())
        return {**super().__getitem__(index), **({"image": None} if index == self.broken else {})}


@pytest.mark.parametrize("cache_latents", [True, False])
def test_threads_read_ahead_and_change_no_bit(make: Any, cache_latents: bool) -> None:
    states = []
    for workers in (0, 1, 3):
        pictures = Watched()
        trainer = make(f"{workers}", cache_latents=cache_latents, dataloader_num_workers=workers)
        trainer.fit(pictures)
        states.append(state(trainer))
        assert (threading.get_ident() in pictures.threads) == (workers == 0)
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_used_stops_the_run_where_it_is_saved(make: Any, workers: int) -> None:
    options = {"checkpointing_steps": 0, "dataloader_num_workers": workers}
    epoch, trainer = (
        [index for step in range(2) for index in batch_indices(len(Pictures()), 4, 0, step)[1]],
        make(**options),
    )
    sentence = f'sample {epoch[-1]}: "image" must be a PIL image, got NoneType; step 1 is saved'
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        trainer.fit(Watched(epoch[-1]))
    found = find_checkpoint(trainer.config.output_dir, "latest")
    assert found is not None and verify_checkpoint(found) == 1
    first = make("first")
    with pytest.raises(DatasetError, match=r"got NoneType$"):
        first.fit(Watched(epoch[0]))
    assert find_checkpoint(first.config.output_dir, "latest") is None


@pytest.mark.parametrize("cache_latents", [True, False])
@pytest.mark.parametrize(("change", "sentence"), [
    ({"text": ""}, r'sample \d: "text"'),
    ({"text": None}, r'sample \d: "text"'),
    ({"image": "a.png"}, r'sample \d: "image" must be a PIL image, got str'),
])  # fmt: skip
def test_a_sample_that_cannot_be_used_is_refused(
    make: Any, cache_latents: bool, change: dict[str, Any], sentence: str
) -> None:
    class Damaged(Pictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index) | change

    with pytest.raises(DatasetError, match=sentence):
        make(cache_latents=cache_latents).fit(Damaged())


# What is refused


def small_pipeline(tiny_folder: Path, **unet: Any) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    if unet:
        pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **unet})
    return pipeline


@pytest.mark.parametrize(("unet", "sentence"), [
    ({"in_channels": 9}, "the UNet takes 9 channels and the autoencoder makes 4: text-to-image only"),
    ({"num_class_embeds": 3}, "the UNet has num_class_embeds 3: it takes an input that no text-to-image"),
    ({"time_cond_proj_dim": 8}, "the UNet has time_cond_proj_dim 8"),
])  # fmt: skip
def test_a_network_of_another_kind_is_refused(
    tiny_folder: Path, tmp_path: Path, unet: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        AlignedTrainer.from_pretrained(small_pipeline(tiny_folder, **unet), config(tmp_path))


def test_a_half_base_trains_in_bfloat16_and_not_in_float16(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = small_pipeline(tiny_folder)
    with pytest.raises(ModelError, match="the UNet is float16, whose gradients overflow: load it in bf"):
        AlignedTrainer.from_pretrained(pipeline.to(torch.float16), config(tmp_path))
    for number, (adapter, precision) in enumerate((("lora", "no"), ("lora", "bf16"), ("full", "no"))):
        half = small_pipeline(tiny_folder).to(torch.bfloat16)
        options = {"adapter": adapter, "mixed_precision": precision, "max_train_steps": 2}
        trainer = AlignedTrainer.from_pretrained(half, config(tmp_path / str(number), **options))
        assert np.isfinite(trainer.fit(Pictures())["loss"])
        assert len(trainer.sample(["ab", "c"], 2, guidance_scale=2.0)) == 2


def test_text_of_another_type_is_cast_to_that_of_the_network(make: Any) -> None:
    given = batch()
    text = given["encoder_hidden_states"].half()
    first = make("first").step({**given, "encoder_hidden_states": text})
    assert torch.equal(first, make("second").step({**given, "encoder_hidden_states": text.float()}))


@pytest.mark.parametrize(("change", "sentence"), [
    ({"latents": None}, "latents must be a tensor, got NoneType"),
    ({"latents": torch.zeros(4, 4, 8, 8, dtype=torch.uint8)}, r"latents must be floating, .* got \[4, 4, 8, 8\] torch"),
    ({"latents": torch.zeros(4, 8, 8)}, r"latents must be floating, \[samples, .*\], got \[4, 8, 8\]"),
    ({"encoder_hidden_states": torch.zeros(5, 8, 16)}, "encoder_hidden_states has 5 samples and latents 4: they"),
    ({"mask": torch.ones(3, 1, 8, 8)}, "mask has 3 samples and latents 4"),
    ({"mask": torch.ones(8, 8)}, r"mask must be floating, .* got \[8, 8\] torch.float32"),
])  # fmt: skip
def test_a_batch_that_is_none_is_refused(make: Any, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        make().step({**batch(), **change})


@pytest.mark.parametrize(("keys", "sentence"), [
    ([], "a batch needs latents or pixel_values, got nothing"),
    (["latents"], "a batch needs encoder_hidden_states or input_ids, got latents"),
])  # fmt: skip
def test_a_batch_without_its_keys_is_refused(make: Any, keys: list[str], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        make().step({name: batch()[name] for name in keys})


def test_processes_that_would_train_alone_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RefusedInputError, match="2 processes were started, and accelerate sees 1: on a CPU"):
        make()


# Sampling and saving


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AlignedTrainer:
    options = {"conv_rank": 2, "first_last_layers": True, "lora_alpha": 3.0, "ema_decay": 0.9, "flow_shift": 2.0}
    torch.manual_seed(0)
    trainer = AlignedTrainer.from_pretrained(tiny_folder, config(tmp_path_factory.mktemp("trained"), **options))
    trainer.fit(Pictures())
    return trainer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_sample_is_that_of_the_stock_pipeline_with_the_saved_lora(
    trained: AlignedTrainer,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance_scale: float,
    method: Any,
) -> None:
    latents: list[Tensor] = []
    decode = trained.model.decode

    def noting(given: Tensor) -> Tensor:
        latents.append(given)
        return decode(given)

    monkeypatch.setattr(trained.model, "decode", noting)
    trained.sample(["ab", "c"], 4, guidance_scale, "d", generator=seeded(), method=method)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config, shift=2.0, method=method)
    pipeline.load_lora_weights(trained.save_lora(tmp_path).parent)
    expected = pipeline(
        ["ab", "c"],
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt=["d", "d"],
        height=16,
        width=16,
        generator=seeded(),
        output_type="latent",
    ).images
    assert expected.std() > 0.1
    torch.testing.assert_close(latents[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sampling_is_deterministic_uses_the_average_and_leaves_training_alone(trained: AlignedTrainer) -> None:
    before = state(trained)
    first, second = (trained.sample("ab", generator=seeded()) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert_equal(state(trained), before)
    assert trained.unet.training
    ema, trained.ema = trained.ema, None
    try:
        assert trained.sample("ab", generator=seeded())[0].tobytes() != first[0].tobytes()
    finally:
        trained.ema = ema


def test_pictures_have_the_size_asked_for(trained: AlignedTrainer) -> None:
    pictures = trained.sample(["a", "b", "c"], num_inference_steps=1, height=24, width=32)
    assert [(picture.size, picture.mode) for picture in pictures] == [((32, 24), "RGB")] * 3
    assert trained.sample("a", num_inference_steps=1)[0].size == (16, 16)
    with pytest.raises(RefusedInputError, match="height and width must be multiples of 2, got 17 and 16"):
        trained.sample("a", height=17)


@pytest.mark.parametrize(("objective", "scheduler", "shift", "sigmas"), [
    ("diff2flow", {}, 1.0, "17.61, 3, 1, 0.3333, 0"),
    ("diff2flow", {}, 2.0, "20.61, 6, 2, 0.6667, 0"),
    ("diff2flow", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 1.5, "4096, 4.5, 1.5, 0.5, 0"),
    ("fm", {}, 1.0, "1, 0.75, 0.5, 0.25, 0"),
    ("fm", {}, 2.0, "1, 0.8571, 0.6667, 0.4, 0"),  # 2 s / (1 + s)
])  # fmt: skip
def test_the_lora_file_says_how_to_sample_it(
    tiny_folder: Path, tmp_path: Path, objective: str, scheduler: dict[str, Any], shift: float, sigmas: str
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    weighting = "flow" if objective == "fm" else "native"
    options = config(tmp_path, objective=objective, flow_shift=shift, loss_weighting=weighting)
    _, header = read_tensors(AlignedTrainer.from_pretrained(pipeline, options).save_lora(tmp_path / "lora"))
    assert {name: value for name, value in header.items() if name.startswith("d2f.")} == {
        "d2f.objective": objective,
        "d2f.prediction_type": "flow_prediction" if objective == "fm" else scheduler.get("prediction_type", "epsilon"),
        "d2f.zero_snr": "true" if scheduler else "false",
        "d2f.loss_weighting": weighting,
        "d2f.shift": str(shift),
        "d2f.recommended_sigmas": sigmas,
    }


def test_sdxl_trains_samples_and_saves_what_its_stock_pipeline_loads(tiny_xl: Any, tmp_path: Path) -> None:
    """Both text encoders, the pooled text and the sizes reach the network, in training and in sampling."""
    tiny_xl.save_pretrained(tmp_path / "base")
    trainer = AlignedTrainer.from_pretrained(
        tmp_path / "base", config(tmp_path / "run", max_train_steps=5, learning_rate=0.3, ema_decay=0.0)
    )
    trainer.fit(Pictures())
    trainer.save_lora(tmp_path / "lora")

    def ours(negative: str) -> Any:
        noise = torch.Generator().manual_seed(3)
        return trainer.sample(["ab", "c"], 2, guidance_scale=3.0, negative_prompt=negative, generator=noise)

    pictures = ours("d")

    def stock(pipe: Any, negative: list[str] | None = ["d", "d"]) -> Any:  # noqa: B006
        pipe.set_progress_bar_config(disable=True)
        options = {"height": 16, "width": 16, "negative_prompt": negative, "guidance_scale": 3.0}
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return pipe(["ab", "c"], num_inference_steps=2, latents=latents, **options).images

    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base", add_watermarker=False)
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    untrained = stock(pipe)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    difference = np.abs(np.asarray([stock(pipe), untrained], dtype=np.float64) - np.asarray(pictures, dtype=np.float64))
    assert difference[0].max() <= 1 and difference[1].max() >= 8
    # No negative prompt is zeros, in training too.
    assert np.abs(np.asarray(stock(pipe, None), dtype=np.float64) - np.asarray(ours(""), dtype=np.float64)).max() <= 1
    assert all(value.count_nonzero() == 0 for value in trainer._null().values())
    trainer.save_pipeline(tmp_path / "saved")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    saved.scheduler = Diff2FlowScheduler.from_config(saved.scheduler.config)
    assert np.abs(np.asarray(stock(saved), dtype=np.float64) - np.asarray(pictures, dtype=np.float64)).max() <= 1


def test_full_finetuning_has_no_lora_to_save(make: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedInputError, match="adapter is full: there is no LoRA to save; use save_pipeline"):
        make(adapter="full").save_lora(tmp_path)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_saved_pipeline_holds_the_averaged_network(make: Any, tmp_path: Path, adapter: str) -> None:
    trainer = make(adapter=adapter, max_train_steps=3)
    trainer.fit(Pictures())
    saved = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "saved"), safety_checker=None)
    sample, text = batch()["latents"], batch()["encoder_hidden_states"]
    with trainer.averaged(), torch.no_grad():
        expected = trainer.unet(sample, 673, text).sample
    with torch.no_grad():
        torch.testing.assert_close(saved.unet(sample, 673, text).sample, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RefusedInputError, match="saved exists: name a new folder, or remove it"):
        trainer.save_pipeline(tmp_path / "saved")


@pytest.mark.parametrize("objective", ["diff2flow", "fm"])
def test_a_saved_pipeline_draws_what_the_trainer_draws(make: Any, tmp_path: Path, objective: str) -> None:
    shift = 2.0 if objective == "fm" else 1.0
    trainer = make(objective=objective, flow_shift=shift, max_train_steps=5, learning_rate=0.3)
    trainer.fit(Pictures())
    noise = torch.Generator().manual_seed(3)
    expected = np.asarray(trainer.sample(["ab", "c"], 4, guidance_scale=3.0, generator=noise), dtype=np.float64)

    def draw(pipe: Any, **options: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        options |= {"guidance_scale": 3.0, "latents": latents}
        return np.asarray(pipe(["ab", "c"], height=16, width=16, **options).images, dtype=np.float64)

    saved = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "saved"), safety_checker=None)
    # Stock schedulers start 0.001 from pure noise, and round fm's timesteps to whole ones.
    choice = {"num_inference_steps": 4} if objective == "fm" else {"sigmas": trainer.alignment.sigmas(4)}
    assert np.abs(draw(saved, **choice) - expected).mean() <= 1
    saved.scheduler = Diff2FlowScheduler.from_config(saved.scheduler.config)
    assert np.abs(draw(saved, num_inference_steps=4) - expected).max() <= 1
    assert load_pipeline(tmp_path / "saved").unet is not None


# Processes that are killed

STEPS = 20


def kill_options(**options: Any) -> dict[str, Any]:
    return {"max_train_steps": STEPS, "checkpointing_steps": 2, "random_flip": True, "train_batch_size": 2, **options}


def start(model: Path, output: Path, **options: Any) -> int:
    """Fork a process that trains, ending with the exit code that the command line would give."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            trainer = AlignedTrainer.from_pretrained(model, config(output, **kill_options(**options)))
            trainer.fit(Pictures(pause=0.01))
            code = 0
        except InterruptedRunError as stop:
            print(stop, file=sys.stderr)
            code = stop.exit_code
        finally:
            os._exit(code)
    return pid


def wait_for_steps(output: Path, rows: int) -> int:
    """Wait until the log has so many rows, and return how many it has."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = (output / "log.jsonl").read_text().count("\n") if (output / "log.jsonl").exists() else 0
        if found >= rows:
            return found
        time.sleep(0.005)
    raise TimeoutError(f"{output} did not come to {rows} rows")


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final(output: Path) -> dict[str, Tensor]:
    """Everything in the last checkpoint."""
    verify_checkpoint(output / f"checkpoint-{STEPS}")
    names = ("trainable", "ema", "optimizer")
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in read_tensors(output / f"checkpoint-{STEPS}" / f"{name}.safetensors")[0].items()
    }


def kill_runs(model: Path, root: Path) -> dict[str, Any]:
    """Stop one run by SIGTERM and kill another at five random moments; resume both to their ends."""
    assert finish(start(model, root / "straight")) == 0
    expected = final(root / "straight")

    stopped = root / "stopped"
    pid = start(model, stopped, checkpointing_steps=0)
    rows = wait_for_steps(stopped, 4)
    os.kill(pid, signal.SIGTERM)
    code = finish(pid)
    folder = find_checkpoint(stopped, "latest")
    assert folder is not None
    saved = verify_checkpoint(folder)
    assert finish(start(model, stopped, resume_from_checkpoint="latest")) == 0
    assert_equal(final(stopped), expected)

    killed, moments, starts = root / "killed", random.Random(0), []
    for _ in range(5):
        before = wait_for_steps(killed, 0)
        found = find_checkpoint(killed, "latest")
        starts.append(0 if found is None else verify_checkpoint(found))
        pid = start(model, killed, resume_from_checkpoint="latest")
        wait_for_steps(killed, before + moments.randint(1, 3))
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == -signal.SIGKILL
        for path in killed.glob("checkpoint*"):
            verify_checkpoint(path)
    assert finish(start(model, killed, resume_from_checkpoint="latest")) == 0
    assert_equal(final(killed), expected)
    logged = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1))
    return {"code": code, "rows": rows, "saved": saved, "starts": starts}


def run_script(action: str, *arguments: Path, **variables: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, __file__, action, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: "subprocess.Popen[str]") -> Any:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def test_runs_stopped_and_killed_end_bit_equal_to_the_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    report = result(run_script("kill_runs", tiny_folder, tmp_path))
    assert report["code"] == 143
    assert report["rows"] <= report["saved"] <= report["rows"] + 2  # the step in progress, and one not yet logged
    assert report["starts"] == sorted(report["starts"]) and report["starts"][0] == 0 < report["starts"][-1]


def train_as_process(model: Path, root: Path) -> dict[str, Any]:
    """Train as one of the processes that the environment tells of."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {"train_batch_size": 4 // world, "max_grad_norm": 0.1}
    trainer = AlignedTrainer.from_pretrained(model, config(root / f"world{world}", **options))
    trainer.fit(Pictures(9))  # the last batch of an epoch has one picture: none for the second process
    torch.save({k: v.detach() for k, v in trainer.trainable.items()}, root / f"{world}-{os.environ.get('RANK', 0)}.pt")
    return {"processes": trainer.accelerator.num_processes}


def stop_as_process(model: Path, root: Path) -> dict[str, Any]:
    """Train as one of two processes, of which the second alone gets SIGTERM, in its third step."""
    trainer = AlignedTrainer.from_pretrained(
        model, config(root, train_batch_size=1, logging_steps=2, max_train_steps=9)
    )
    step = trainer.step

    def stopped(batch: Any) -> Tensor:
        if trainer.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.step = stopped  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM after step 4: saved"):
        trainer.fit(Pictures(9))
    return {"step": trainer.global_step}


def results_of_two(script: str, *arguments: Path) -> list[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    processes = [run_script(script, *arguments, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    return [result(process) for process in processes]


@pytest.mark.slow
def test_two_processes_stop_together(tiny_folder: Path, tmp_path: Path) -> None:
    assert results_of_two("stop_as_process", tiny_folder, tmp_path) == [{"step": 4}, {"step": 4}]
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None and verify_checkpoint(found) == 4


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    assert [each["processes"] for each in results_of_two("train_as_process", tiny_folder, tmp_path)] == [2, 2]
    assert result(run_script("train_as_process", tiny_folder, tmp_path))["processes"] == 1
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert_equal(first, second)
    assert distance(first, one) <= 1e-4
    logs = []
    for world in (1, 2):
        assert (tmp_path / f"world{world}" / "checkpoint-7").is_dir()
        rows = (tmp_path / f"world{world}" / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(row)["loss"] for row in rows])
    assert len(logs[0]) == 7 and logs[1] == pytest.approx(logs[0], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](*map(Path, sys.argv[2:]))))
