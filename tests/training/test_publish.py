"""Saved LoRA files and pipelines give the images of the trainer, and describe how to sample them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.training.trainer import AlignedTrainer


@pytest.mark.parametrize(("objective", "scheduler", "shift", "sigmas"), [
    ("diff2flow", {}, 1.0, "17.6146, 3, 1, 0.3333, 0"),
    ("diff2flow", {}, 2.0, "20.6146, 6, 2, 0.6667, 0"),
    ("diff2flow", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 1.5, "4096, 4.5, 1.5, 0.5, 0"),
    ("fm", {}, 1.0, "1, 0.75, 0.5, 0.25, 0"),
    ("fm", {}, 2.0, "1, 0.8571, 0.6667, 0.4, 0"),  # 2 s / (1 + s)
])  # fmt: skip
def test_lora_file_describes_how_to_sample_it(
    make_config: Any,
    tiny_folder: Path,
    tmp_path: Path,
    objective: str,
    scheduler: dict[str, Any],
    shift: float,
    sigmas: str,
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    weighting = "flow" if objective == "fm" else "native"
    options = make_config(tmp_path, objective=objective, flow_shift=2.5, sampling_shift=shift, loss_weighting=weighting)
    _, header = read_tensors(AlignedTrainer.from_pretrained(pipeline, options).save_lora(tmp_path / "lora"))
    assert header["d2f.steps"] == "0" and header["ss_total_batch_size"] == str(options.train_batch_size)
    method = ("objective", "prediction_type", "fm_form", "zero_snr", "loss_weighting", "training_shift", "shift")
    names = {f"d2f.{name}" for name in (*method, "recommended_sigmas")}
    assert {name: value for name, value in header.items() if name in names} == {
        "d2f.objective": objective,
        "d2f.prediction_type": "flow_prediction" if objective == "fm" else scheduler.get("prediction_type", "epsilon"),
        **({"d2f.fm_form": "diffusers"} if objective == "fm" else {"d2f.zero_snr": "true" if scheduler else "false"}),
        "d2f.loss_weighting": weighting,
        "d2f.training_shift": "2.5",
        "d2f.shift": str(shift),
        "d2f.recommended_sigmas": sigmas,
    }


def test_full_finetuning_has_no_lora_to_save(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedInputError, match="adapter is full, so there is no LoRA to save: use save_pipeline"):
        make_trainer(adapter="full").save_lora(tmp_path)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_saved_pipeline_holds_the_averaged_network(
    images: Any, make_batch: Any, make_trainer: Any, tmp_path: Path, adapter: str
) -> None:
    trainer = make_trainer(adapter=adapter, max_train_steps=3)
    trainer.fit(images())
    saved = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "saved"), safety_checker=None)
    sample, text = make_batch()["latents"], make_batch()["encoder_hidden_states"]
    with trainer.averaged(), torch.no_grad():
        expected = trainer.unet(sample, 673, text).sample
    with torch.no_grad():
        torch.testing.assert_close(saved.unet(sample, 673, text).sample, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RefusedInputError, match="saved exists: name a new folder, or remove it"):
        trainer.save_pipeline(tmp_path / "saved")


@pytest.mark.parametrize("objective", ["diff2flow", "fm"])
def test_saved_pipeline_gives_the_images_of_the_trainer(
    images: Any, make_trainer: Any, tmp_path: Path, objective: str
) -> None:
    shift = 2.0 if objective == "fm" else 1.0
    trainer = make_trainer(objective=objective, flow_shift=shift, max_train_steps=5, learning_rate=0.3)
    trainer.fit(images())
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


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_is_trained_on_a_flow_checkpoint_is_sampled_by_stock_and_by_this_package(
    flow_xl: Any, make_config: Any, images: Any, tmp_path: Path, adapter: str
) -> None:
    options = make_config(
        tmp_path / "run", adapter=adapter, flow_shift=2.5, sampling_shift=4.0, max_train_steps=3, learning_rate=0.1
    )
    trainer = AlignedTrainer.from_pretrained(flow_xl, options)
    trainer.fit(images())
    noise = torch.Generator().manual_seed(3)
    expected = np.asarray(trainer.sample(["ab", "c"], 4, guidance_scale=3.0, generator=noise), dtype=np.float64)
    saved = StableDiffusionXLPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "saved"), add_watermarker=False)
    assert type(saved.scheduler).__module__.startswith("diffusers.")
    assert saved.scheduler.config["flow_shift"] == 4.0
    tags = json.loads((tmp_path / "saved" / "d2f.json").read_text())
    if adapter == "lora":
        _, header = read_tensors(trainer.save_lora(tmp_path / "lora"))
        assert header.items() >= tags.items()
        kohya = read_tensors(tmp_path / "lora" / "lora_kohya.safetensors")[1]
        assert kohya["modelspec.prediction_type"] == kohya["d2f.prediction_type"] == "flow_prediction"
    assert (tags["d2f.objective"], tags["d2f.fm_form"], tags["d2f.shift"]) == ("fm", "diffusers", "4.0")

    def difference(pipe: Any) -> float:
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        options = {"height": 16, "width": 16, "guidance_scale": 3.0, "num_inference_steps": 4, "latents": latents}
        made = np.asarray(pipe(["ab", "c"], **options).images, dtype=np.float64)
        return float(np.abs(made - expected).max())

    assert difference(saved) <= 3  # it starts 0.001 from pure noise, and rounds the network's timesteps
    saved.scheduler = Diff2FlowScheduler.from_config(saved.scheduler.config)
    assert difference(saved) <= 1
    options = {"output_type": "latent", "height": 16, "width": 16, "guidance_scale": 3.0}
    options["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = saved("ab", num_inference_steps=4, **options).images
    # This is the recipe of the model card; the pipelines ask this scheduler for both attributes.
    saved.scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    saved.scheduler.init_noise_sigma, saved.scheduler.scale_model_input = 1.0, lambda sample, t: sample
    theirs = saved("ab", sigmas=[1.0, 0.75, 0.5, 0.25], **options).images
    assert float((theirs - ours).norm() / ours.norm()) <= 1e-5
    read_back = BaseModel.load(tmp_path / "saved").flow
    assert isinstance(read_back, NaiveFlow) and read_back.form == "diffusers"


def test_published_form_is_read_back_and_continued(images: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        objective="fm", fm_form="published", max_train_steps=3, learning_rate=0.1, sampling_shift=2.0
    )
    trainer.fit(images())
    _, header = read_tensors(trainer.save_lora(tmp_path / "lora"))
    assert header["d2f.fm_form"] == "published" and header["d2f.prediction_type"] == "flow_prediction"
    expected = np.asarray(trainer.sample(["ab"], 3, generator=torch.Generator().manual_seed(3)), dtype=np.float64)
    loaded = BaseModel.load(trainer.save_pipeline(tmp_path / "saved"))
    assert loaded.flow.timestep(torch.tensor(0.25)) == 0.25
    made = generate(
        loaded.pipeline, ["ab"], num_inference_steps=3, guidance_scale=1.0, height=16, width=16,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert np.abs(np.asarray(made, dtype=np.float64) - expected).max() <= 1
    assert AlignedTrainer(loaded, TrainingConfig(output_dir=str(tmp_path), resolution=16)).config.fm_form == "published"


def test_reflection_padding_of_the_autoencoder_is_kept_in_what_is_saved(
    tiny_folder: Path, make_config: Any, make_batch: Any, tmp_path: Path
) -> None:
    options = ModelOptions(vae_reflection_padding=True, vae_custom_scale=0.25)
    trainer = AlignedTrainer.from_pretrained(tiny_folder, make_config(tmp_path / "run", checkpointing_steps=0), options)
    trainer.step(make_batch())
    header = read_tensors(trainer.save_lora(tmp_path / "lora"))[1]
    assert (header["d2f.vae_reflection_padding"], header["d2f.vae_scale"]) == ("true", "0.25")
    folder = trainer.save_pipeline(tmp_path / "saved")
    assert json.loads((folder / "d2f.json").read_text())["d2f.vae_reflection_padding"] == "true"
    assert BaseModel.load(folder).facts.vae_reflection_padding


def test_sdxl_pipeline_with_the_saved_weights_gives_the_images_of_the_trainer(
    make_config: Any, images: Any, tiny_xl: Any, tmp_path: Path
) -> None:
    """Check that both text encoders, the pooled text and the sizes reach the network, in training and sampling."""
    tiny_xl.save_pretrained(tmp_path / "base")
    trainer = AlignedTrainer.from_pretrained(
        tmp_path / "base", make_config(tmp_path / "run", max_train_steps=5, learning_rate=0.3, ema_decay=0.0)
    )
    trainer.fit(images())
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
    assert all(value.count_nonzero() == 0 for value in trainer._inputs.empty_condition().values())
    trainer.save_pipeline(tmp_path / "saved")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    saved.scheduler = Diff2FlowScheduler.from_config(saved.scheduler.config)
    assert np.abs(np.asarray(stock(saved), dtype=np.float64) - np.asarray(pictures, dtype=np.float64)).max() <= 1


def test_checkpoint_holds_the_lora_of_the_averaged_weights(images: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer("run", max_train_steps=3, conv_rank=2, learning_rate=0.1, ema_decay=0.9)
    trainer.fit(images())
    before = {name: parameter.detach().clone() for name, parameter in trainer.trainable.items()}
    (checkpoint, _), (saved, header) = (
        read_tensors(file) for file in (tmp_path / "run/checkpoint-3" / LORA_FILE, trainer.save_lora(tmp_path / "lora"))
    )
    assert checkpoint.keys() == saved.keys() and all(torch.equal(checkpoint[key], saved[key]) for key in saved)
    assert read_tensors(tmp_path / "run/checkpoint-3" / LORA_FILE)[1] == header
    assert header["d2f.weights"] == "ema" and header["d2f.steps"] == "3"
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.trainable.items())
    shadow = trainer.ema.shadow
    name = next(iter(shadow))
    assert torch.equal(saved[f"unet.{name.replace('.default', '')}"], shadow[name])
    assert not torch.equal(shadow[name], before[name])


def test_full_finetuning_has_no_lora_in_its_checkpoint(images: Any, make_trainer: Any, tmp_path: Path) -> None:
    make_trainer("full", adapter="full", max_train_steps=1, checkpointing_steps=1).fit(images())
    assert not list((tmp_path / "full").rglob(LORA_FILE))


@pytest.mark.parametrize(("resolution", "own", "tag"), [(24, 12, "24"), ((16, 24), 8, "16x24")])
def test_saved_pipeline_states_the_size_of_its_training(
    make_trainer: Any, tmp_path: Path, resolution: Any, own: int, tag: str
) -> None:
    trainer = make_trainer(adapter="full", resolution=resolution)
    folder = trainer.save_pipeline(tmp_path / "saved")
    # Stock pipelines take their size from here, and not all of them take one that is not a square.
    assert json.loads((folder / "unet/config.json").read_text())["sample_size"] == own
    assert json.loads((folder / "d2f.json").read_text())["d2f.resolution"] == tag
    assert trainer.unet.config.sample_size == 8
