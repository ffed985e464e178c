"""Base models that cannot be trained are refused, and gradient checkpointing changes no gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.files.tensor_file import write_tensors
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import read_lora
from d2f_fast.training.network import enable_gradient_checkpointing
from d2f_fast.training.trainer import AlignedTrainer


@pytest.mark.parametrize(("unet", "sentence"), [
    ({"in_channels": 9}, "the UNet takes 9 channels and the autoencoder makes 4: give a text-to-image model"),
    ({"num_class_embeds": 3}, "the UNet has num_class_embeds 3, an input that text-to-image training does not give"),
    ({"time_cond_proj_dim": 8}, "the UNet has time_cond_proj_dim 8"),
])  # fmt: skip
def test_network_with_other_inputs_is_refused(
    tiny_pipeline: Any, make_config: Any, tiny_folder: Path, tmp_path: Path, unet: dict[str, Any], sentence: str
) -> None:
    pipeline = tiny_pipeline()
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **unet})
    with pytest.raises(ModelError, match=sentence):
        AlignedTrainer.from_pretrained(pipeline, make_config(tmp_path))


def test_network_that_takes_the_image_behind_its_latents_is_refused(
    tiny_pipeline: Any, make_config: Any, tmp_path: Path
) -> None:
    parts = tiny_pipeline().components
    parts["unet"] = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8})
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ModelError, match="StableDiffusionInstructPix2PixPipeline takes the image behind its own"):
        AlignedTrainer.from_pretrained(pipeline, make_config(tmp_path))


def test_bfloat16_base_trains_and_float16_base_is_refused(
    make_config: Any, images: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with pytest.raises(ModelError, match="the UNet is float16, whose gradients overflow: load it in bf"):
        AlignedTrainer.from_pretrained(pipeline.to(torch.float16), make_config(tmp_path))
    for number, (adapter, precision) in enumerate((("lora", "no"), ("lora", "bf16"), ("full", "no"))):
        half = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).to(torch.bfloat16)
        options = {"adapter": adapter, "mixed_precision": precision, "max_train_steps": 2}
        trainer = AlignedTrainer.from_pretrained(half, make_config(tmp_path / str(number), **options))
        assert np.isfinite(trainer.fit(images())["loss"])
        assert len(trainer.sample(["ab", "c"], 2, guidance_scale=2.0)) == 2


def test_named_model_of_half_precision_trains_as_its_float32_copy_without_holding_one(
    make_config: Any, make_batch: Any, weights_of: Any, assert_equal: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).to(torch.float16).save_pretrained(folder)
    options = {"mixed_precision": "bf16", "conv_rank": 2, "lora_format": "diffusers"}
    float32 = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    named, given = (
        AlignedTrainer.from_pretrained(model, make_config(tmp_path / "run", **options)) for model in (folder, float32)
    )
    frozen = [p for p in named.unet.parameters() if not p.requires_grad and p.ndim > 1]
    assert frozen and {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert named._identity() == given._identity()
    assert_equal(weights_of(named), weights_of(given))
    for number in range(2):
        assert torch.equal(named.step(make_batch(4, number)), given.step(make_batch(4, number)))
    assert_equal(weights_of(named), weights_of(given))
    paths = [trainer.save_lora(tmp_path / name) for trainer, name in ((named, "named"), (given, "given"))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    images = [trainer.sample("ab", generator=torch.Generator().manual_seed(0))[0] for trainer in (named, given)]
    assert images[0].tobytes() == images[1].tobytes()
    with named.averaged(), given.averaged():
        assert_equal(named.unet.state_dict(), given.unet.state_dict())
    assert named._half_base is not None
    assert {exact.dtype for exact in named._half_base._exact if exact is not None} == {torch.float16}


def test_gradient_checkpointing_changes_no_bit(
    make_batch: Any, weights_of: Any, assert_equal: Any, make_trainer: Any
) -> None:
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    for number in range(2):
        assert torch.equal(plain.step(make_batch(4, number)), checkpointed.step(make_batch(4, number)))
    assert_equal(weights_of(plain), weights_of(checkpointed))


def test_gradient_checkpointing_repeats_dropout(
    make_batch: Any, gradients_of: Any, distance: Any, make_trainer: Any
) -> None:
    trainer = make_trainer(adapter="full", gradient_checkpointing=True)
    plain = make_trainer(adapter="full")
    for unet in (trainer.unet, plain.unet):
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
    enable_gradient_checkpointing(trainer.unet)
    for one in (trainer, plain):
        torch.manual_seed(3)
        one.step(make_batch())
    assert distance(gradients_of(trainer), gradients_of(plain)) == 0


def lora_of(folder: Path, tiny_folder: Path, *, text: bool = False, header: dict[str, str] | None = None) -> Path:
    """Write a LoRA of rank 3 of one layer of the UNet, and of one of the text encoder where it is asked for."""
    keys = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 8}
    if text:
        keys["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] = 16
    tensors = {}
    for key, width in keys.items():
        tensors |= {f"{key}.lora_A.weight": torch.randn(3, width), f"{key}.lora_B.weight": torch.randn(width, 3)}
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "start.safetensors", tensors, header)
    return folder / "start.safetensors"


UNSTATED: dict[str, Any] = {"rank": None, "target_modules": None}


@torch.no_grad()
def test_run_starts_with_the_effect_of_a_lora_and_passes_its_text_encoder_on(
    make_config: Any, images: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    file = lora_of(tmp_path / "old", tiny_folder, text=True)
    merged, trained = (StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None) for _ in range(2))
    fuse_adapter(merged, file, 0.5)
    config = make_config(tmp_path / "run", **UNSTATED, init_lora=f"{file}:0.5", max_train_steps=2, learning_rate=1e-3)
    trainer = AlignedTrainer.from_pretrained(trained, config)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16)
    expected = merged.unet(sample, torch.tensor(5.0), text).sample
    got = trainer.unet.eval()(sample, torch.tensor(5.0), text).sample
    assert (got - expected).norm() <= 5e-6 * expected.norm()
    assert {parameter.shape[0] for name, parameter in trainer.trainable.items() if "lora_A" in name} == {3}
    tokens = torch.arange(8)[None]
    assert torch.equal(trained.text_encoder(tokens)[0], merged.text_encoder(tokens)[0])
    with torch.enable_grad():
        trainer.fit(images())
    trainer.save_lora(tmp_path / "run")
    before = read_lora(file).layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"].as_lora()
    for saved in ("run", "run/checkpoint-2", "run/run_kohya.safetensors"):
        lora = read_lora(tmp_path / saved)
        (after,) = (layer.as_lora() for name, layer in lora.layers.items() if "self_attn" in name)
        assert (after.delta(after.up) - 0.5 * before.delta(after.up)).norm() <= 1e-6 * before.up.norm()
        assert lora.header["d2f.init_lora"].startswith("start.safetensors ") and len(lora.layers) == 2


def test_run_that_started_from_a_lora_resumes_bit_for_bit(
    make_trainer: Any, images: Any, state_of: Any, assert_equal: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    file = lora_of(tmp_path / "old", tiny_folder)
    options = {**UNSTATED, "init_lora": str(file)}
    straight = make_trainer("straight", **options)
    straight.fit(images())
    make_trainer("run", **options, max_train_steps=3).fit(images())
    moved = file.rename(tmp_path / "moved.safetensors")
    resumed = make_trainer("run", **UNSTATED, init_lora=str(moved), resume_from_checkpoint="latest")
    resumed.fit(images())
    assert_equal(state_of(resumed), state_of(straight))
    with pytest.raises(CheckpointError, match=r"init_lora was '\w{16}:1' and is now '\w{16}:0\.5': resume with"):
        make_trainer("run", **UNSTATED, init_lora=f"{moved}:0.5", resume_from_checkpoint="latest").fit(images())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2}, "rank is 2, and .*start.safetensors has rank 3: leave rank out, so that the file decides"),
        ({"target_modules": ("to_k",)}, "target_modules is to_k, and .* has 0 of its"),
        ({"objective": "diffusion"}, "makes the network predict the flow .*this run trains the objective diffusion"),
    ],
    ids=str,
)
def test_options_that_contradict_the_lora_are_refused(
    make_trainer: Any, tiny_folder: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    header = {"d2f.prediction_type": "flow_prediction"} if "objective" in options else None
    file = lora_of(tmp_path / "old", tiny_folder, header=header)
    with pytest.raises(ModelError, match=sentence):
        make_trainer(**(UNSTATED | {"init_lora": str(file)} | options))
