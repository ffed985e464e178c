"""Test the training of the text encoder and UNet."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f_fast.miniature import build_denoiser


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_denoiser, "cached_latents", lambda vae, device: torch.ones(874, 8, 2, 2, 4, 8, 8))
    monkeypatch.setattr(build_denoiser, "save_pipeline", lambda networks, scheduler: None)
    monkeypatch.setattr(build_denoiser, "cosine", lambda step, steps: 1.0)

    def train(steps: int, state: Path) -> None:
        build_denoiser.build_denoiser(steps, 4, 1e-3, "cpu", state, save_every_s=1e9)

    train(3, tmp_path / "whole.safetensors")
    train(2, tmp_path / "parts.safetensors")
    train(3, tmp_path / "parts.safetensors")
    whole, parts = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
