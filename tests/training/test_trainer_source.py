"""Training from source to target images: the interpolant and the velocity, the start at noise, and continuation."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.order import plan_batches
from d2f_fast.data.source_encoding import SourceTargetEncoder
from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder
from d2f_fast.data.source_options import SourceOptions
from d2f_fast.errors import CheckpointError, RefusedInputError
from d2f_fast.models.base_model import to_pil
from d2f_fast.models.source_start import start_of_flow
from d2f_fast.training.inputs import step_seed
from d2f_fast.training.trainer import AlignedTrainer

MakeTrainer = Callable[..., AlignedTrainer]


def dataset_of(folder: Path, source_noise: float = 0.0) -> SourceTargetDataset:
    return SourceTargetDataset(SourceTargetFolder(folder), SourceOptions(source_noise))


def first_batch(trainer: AlignedTrainer, dataset: SourceTargetDataset) -> Any:
    encoder = SourceTargetEncoder(trainer.model, trainer.config, dataset)
    plan = next(islice(plan_batches(len(dataset), 4, 0), 1))
    return encoder.encode(plan, encoder.load(plan))


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "fm", "fm_form": "published"}, {"objective": "fm", "fm_form": "diffusers"}],
    ids=["diff2flow", "published", "diffusers"],
)
def test_loss_is_that_of_the_line_from_the_noised_source_to_the_target(
    make_trainer: MakeTrainer, source_targets: Path, options: dict[str, Any]
) -> None:
    trainer = make_trainer(caption_dropout=0.0, **options)
    batch = first_batch(trainer, dataset_of(source_targets, 0.25))
    generator = torch.Generator().manual_seed(step_seed(0, 0))
    posterior_noise, noise = (torch.randn(4, 4, 8, 8, generator=generator).double() for _ in range(2))
    inputs = trainer._inputs.sample(batch, 0)
    time = inputs.t.double()[:, None, None, None]
    source = 0.75 * batch["source"].double() + 0.25 * noise
    scale = trainer.model.vae.config.scaling_factor
    target = (batch["mean"].double() + batch["std"].double() * posterior_noise) * scale
    x_t, flow = time * target + (1 - time) * source, trainer.objective.flow
    with torch.no_grad():
        sample = flow.to_sample(x_t.float(), inputs.t)
        output = trainer.unet(sample, flow.timestep(inputs.t), batch["encoder_hidden_states"]).sample
        velocity = flow.velocity(output, sample, inputs.t)
    expected = (velocity - (target - source)).square().mean()
    assert trainer.step(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_start_at_noise_alone_is_ordinary_training_bit_for_bit(
    make_trainer: MakeTrainer, source_targets: Path, tmp_path: Path, assert_equal: Any, weights_of: Any
) -> None:
    ordinary, from_noise = (make_trainer(name, max_train_steps=2) for name in ("ordinary", "noise"))
    for path in sorted((source_targets / "target").glob("*.png")):
        (tmp_path / "target").mkdir(exist_ok=True)
        (tmp_path / "target" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "target" / path.name).with_suffix(".txt").write_text("a")
    (tmp_path / "source").symlink_to(source_targets / "source")
    from_noise.fit(dataset_of(tmp_path, 1.0))
    ordinary.fit(CaptionedImages(tmp_path / "target"))
    assert_equal(weights_of(ordinary), weights_of(from_noise))


def test_slice_of_a_process_starts_as_in_the_whole_batch(make_trainer: MakeTrainer, source_targets: Path) -> None:
    trainer = make_trainer()
    batch = first_batch(trainer, dataset_of(source_targets, 0.5))
    whole = trainer._inputs.sample(batch, 3)
    part = {name: value[1:3] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    sliced = trainer._inputs.sample(part | {"offset": 1, "global_batch_size": 4}, 3)  # type: ignore[arg-type]
    assert torch.equal(sliced.noise, whole.noise[1:3]) and torch.equal(sliced.latents, whole.latents[1:3])
    fixed = trainer._inputs.fixed(batch, [7, 8, 9, 10])
    again = trainer._inputs.fixed({**part, "source_noise": 1.0}, [8, 9])  # type: ignore[typeddict-item]
    expected = 0.5 * batch["source"][1:3] + 0.5 * again.noise
    torch.testing.assert_close(fixed.noise[1:3], expected, rtol=0, atol=1e-6)


def test_continued_run_is_equal_bit_for_bit_and_keeps_its_share_of_noise(
    make_trainer: MakeTrainer, source_targets: Path, assert_equal: Any, weights_of: Any
) -> None:
    options = {"random_flip": True, "validation_steps": 2}
    whole = make_trainer("whole", max_train_steps=2, **options)
    result = whole.fit(dataset_of(source_targets, 0.5), dataset_of(source_targets, 0.5))
    assert len(result["validation_losses"]) == 8
    make_trainer("more", max_train_steps=1, random_flip=True).fit(dataset_of(source_targets, 0.5))
    again = make_trainer("more", max_train_steps=2, random_flip=True, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"source_noise was 0\.5 and is now 0\.25: resume with the options"):
        again.fit(dataset_of(source_targets, 0.25))
    again.fit(dataset_of(source_targets, 0.5))
    assert_equal(weights_of(whole), weights_of(again))


def test_objective_that_starts_from_noise_is_refused(make_trainer: MakeTrainer, source_targets: Path) -> None:
    with pytest.raises(RefusedInputError, match="objective diffusion always starts from noise"):
        make_trainer(objective="diffusion").fit(dataset_of(source_targets))
    trainer = make_trainer("prompts", validation_prompts=("a",), validation_steps=1)
    with pytest.raises(RefusedInputError, match="validation_prompts does not go with --task image_to_image"):
        trainer.fit(dataset_of(source_targets))


def test_result_says_whether_it_was_trained_with_captions(
    make_trainer: MakeTrainer, source_targets: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source_targets, tmp_path / "pairs"))
    trainer = make_trainer()
    assert trainer._tags(dataset_of(folder))["d2f.captions"] == "false"
    for path in sorted((folder / "target").glob("*.png")):
        path.with_suffix(".txt").write_text("a")
    assert trainer._tags(dataset_of(folder))["d2f.captions"] == "true"


def test_validation_starts_as_the_training(make_trainer: MakeTrainer, source_targets: Path) -> None:
    trainer = make_trainer(validation_steps=1)
    images, pairs = [{"image": Image.new("RGB", (16, 16)), "text": "a"}], dataset_of(source_targets)
    for dataset, held_out, sentence in (
        (pairs, images, "starts from source images with source_noise 0, and that of the validation from noise: give"),
        (images, pairs, "starts from noise, and that of the validation from source images with source_noise 0: give"),
        (pairs, dataset_of(source_targets, 0.5), "of the validation from source images with source_noise 0.5: give"),
    ):
        with pytest.raises(RefusedInputError, match=sentence):
            trainer.fit(dataset, held_out)


def test_trained_model_is_sampled_from_an_image_alone_and_saved_for_diffusers(
    make_trainer: MakeTrainer, source_targets: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(max_train_steps=1)
    trainer.fit(dataset_of(source_targets))
    with pytest.raises(RefusedInputError, match="was trained to start from an image: give noise=start_of_flow"):
        trainer.sample("a")
    with pytest.raises(RefusedInputError, match="method euler_maruyama needs a flow that starts from noise"):
        trainer.sample("a", method="euler_maruyama", noise=torch.zeros(1, 4, 8, 8))
    trainer.save_lora(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_full_finetuning_is_saved_with_its_task_and_sampled_from_the_source(
    make_trainer: MakeTrainer, source_targets: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(adapter="full", max_train_steps=1)
    trainer.fit(dataset_of(source_targets, 0.25))
    folder = trainer.save_pipeline(tmp_path / "pipeline")
    assert json.loads((tmp_path / "run/config.json").read_text())["source_noise"] == 0.25
    tags = json.loads((folder / "d2f.json").read_text())
    assert (tags["d2f.task"], tags["d2f.source_noise"]) == ("image_to_image", "0.25")
    assert (tags["d2f.recommended_steps"], tags["d2f.recommended_guidance"]) == ("4", "1.0")
    with Image.open(source_targets / "source/0.jpg") as image:
        start = start_of_flow(trainer.model, [image.convert("RGB")], 16, 16)
    got = np.asarray(trainer.sample("a", 2, noise=start)[0]).astype(int)
    flow, model, x = trainer.alignment, trainer.model, start
    with torch.no_grad(), trainer.averaged():
        text = model.encode_prompts(["a"])["encoder_hidden_states"]
        for t in (0.0, 0.5):
            now = torch.tensor([t])
            sample = flow.to_sample(x, now)
            x = x + 0.5 * flow.velocity(trainer.unet(sample, flow.timestep(now), text).sample, sample, now)
        expected = np.asarray(to_pil(model.decode(x))[0]).astype(int)
    assert np.abs(got - expected).max() <= 1
