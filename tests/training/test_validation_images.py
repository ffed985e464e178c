"""Images of validation prompts: what is generated and when, where it goes, and training that it leaves as it is."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.training.validation_images import log_validation_images, thumbnail, write_validation_images

PROMPTS = ("a", "b c")


def test_images_are_those_of_the_averaged_weights_and_training_is_the_same(
    images: Any, make_trainer: Any, state_of: Any, assert_equal: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_train_steps": 3, "learning_rate": 0.01, "ema_decay": 0.5}
    plain = make_trainer("plain", **options)
    plain.fit(images())
    watched = make_trainer("watched", validation_steps=2, validation_prompts=PROMPTS, **options)
    watched.fit(images())
    assert_equal(state_of(watched), state_of(plain))
    folder = Path(watched.config.output_dir) / "validation"
    names = [f"step-{step:06d}_{i}.png" for step in (0, 2, 3) for i in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == names
    generator = torch.Generator().manual_seed(watched.config.seed)
    expected = watched.sample(PROMPTS, 4, 3.0, generator=generator)
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / f"step-000003_{i}.png")), np.asarray(image))
    assert (folder / "step-000003_0.png").read_bytes() != (folder / "step-000000_0.png").read_bytes()
    # The LoRA files show the first of them; a run that is resumed at its end shows the same.
    watched.save_lora(tmp_path / "lora")
    resumed = make_trainer(
        "watched", validation_steps=2, validation_prompts=PROMPTS, resume_from_checkpoint="latest", **options
    )
    resumed.fit(images())
    resumed.save_lora(tmp_path / "again")
    assert (tmp_path / "again" / LORA_FILE).read_bytes() == (tmp_path / "lora" / LORA_FILE).read_bytes()
    with safe_open(tmp_path / "lora" / LORA_FILE, "pt") as file:
        assert file.metadata()["modelspec.thumbnail"] == thumbnail(expected[0])


def test_prompts_without_steps_are_refused() -> None:
    with pytest.raises(RefusedInputError, match="validation_prompts needs validation_steps"):
        TrainingConfig(validation_prompts=PROMPTS)


def test_thumbnail_is_a_small_jpeg_of_the_whole_image() -> None:
    image = Image.linear_gradient("L").resize((600, 300)).convert("RGB")
    head, _, data = thumbnail(image).partition(",")
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and (small.format, small.size) == ("JPEG", (256, 128))
    difference = np.asarray(small, np.int16) - np.asarray(image.resize((256, 128)), np.int16)
    assert np.abs(difference).max() <= 12 and image.size == (600, 300)


def test_images_are_sent_to_trackers_in_their_form(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "red")
    sent: list[Any] = []
    trackers = [
        SimpleNamespace(name=name, log_images=lambda values, **options: sent.append((values, options)))
        for name in ("tensorboard", "wandb", "comet_ml")
    ]
    log_validation_images(SimpleNamespace(trackers=trackers), [image, image], 7)  # type: ignore[arg-type]
    (board, options), (bias, _) = sent
    assert board["validation"].shape == (2, 2, 4, 3) and options == {"step": 7, "dataformats": "NHWC"}
    assert bias == {"validation": [image, image]}
    write_validation_images([image], str(tmp_path), 7)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-000007_0.png"]
