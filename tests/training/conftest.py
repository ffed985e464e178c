"""Fixtures of the tests of training: a tiny trainer, its batches and images, and comparisons of what a step changes."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.models.load import load_pipeline
from d2f_fast.training.inputs import StepInputs
from d2f_fast.training.optimizer_state import optimizer_tensors
from d2f_fast.training.trainer import AlignedTrainer

Item = dict[str, Any]


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainingConfig]:
    """Return a function that makes the options of a short run of the tiny model."""

    def make(output_dir: Path, **options: Any) -> TrainingConfig:
        defaults = {
            "resolution": 16,
            "rank": 2,
            "target_modules": ("to_q", "to_out.0", "ff.net.2"),
            "max_train_steps": 7,
            "logging_steps": 1,
            "checkpointing_steps": 3,
            "learning_rate": 1e-2,
        }
        if options.get("adapter") == "full":  # These are options of the LoRA.
            del defaults["rank"], defaults["target_modules"]
        return TrainingConfig(output_dir=str(output_dir), **{**defaults, **options})

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with both LoRA files, which are empty."""
    made = tmp_path / "owls"
    made.mkdir()
    for name in ("pytorch_lora_weights.safetensors", "owls_kohya.safetensors"):
        (made / name).touch()
    return made


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> Callable[[], StableDiffusionPipeline]:
    """Return a function that gives the tiny pipeline with a UNet of its own; loading it from disk takes longer."""
    loaded = load_pipeline(tiny_folder)

    def copied() -> StableDiffusionPipeline:
        parts = {**loaded.components, "unet": copy.deepcopy(loaded.unet)}
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)

    return copied


@pytest.fixture
def make_trainer(
    tiny_pipeline: Callable[[], StableDiffusionPipeline], make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> Callable[..., AlignedTrainer]:
    """Return a function that makes a trainer of the tiny model, or of a copy of `pipeline`.

    Its first argument names the output folder.
    """

    def make(output: str = "run", pipeline: StableDiffusionPipeline | None = None, **options: Any) -> AlignedTrainer:
        used = copy.deepcopy(pipeline) if pipeline else tiny_pipeline()
        return AlignedTrainer.from_pretrained(used, make_config(tmp_path / output, **options))

    return make


@pytest.fixture
def make_one_level_trainer(
    make_trainer: Callable[..., AlignedTrainer], tiny_pipeline: Callable[[], StableDiffusionPipeline]
) -> Callable[..., AlignedTrainer]:
    """Return `make_trainer` of the tiny model with one level in its UNet, which compiles in much less time.

    Its way down has the attention, so that each kind of layer is there once or twice.
    """
    pipeline = tiny_pipeline()
    one_level = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level)
    return partial(make_trainer, pipeline=pipeline)


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile to the traced operators only: Inductor would take a minute, and this takes seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda loss, fullgraph, options=None: compile(loss, fullgraph=fullgraph, backend="aot_eager")
    )


@pytest.fixture(scope="session")
def images() -> Callable[..., Any]:
    """Return a class of datasets with captioned images of noise.

    `length` is the number of images, `pause` the seconds that reading one takes, and `change(index, item)` returns the
    item in place of the one that it is given.
    """

    class Images:
        def __init__(
            self, length: int = 10, pause: float = 0.0, change: Callable[[int, Item], Item] = lambda index, item: item
        ) -> None:
            self.length, self.pause, self.change = length, pause, change

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> Item:
            time.sleep(self.pause)
            pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            return self.change(index, {"image": Image.fromarray(pixels), "text": ["abc"[index % 3] * 2, "d e"]})

    return Images


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Any]]:
    """Return a function that makes a batch of random latents and texts."""

    def make(size: int = 4, seed: int = 0, **changes: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 + seed)
        tensors = {
            "latents": torch.randn(size, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(size, 8, 16, generator=generator),
        }
        return {**tensors, **changes}

    return make


@pytest.fixture(scope="session")
def next_inputs() -> Callable[[AlignedTrainer, dict[str, Any]], StepInputs]:
    """Return a function that gives the inputs of a trainer's next step, before it is taken."""
    return lambda trainer, batch: trainer._inputs.sample(batch, trainer.global_step)


@pytest.fixture(scope="session")
def state_of() -> Callable[[AlignedTrainer], dict[str, Tensor]]:
    """Return a function that copies everything that a step may change: weights, average, optimizer, counters."""

    def state(trainer: AlignedTrainer) -> dict[str, Tensor]:
        tensors = {f"trainable.{name}": parameter.detach() for name, parameter in trainer.trainable.items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.state_dict().items()} if trainer.ema else {}
        optimizer = optimizer_tensors(trainer.optimizer, trainer.trainable)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    return state


@pytest.fixture(scope="session")
def weights_of() -> Callable[[AlignedTrainer], dict[str, Tensor]]:
    """Return a function that copies the trained parameters."""
    return lambda trainer: {name: parameter.detach().clone() for name, parameter in trainer.trainable.items()}


@pytest.fixture(scope="session")
def gradients_of() -> Callable[[AlignedTrainer], dict[str, Tensor]]:
    """Return a function that copies the gradients of the last step."""
    return lambda trainer: {
        name: parameter.grad.clone() for name, parameter in trainer.trainable.items() if parameter.grad is not None
    }


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """Return a function that asserts that two sets of tensors are equal bit for bit."""

    def check(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        assert first.keys() == second.keys() and first
        assert [name for name in first if not torch.equal(first[name], second[name])] == []

    return check


@pytest.fixture(scope="session")
def distance() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]:
    """Return a function that gives the relative distance of two sets of tensors."""

    def relative(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
        assert first.keys() == second.keys() and first
        one, other = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
        return ((one - other).norm() / other.norm()).item()

    return relative


@pytest.fixture(scope="session")
def logged_losses() -> Callable[[AlignedTrainer], list[float]]:
    """Return a function that reads the loss of each step from the log of a run."""

    def losses(trainer: AlignedTrainer) -> list[float]:
        lines = (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()
        return [row["loss"] for row in sorted(map(json.loads, lines), key=lambda row: row["step"])]

    return losses


@pytest.fixture(scope="session")
def make_non_finite() -> Callable[[AlignedTrainer, int, int], None]:
    """Return a function that lets a trainer's autoencoder give NaN in the steps from `first` to `last`."""

    def make(trainer: AlignedTrainer, first: int, last: int) -> None:
        encode = trainer.model.encode_images

        def encode_images(pixel_values: Tensor) -> dict[str, Tensor]:
            posterior, step = encode(pixel_values), trainer.global_step + 1
            return {**posterior, "mean": posterior["mean"] * (float("nan") if first <= step <= last else 1)}

        trainer.model.encode_images = encode_images  # type: ignore[method-assign]

    return make
