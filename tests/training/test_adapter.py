"""LoRA that a run starts from, and names of layers, checked with the headers of their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.adapter import check_adapter

TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
LAYERS = {"unet.conv_in": (8, 4, 3, 3), TEXT: (16, 16)}


@pytest.mark.parametrize(
    ("layers", "options", "sentence"),
    [
        (LAYERS, {}, None),
        (LAYERS, {"rank": 3}, "rank is 3, and .* has no such layers: leave rank out"),
        (LAYERS, {"first_last_layers": True}, "first_last_layers is set, and .* has 1 of the two layers"),
        ({"unet.conv_in": (8, 8, 3, 3)}, {}, "takes 8 channels, and this one takes 4"),
        ({TEXT: (16, 16)}, {}, "adapts text encoders only"),
        (None, {"target_modules": ("to_q",)}, None),
        (None, {"target_modules": ("to_w",)}, "target_modules: 'to_w' is not a linear or convolution layer"),
        (None, {}, None),
    ],
    ids=str,
)
def test_adapter_that_does_not_fit_is_refused(
    layers: dict[str, tuple[int, ...]] | None, options: Any, sentence: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    if layers is not None:
        down = {f"{name}.lora_A.weight": torch.ones(2, *columns) for name, (_, *columns) in layers.items()}
        up = {f"{name}.lora_B.weight": torch.ones(rows, 2) for name, (rows, *_) in layers.items()}
        save_file(down | up, tmp_path / "x.safetensors")
        options = options | {"init_lora": str(tmp_path / "x.safetensors")}
    arguments = TrainingConfig(**options), str(tiny_folder), ModelOptions()
    if sentence is None:
        check_adapter(*arguments)
    else:
        with pytest.raises(RefusedInputError, match=sentence):
            check_adapter(*arguments)


def test_teacher_knows_no_other_text_encoder(tiny_folder: Path, tmp_path: Path) -> None:
    tensors = {f"{name}.lora_A.weight": torch.ones(2, *columns) for name, (_, *columns) in LAYERS.items()}
    tensors |= {f"{name}.lora_B.weight": torch.ones(rows, 2) for name, (rows, *_) in LAYERS.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    config = TrainingConfig(init_lora=str(tmp_path / "x.safetensors"))
    with pytest.raises(RefusedInputError, match="init_lora adapts text encoders, whose text the teacher does not know"):
        check_adapter(config, str(tiny_folder), ModelOptions(), has_teacher=True)
