"""The loss on held-out samples: its value in each segment, and training that it leaves as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.data.pairs import PairDataset
from d2f_fast.training.trainer import AlignedTrainer
from d2f_fast.training.validation import MOST_SAMPLES, SEGMENTS


def rows_of(trainer: AlignedTrainer) -> list[dict[str, Any]]:
    """Return the rows of the log that hold a loss on held-out samples."""
    lines = (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "validation_loss" in row]


@pytest.mark.parametrize("options", [{}, {"objective": "diffusion", "adapter": "full"}, {"objective": "fm"}], ids=str)
def test_losses_are_the_means_over_segments_of_time(images: Any, make_trainer: Any, options: dict[str, Any]) -> None:
    trainer = make_trainer(validation_steps=3, train_batch_size=4, **options)
    result = trainer.fit(images(), images(5))
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [0, 3, 6, 7] and result["validation_losses"] == rows[-1]["by_time"]
    assert len({row["validation_loss"] for row in rows}) == 4
    sums = torch.zeros(SEGMENTS, dtype=torch.float64)
    with trainer.averaged(), torch.no_grad():
        for part in trainer._validation._inputs:
            assert ((part.t >= 0) & (part.t < 1)).all()
            for segment in range(SEGMENTS):
                t = (segment + part.t) / SEGMENTS
                sample, timestep = trainer.objective.inputs(part.latents, part.noise, t)
                output = trainer.unet(sample, timestep, part.condition["encoder_hidden_states"]).sample
                loss = trainer.objective.loss(output, part.latents, part.noise, t, reduction="none")
                sums[segment] += loss.double().sum()
    assert rows[-1]["by_time"] == pytest.approx((sums / 5).tolist(), rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx((sums / 5).mean().item(), rel=1e-5)


def test_training_is_the_same_bit_for_bit_and_resumes_with_the_same_losses(
    images: Any, make_trainer: Any, state_of: Any, assert_equal: Any, logged_losses: Any
) -> None:
    options = {"train_batch_size": 4, "random_flip": True, "caption_dropout": 0.3}
    plain = make_trainer("plain", **options)
    assert "validation_losses" not in plain.fit(images())
    watched = make_trainer("watched", validation_steps=2, **options)
    watched.fit(images(), images(6))
    assert_equal(state_of(watched), state_of(plain))
    make_trainer("resumed", validation_steps=2, max_train_steps=4, **options).fit(images(), images(6))
    resumed = make_trainer("resumed", validation_steps=2, resume_from_checkpoint="latest", **options)
    resumed.fit(images(), images(6))
    assert_equal(state_of(resumed), state_of(plain))
    assert rows_of(resumed) == rows_of(watched) and [row["step"] for row in rows_of(watched)] == [0, 2, 4, 6, 7]


def test_held_out_pairs_keep_their_noise_and_few_are_used_of_many(
    write_pairs: Any, make_trainer: Any, tmp_path: Path
) -> None:
    held_out = PairDataset([write_pairs(tmp_path / "held-out.tar", 2 * MOST_SAMPLES)])
    trainer = make_trainer(max_train_steps=1, validation_steps=5, checkpointing_steps=0, train_batch_size=32)
    trainer.fit(PairDataset([write_pairs(tmp_path / "0.tar", 6)]), held_out)
    inputs = trainer._validation._inputs
    assert [len(part.latents) for part in inputs] == [32, 32]
    for position in (0, 1, 63):
        pair = held_out[2 * position]
        part = inputs[position // 32]
        assert torch.equal(part.noise[position % 32], torch.from_numpy(pair.noise.astype("float32")))
        assert torch.equal(part.latents[position % 32], torch.from_numpy(pair.latents.astype("float32")))
    assert [row["step"] for row in rows_of(trainer)] == [0, 1]
