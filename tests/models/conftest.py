"""The tiny model, loaded by this package and by diffusers; and narrow models of the three families as single files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.files.tensor_stream import LazyTensor
from d2f_fast.models import single_file_header
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.original_layout import original_tensors
from d2f_fast.models.single_file_header import family_table


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    return BaseModel.load(tiny_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.vae.requires_grad_(False)  # for weights that train, torch uses kernels that round differently
    return pipeline


_TEXT = {"vocab_size": 54, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
_TEXT |= {"num_attention_heads": 2, "intermediate_size": 24}


def _narrow_table(family: Any) -> dict[str, Any]:
    """Return a family's configuration with few channels, and with the small vocabulary of the tiny model."""
    table = family_table(family)
    widths = {"text_encoder": 8, "text_encoder_2": 16}
    for name in widths.keys() & table.keys():
        table[name] |= _TEXT | {
            "hidden_size": widths[name],
            "projection_dim": widths[name],
            "num_hidden_layers": 2,
        }
    levels = len(table["unet"]["block_out_channels"])
    table["unet"] |= {
        "block_out_channels": [8, 16, 32, 32][:levels],
        "attention_head_dim": 4 if family == "sd1" else [1, 2, 4, 4][:levels],
        "cross_attention_dim": 24 if family == "sdxl" else 8,
        "norm_num_groups": 4,
        "sample_size": 4,
    }
    if family == "sdxl":
        table["unet"]["transformer_layers_per_block"] = [1, 1, 2]
        table["unet"] |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16 + 6 * 4}
    table["vae"] |= {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4, "sample_size": 32}
    return table


def _narrow_pipeline(family: str, tokenizer: Any) -> Any:
    """Return a narrow pipeline of a family with random weights."""
    torch.manual_seed(3)
    table = _narrow_table(family)
    parts = {
        "unet": UNet2DConditionModel.from_config(table["unet"]),
        "vae": AutoencoderKL.from_config(table["vae"]),
        "scheduler": DDIMScheduler.from_config(table["scheduler"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**table["text_encoder"])),
        "tokenizer": tokenizer,
    }
    if family == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**table["text_encoder_2"]))
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def narrow(tiny_folder: Path) -> Callable[[str], Any]:
    """Return the function `narrow(family)`: a narrow pipeline with random weights, made once."""
    made: dict[str, Any] = {}
    tokenizer = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).tokenizer
    return lambda family: made.get(family) or made.setdefault(family, _narrow_pipeline(family, tokenizer))


@pytest.fixture(scope="session")
def original(narrow: Callable[[str], Any]) -> Callable[[str], dict[str, Tensor]]:
    """Return the function `original(family)`: the tensors of a narrow pipeline as a single file has them."""

    def tensors(family: Any) -> dict[str, Tensor]:
        pipeline = narrow(family)
        parts: dict[str, Any] = {name: getattr(pipeline, name).state_dict() for name in ("unet", "vae")}
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(pipeline, name, None)) is not None:
                keep = ("text_model.", "text_projection.")
                state = encoder.state_dict().items()
                parts[name] = {key if key.startswith(keep) else f"text_model.{key}": value for key, value in state}
        lazy = {name: {key: LazyTensor.of(value) for key, value in part.items()} for name, part in parts.items()}
        configs = {name: dict(getattr(pipeline, name).config) for name in ("unet", "vae")}
        named = original_tensors(family, lazy, configs, is_v_prediction=False, zero_snr=False)
        return {key: tensor.load().clone().contiguous() for key, tensor in named.items()}

    return tensors


@pytest.fixture
def write_file(
    original: Callable[[str], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return the function `write_file(family, change, header)`: a single file of a narrow pipeline.

    `change` receives the tensors and may edit them; `header` holds the text entries. The families have the narrow
    configuration in this test.
    """
    monkeypatch.setattr(single_file_header, "family_table", _narrow_table)

    def write(family: str, change: Any = None, header: dict[str, str] | None = None) -> Path:
        tensors = original(family)
        if change is not None:
            change(tensors)
        path = tmp_path / f"{family}.safetensors"
        save_file(tensors, path, metadata={"format": "pt", **(header or {})})
        return path

    return write


@pytest.fixture
def tokenizer(tiny_folder: Path) -> str:
    """Folder of the tokenizer of the narrow and tiny models."""
    return str(tiny_folder / "tokenizer")


@pytest.fixture(scope="session")
def narrow_table() -> Callable[[str], dict[str, Any]]:
    """Return the function `narrow_table(family)`: a family's configuration with few channels."""
    return _narrow_table
