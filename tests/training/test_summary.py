"""Entries of a LoRA file's header that say how it was trained and how to sample with it."""

from pathlib import Path
from typing import Any

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.data.pairs import PairDataset
from d2f_fast.lora.start import StartingLora
from d2f_fast.training.summary import pair_tags, recommended_steps, summary_tags


def test_summary_names_training_and_recommended_sampling() -> None:
    config = TrainingConfig(learning_rate=2e-5, max_train_steps=9, lr_scheduler="cosine", seed=3)
    tags = {"d2f.shift": "2.0", "d2f.recommended_sigmas": "17.6146, 3, 1, 0.3333, 0"}
    start = StartingLora(Path("folder/old.safetensors"), 0.5, "ab" * 32, {}, {}, {})
    assert summary_tags(config, tags, 7, 12, start) == tags | {
        "d2f.steps": "7",
        "d2f.batch_size": "12",
        "d2f.learning_rate": "2e-05",
        "d2f.weights": "ema",
        "d2f.recommended_steps": "4",
        "d2f.recommended_spacing": "uniform",
        "d2f.recommended_guidance": "3.0",
        "d2f.init_lora": "old.safetensors abababababababab:0.5",
        "ss_steps": "7",
        "ss_max_train_steps": "9",
        "ss_total_batch_size": "12",
        "ss_learning_rate": "2e-05",
        "ss_lr_scheduler": "cosine",
        "ss_seed": "3",
        "modelspec.usage_hint": "4 steps, guidance 3, sampler Euler with the sigmas 17.6146, 3, 1, 0.3333, 0",
    }
    assert summary_tags(TrainingConfig(ema_decay=0), {}, 7, 12)["d2f.weights"] == "last"
    assert "d2f.init_lora" not in summary_tags(config, tags, 7, 12)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("diffusers", "sampler Euler with flow matching (ModelSamplingSD3 in ComfyUI), shift 2.0"),
        ("published", "with d2f_fast only: the network is fed the flow time itself"),
    ],
)
def test_usage_hint_of_a_flow_model_names_its_own_sampling(form: str, words: str) -> None:
    tags = {"d2f.shift": "2.0", "d2f.prediction_type": "flow_prediction", "d2f.fm_form": form}
    assert summary_tags(TrainingConfig(), tags, 1, 1)["modelspec.usage_hint"] == f"4 steps, guidance 3, {words}"


def test_pairs_of_which_nothing_is_known_are_sampled_without_guidance(write_pairs: Any, tmp_path: Path) -> None:
    for name, meta, guidance, solver in (
        ("published", {"index": 0}, "unknown", "unknown"),
        ("one", {"guidance_scale_range": [3.0, 3.0], "steps": 8, "solver": "euler"}, "3", "euler, 8 steps"),
        ("odd", {"guidance_scale_range": ["a", {}], "steps": [], "solver": 3}, "unknown", "unknown"),
        ("huge", {"guidance_scale_range": [1, 10**400], "steps": True, "solver": "euler"}, "unknown", "unknown"),
        (
            "lines",
            {"guidance_scale_range": [True, 2], "steps": 8, "solver": "a\n\x1b"},
            "unknown",
            r"'a\n\x1b', 8 steps",
        ),
    ):
        tags = pair_tags(PairDataset([write_pairs(tmp_path / f"{name}.tar", meta=meta)]))
        assert tags["d2f.pairs_guidance"] == guidance and tags["d2f.pairs_solver"] == solver
        assert tags["d2f.recommended_guidance"] == "1.0" and recommended_steps(tags) == 2
    assert recommended_steps({}) == 4
