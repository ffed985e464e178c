"""Training on depth: the masked loss, invalid pixels, exact continuation, and the saved folder in stock diffusers."""

import json
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, MarigoldDepthPipeline
from PIL import Image

from d2f_fast.config import TrainingConfig
from d2f_fast.data.depth_data import find_depth_images
from d2f_fast.data.depth_encoding import DepthDataset, DepthEncoder, options_for_depth
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.order import plan_batches
from d2f_fast.errors import CheckpointError, RefusedInputError
from d2f_fast.lora.tags import lora_tags
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.marigold import empty_text
from d2f_fast.tasks.depth import DepthModel
from d2f_fast.training.trainer import AlignedTrainer

MakeTrainer = Callable[..., AlignedTrainer]


@pytest.fixture
def make_trainer(tiny_pipeline: Any, make_config: Callable[..., TrainingConfig], tmp_path: Path) -> MakeTrainer:
    """Return a function that makes a trainer of the tiny model that sees one image."""

    def make(output: str = "run", **options: Any) -> AlignedTrainer:
        config = options_for_depth(make_config(tmp_path / output, random_flip=True, **options))
        return AlignedTrainer.from_pretrained(tiny_pipeline(), config, context_images=1)

    return make


def dataset_of(folder: Path, **options: Any) -> DepthDataset:
    depth_options = DepthOptions(**options)
    return DepthDataset(find_depth_images(folder, depth_options), depth_options)


def weights(trainer: AlignedTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.trainable.values()]


def first_batch(trainer: AlignedTrainer, dataset: DepthDataset) -> Any:
    encoder = DepthEncoder(trainer.model, trainer.config, dataset)
    plan = next(islice(plan_batches(len(dataset), 4, 0), 1))
    return encoder.encode(plan, encoder.load(plan))


def test_loss_is_the_mean_over_valid_latents_of_a_network_that_sees_the_image(
    make_trainer: MakeTrainer, depth_rooms: Path
) -> None:
    trainer = make_trainer()
    batch = first_batch(trainer, dataset_of(depth_rooms))
    batch["mask"] = torch.rand(4, 1, 8, 8)
    inputs = trainer._inputs.sample(batch, 0)
    t, latents, noise = inputs.t.double(), inputs.latents.double(), inputs.noise.double()
    with torch.no_grad():
        x = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
        sample = trainer.alignment.to_sample(x.float(), inputs.t)
        text = empty_text(trainer.model.pipeline).expand(4, -1, -1)
        unet_input = torch.cat([batch["context"], sample], 1)
        output = trainer.unet(unet_input, trainer.alignment.timestep(inputs.t), text).sample
        velocity = trainer.alignment.velocity(output, sample, inputs.t)
    error = (velocity - (latents - noise)).square().mean(dim=1, keepdim=True)
    expected = ((error * batch["mask"]).sum((1, 2, 3)) / batch["mask"].sum((1, 2, 3))).mean()
    assert trainer.step(batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["diff2flow", "fm"])
def test_one_step_regression_learns_the_jump_from_zeros(
    make_trainer: MakeTrainer, depth_rooms: Path, objective: str
) -> None:
    trainer = make_trainer(distill=True, objective=objective)
    batch = first_batch(trainer, dataset_of(depth_rooms))
    batch["mask"] = torch.rand(4, 1, 8, 8)
    inputs = trainer._inputs.sample(batch, 0)
    assert not inputs.noise.any() and not inputs.t.any()
    with torch.no_grad():
        text = empty_text(trainer.model.pipeline).expand(4, -1, -1)
        unet_input = torch.cat([batch["context"], torch.zeros(4, 4, 8, 8)], 1)
        output = trainer.unet(unet_input, 1000 if objective == "fm" else 999, text).sample.double()
    # The clean latents that the noise of the last timestep implies, where the state is zero.
    alpha_bar = trainer.model.pipeline.scheduler.alphas_cumprod[-1].double()
    jump = -output if objective == "fm" else -((1 - alpha_bar) / alpha_bar).sqrt() * output
    error = (jump - batch["latents"].double()).square().mean(dim=1, keepdim=True)
    mask = batch["mask"].double()
    expected = ((error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
    assert trainer.step(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_slices_of_the_processes_are_those_of_the_whole_batch_from_zeros(
    make_trainer: MakeTrainer, depth_rooms: Path
) -> None:
    trainer, dataset = make_trainer(distill=True), dataset_of(depth_rooms)
    encoder = DepthEncoder(trainer.model, trainer.config, dataset)

    def inputs_of(rank: int, count: int) -> Any:
        plan = next(plan_batches(len(dataset), 3, 0, rank=rank, world_size=count))
        return trainer._inputs.sample(encoder.encode(plan, encoder.load(plan)), 0)

    whole, parts = inputs_of(0, 1), [inputs_of(rank, 4) for rank in range(4)]
    assert sorted(len(part.t) for part in parts) == [0, 1, 1, 1] and all(part.global_size == 3 for part in parts)
    for name in ("latents", "noise", "t", "mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.condition["context"] for part in parts]), whole.condition["context"])


@pytest.mark.parametrize(("distill", "values"), [(False, (np.nan, 0.0, 1e9)), (True, (np.nan, 1e9))])
def test_depth_of_invalid_pixels_changes_no_gradient(
    make_trainer: MakeTrainer, depth_rooms: Path, tmp_path: Path, distill: bool, values: tuple[float, ...]
) -> None:
    results = []
    for number, wrong in enumerate(values):
        folder = Path(shutil.copytree(depth_rooms, tmp_path / f"rooms{number}"))
        for path in (folder / "depth").glob("*.npy"):
            depth = np.load(path)
            depth[3:5] = np.nan
            np.save(path, np.where(np.isnan(depth), np.float32(wrong), depth))
        trainer = make_trainer(f"run{number}", max_train_steps=1, cache_latents=False, distill=distill)
        trainer.fit(dataset_of(folder, depth_max=1000.0))
        results.append(weights(trainer))
    assert all(torch.equal(first, other) for first, *others in zip(*results, strict=True) for other in others)


@pytest.mark.parametrize(("distill", "steps"), [(False, 3), (True, 2)])
def test_continued_run_is_equal_bit_for_bit(
    make_trainer: MakeTrainer, depth_rooms: Path, distill: bool, steps: int
) -> None:
    whole = make_trainer("whole", max_train_steps=steps, distill=distill)
    whole.fit(dataset_of(depth_rooms))
    make_trainer("parts", max_train_steps=1, distill=distill).fit(dataset_of(depth_rooms))
    again = make_trainer("parts", max_train_steps=steps, resume_from_checkpoint="latest", distill=distill)
    with pytest.raises(CheckpointError, match="depth_normalization was 'affine' and is now 'log': resume with the"):
        again.fit(dataset_of(depth_rooms, depth_normalization="log"))
    again.fit(dataset_of(depth_rooms))
    assert again.global_step == steps
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_continued_run_on_mixed_sources_is_equal_bit_for_bit(make_trainer: MakeTrainer, depth_rooms: Path) -> None:
    sources = [find_depth_images(depth_rooms, options) for options in (DepthOptions(), DepthOptions(depth_max=3.0))]

    def mixed(*weights: float) -> DepthDataset:
        return DepthDataset(sources, weights=weights)

    whole = make_trainer("whole", max_train_steps=2)
    whole.fit(mixed(3.0, 1.0))
    make_trainer("parts", max_train_steps=1).fit(mixed(3.0, 1.0))
    again = make_trainer("parts", max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"dataset_weights was '3\.0, 1\.0' and is now '1\.0, 1\.0': resume with"):
        again.fit(mixed(1.0, 1.0))
    again.fit(mixed(3.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_saved_model_gives_the_same_depth_in_stock_diffusers(
    make_trainer: MakeTrainer, tiny_pipeline: Any, depth_rooms: Path, tmp_path: Path, adapter: str
) -> None:
    trainer = make_trainer(adapter=adapter, max_train_steps=2)
    trainer.fit(dataset_of(depth_rooms, depth_normalization="log"))
    folder = trainer.save_pipeline(tmp_path / "pipeline")
    stock = MarigoldDepthPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.scheduler) is DDIMScheduler
    assert (stock.config.default_denoising_steps, stock.config.default_processing_resolution) == (4, 16)
    assert json.loads((folder / "d2f.json").read_text())["d2f.depth_normalization"] == "log"
    image, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    got = stock(image, latents=noise).prediction[0, ..., 0]
    # The trained network itself, along flow time, from the same noise at the same times.
    alignment, model = trainer.alignment, trainer.model
    times = [*alignment.flow_time(torch.tensor([999.0, 749.0, 499.0, 249.0])).tolist(), 1.0]
    with torch.no_grad(), trainer.averaged():
        context = model.scale_latents(model.encode_images(image * 2 - 1)["mean"])
        text, x = empty_text(model.pipeline), alignment.to_flow(noise, torch.tensor([times[0]]))
        for t, following in pairwise(times):
            now = torch.tensor([t])
            sample = alignment.to_sample(x, now)
            output = trainer.unet(torch.cat([context, sample], 1), alignment.timestep(now), text).sample
            x = x + (following - t) * alignment.velocity(output, sample, now)
        expected = (model.decode(x).mean(1).clamp(-1, 1) + 1) / 2
    assert np.abs(got - expected[0].numpy()).max() <= 1e-5
    assert got.std() > 1e-3
    if adapter == "lora":
        path = trainer.save_lora(tmp_path / "lora")
        base = BaseModel(tiny_pipeline())
        base.see_images()
        base.unet.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet")
        network_input = torch.cat([context, noise], 1)
        with torch.no_grad():
            reloaded, merged = (unet.eval()(network_input, 500, text).sample for unet in (base.unet, stock.unet))
        assert (reloaded - merged).norm() <= 1e-4 * merged.norm()


def zeros_for(pipeline: MarigoldDepthPipeline, image: Image.Image) -> torch.Tensor:
    """Return zeros of the shape of the latents, as the guide on depth makes them."""
    longer, factor = pipeline.default_processing_resolution, pipeline.vae_scale_factor
    width, height = (side * longer // max(image.size) for side in image.size)
    return torch.zeros(1, pipeline.vae.config.latent_channels, -(-height // factor), -(-width // factor))


def test_jump_from_zeros_gives_the_same_depth_in_stock_diffusers(
    make_trainer: MakeTrainer, depth_rooms: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(distill=True, max_train_steps=2, validation_steps=2)
    assert len(trainer.fit(dataset_of(depth_rooms), dataset_of(depth_rooms))["validation_losses"]) == 1
    folder, path = trainer.save_pipeline(tmp_path / "pipeline"), trainer.save_lora(tmp_path / "lora")
    tags, header = json.loads((folder / "d2f.json").read_text()), lora_tags(path)
    stated = {"d2f.start": "zeros", "d2f.distilled": "true", "d2f.recommended_steps": "1", "d2f.task": "depth"}
    assert stated.items() <= tags.items() and stated.items() <= header.items()
    stock = MarigoldDepthPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert stock.default_denoising_steps == 1
    model, network = DepthModel(stock, "affine", {}), trainer.model
    for size in ((16, 16), (40, 27)):  # The second one is resized to 16 x 10 pixels.
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
        got = model.predict(image).values
        assert np.array_equal(model.predict(image, steps=1, seed=7).values, got) and got.std() > 1e-3
        assert (
            np.abs(
                stock(image, num_inference_steps=1, latents=zeros_for(stock, image)).prediction[0, ..., 0] - got
            ).max()
            <= 1e-5
        )
        assert np.abs(stock(image).prediction[0, ..., 0] - got).max() > 1e-3  # The pipeline starts from noise.
        full_size = model.predict(image, processing_resolution=0).values
        assert full_size.shape == size[::-1]
    # The trained network itself, in one step along flow time.
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad(), trainer.averaged():
        context = network.scale_latents(network.encode_images(pixels * 2 - 1)["mean"])
        output = trainer.unet(torch.cat([context, 0 * context], 1), 999, empty_text(network.pipeline)).sample
        latents = trainer.alignment.velocity(output, 0 * context, torch.zeros(1))
        expected = ((network.decode(latents).mean(1).clamp(-1, 1) + 1) / 2)[0].numpy()
    for sampler in ("saved", "flow"):
        pipeline = model.sampled_by(sampler).pipeline
        values = pipeline(pixels, num_inference_steps=1, latents=0 * context).prediction[0, ..., 0]
        assert np.abs(values - expected).max() <= 1e-5
    for options, sentence in (
        ({"steps": 2}, f"{folder} was trained to jump from zeros in one step, got steps 2: leave steps out"),
        ({"ensemble_size": 3}, f"ensemble_size must be 1 with {folder}, which starts from zeros .*, got 3: leave it"),
    ):
        with pytest.raises(RefusedInputError, match=sentence):
            model.predict(image, **options)
    for given in ({}, {"num_inference_steps": 1, "method": "rk4"}, {"num_inference_steps": 1, "noise": context}):
        with pytest.raises(RefusedInputError, match="jump from zeros in one step: give num_inference_steps=1, and"):
            trainer.sample("a", context=context, **given)
    (image,) = trainer.sample("", 1, context=context)
    assert image.tobytes() == trainer.sample("", 1, context=context)[0].tobytes()
    with pytest.raises(RefusedInputError, match="in one step, and no path leads back from an image: use sample"):
        trainer.invert([image], [""], context=context)


def test_naive_flow_is_saved_with_a_stock_scheduler_and_follows_its_own_flow(
    make_trainer: MakeTrainer, depth_rooms: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(objective="fm", max_train_steps=1)
    trainer.fit(dataset_of(depth_rooms))
    stock = MarigoldDepthPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "pipeline"))
    assert type(stock.scheduler).__name__ == "DPMSolverMultistepScheduler"
    stock.set_progress_bar_config(disable=True)
    image, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    rounded = stock(image, latents=noise, num_inference_steps=2).prediction[0, ..., 0]
    exact = DepthModel(stock, "affine", {}).sampled_by("flow").pipeline(image, latents=noise, num_inference_steps=2)
    model = trainer.model
    with torch.no_grad():
        context = model.scale_latents(model.encode_images(image * 2 - 1)["mean"])
        x, text = noise, empty_text(model.pipeline)
        for t in (0.0, 0.5):  # it learns noise - latents, at 1000 (1 - t)
            output = stock.unet(torch.cat([context, x], 1), torch.tensor(1000 * (1 - t)), text).sample
            x = x - 0.5 * output
        expected = (model.decode(x).mean(1).clamp(-1, 1) + 1)[0].numpy() / 2
    assert np.abs(exact.prediction[0, ..., 0] - expected).max() <= 1e-5
    assert np.abs(rounded - expected).max() <= 0.05  # the stock scheduler starts at 0.999 and rounds its timesteps
    with pytest.raises(RefusedInputError, match=r"sees an image beside its own latents, .* and prompts give none"):
        trainer.sample("a")


def test_images_are_sampled_with_the_context_of_the_training(make_trainer: MakeTrainer, depth_rooms: Path) -> None:
    trainer = make_trainer()
    context = first_batch(trainer, dataset_of(depth_rooms))["context"][:2]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "context": context, "method": "heun"}

    def sampled(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        return np.stack(trainer.sample(["a", "b"], **(options | more), generator=generator)).astype(int)

    model, flow = trainer.model, trainer.alignment
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), trainer.averaged():
        text, away = (model.encode_prompts(each)["encoder_hidden_states"] for each in (["a", "b"], ["", ""]))

        def velocity(x: torch.Tensor, t: float, image_scale: float) -> torch.Tensor:
            now = torch.tensor(t)
            sample = flow.to_sample(x, now)
            cases = ((away, 0 * context), (away, context), (text, context))
            inputs = [(torch.cat([image, sample], 1), words) for words, image in cases]
            neither, image, both = (trainer.unet(given, flow.timestep(now), words).sample for given, words in inputs)
            output = neither + image_scale * (image - neither) + 3.0 * (both - image)
            return flow.velocity(output, sample, now)

        for image_scale in (1.0, 2.0):
            slope = velocity(noise, 0.0, image_scale)
            x = noise + (slope + velocity(noise + 0.5 * slope, 0.5, image_scale)) / 4
            x = x + 0.5 * velocity(x, 0.5, image_scale)
            want = np.stack(to_pil(model.decode(x))).astype(int)
            assert np.abs(sampled(image_guidance_scale=image_scale) - want).max() <= 1
    assert np.abs(sampled() - sampled(context=0 * context)).max() > 1
    image = Image.fromarray(np.uint8(sampled()[0]))
    found = trainer.invert([image], ["a"], 2, method="euler", context=context[:1])
    assert found.shape == (1, 4, 8, 8) and found.isfinite().all()


def test_batch_with_another_context_than_the_network_takes_is_refused(
    make_trainer: MakeTrainer, make_batch: Callable[..., Any], depth_rooms: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    trainer = make_trainer()
    batch = first_batch(trainer, dataset_of(depth_rooms))
    without = {name: value for name, value in batch.items() if name != "context"}
    with pytest.raises(RefusedInputError, match=r"context must have the 4 channels .* got 0"):
        trainer.step(without)
    text = AlignedTrainer.from_pretrained(tiny_pipeline(), TrainingConfig(output_dir=str(tmp_path), resolution=16))
    with pytest.raises(RefusedInputError, match=r"context must have the 0 channels .* got 4"):
        text.step(batch)


def test_model_of_a_depth_run_is_trained_further(make_trainer: MakeTrainer, depth_rooms: Path, tmp_path: Path) -> None:
    trainer = make_trainer(max_train_steps=1)
    trainer.fit(dataset_of(depth_rooms))
    folder = trainer.save_pipeline(tmp_path / "pipeline")
    config = TrainingConfig(output_dir=str(tmp_path / "more"), resolution=16, max_train_steps=1)
    again = AlignedTrainer.from_pretrained(folder, options_for_depth(config), context_images=1)
    assert again.unet.config.in_channels == 8 and again.trainable["conv_in.lora_A.default.weight"].shape[0] == 72
    again.fit(dataset_of(depth_rooms))
    assert again.global_step == 1
