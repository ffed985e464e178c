"""Base models that cannot be trained are refused, and gradient checkpointing changes no gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from d2f_fast.errors import ModelError
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
