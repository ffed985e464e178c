"""Saved pipeline folders hold what every version of transformers reads, and generate the same images."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from d2f_fast import load_miniature
from d2f_fast.models.save import save_pipeline_folder

CLIENT = Path(__file__).with_name("pipeline_client.py")
# tests/older_environments.py makes the environments and prints this variable.
OLDER_PYTHONS = [name for name in os.environ.get("D2F_OLDER_PYTHONS", "").split(os.pathsep) if name]


@pytest.fixture(scope="session")
def saved_miniature(shared_folder: Any) -> Path:
    def save(folder: Path) -> None:
        save_pipeline_folder(load_miniature(), folder)

    return Path(shared_folder("saved-miniature", save))


def keys_of(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def latents_in_a_process(interpreter: str, folder: Path, tmp_path: Path) -> Any:
    """Return the latents that a pipeline folder generates in another process, without this package."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [interpreter, CLIENT, folder, tmp_path / "noise.npy", tmp_path / "latents.npy"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "latents.npy")


def test_tokenizer_files_of_older_transformers_give_the_same_tokens(saved_miniature: Path, tmp_path: Path) -> None:
    tokenizer = load_miniature().tokenizer
    folder = saved_miniature / "tokenizer"
    older = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>")
    for text in ("an owl on a blue background", "Ünknown wörds, 12!", ""):
        assert older(text).input_ids == tokenizer(text).input_ids


def test_text_encoder_keys_have_the_prefix_of_older_transformers(saved_miniature: Path) -> None:
    keys = keys_of(saved_miniature / "text_encoder" / "model.safetensors")
    assert keys and all(key.startswith("text_model.") for key in keys)
    loaded = StableDiffusionPipeline.from_pretrained(saved_miniature).text_encoder.state_dict()
    base = load_miniature().text_encoder.state_dict()
    assert loaded.keys() == base.keys() and all(torch.equal(loaded[key], base[key]) for key in base)


def test_both_text_encoders_of_sdxl_keep_their_weights(tiny_xl: Any, tmp_path: Path) -> None:
    save_pipeline_folder(tiny_xl, tmp_path)
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    for name in ("text_encoder", "text_encoder_2"):
        keys = keys_of(tmp_path / name / "model.safetensors")
        rest = [key for key in keys if not key.startswith("text_model.")]
        assert rest == (["text_projection.weight"] if name == "text_encoder_2" else [])
        loaded, base = getattr(saved, name).state_dict(), getattr(tiny_xl, name).state_dict()
        assert loaded.keys() == base.keys() and all(torch.equal(loaded[key], base[key]) for key in base)
    for name in ("tokenizer", "tokenizer_2"):
        assert (tmp_path / name / "vocab.json").is_file() and (tmp_path / name / "merges.txt").is_file()


def test_saved_folder_generates_the_same_images(saved_miniature: Path) -> None:
    def images(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipeline("an owl on a blue background", num_inference_steps=2, latents=noise, output_type="np").images

    assert np.array_equal(images(StableDiffusionPipeline.from_pretrained(saved_miniature)), images(load_miniature()))


@pytest.mark.slow
@pytest.mark.parametrize("python", OLDER_PYTHONS)
def test_older_libraries_generate_the_same_latents(python: str, saved_miniature: Path, tmp_path: Path) -> None:
    ours = latents_in_a_process(sys.executable, saved_miniature, tmp_path)
    theirs = latents_in_a_process(python, saved_miniature, tmp_path)
    error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    print(f"\n{python}: relative difference of the latents {error:.1e}")
    assert error <= 1e-5
