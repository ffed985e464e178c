"""Batches of a run over images and over pairs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.data.order import Mixture
from d2f_fast.data.pairs import PairDataset
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.batches import data_settings, encoded_batches


@pytest.mark.parametrize("kind", ["images", "pairs"])
def test_batches_that_are_left_are_those_of_the_whole_run(
    kind: str, images: Any, tiny_folder: Path, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = images(5) if kind == "images" else PairDataset([write_pairs(tmp_path / "0.tar", 5)])
    model = BaseModel.load(tiny_folder)
    config = TrainingConfig(output_dir=str(tmp_path / "run"), resolution=16, max_train_steps=4, train_batch_size=2)

    alone = SimpleNamespace(num_processes=1, process_index=0)

    def batches(step: int) -> list[Any]:
        return list(encoded_batches(dataset, model, config, model.fingerprints(), alone, step))

    whole, left = batches(0), batches(1)
    assert len(whole) == 4 and len(left) == 3 and batches(4) == []
    for expected, batch in zip(whole[1:], left, strict=True):
        assert all(torch.equal(batch[name], value) for name, value in expected.items() if torch.is_tensor(value))
    assert ("noise" in whole[0]) == (kind == "pairs")


@pytest.mark.parametrize(
    ("weights", "named"), [((3.0, 5.0), "the sizes of 2 data sets"), ((9.0, 1.0), "9.0, 1.0"), (None, None)]
)
def test_continuation_must_have_the_weights_of_the_run(weights: Any, named: str | None, images: Any) -> None:
    dataset = images(2)
    if weights is not None:
        dataset.mixture = Mixture((3, 5), weights)
    assert data_settings(dataset) == ({} if named is None else {"dataset_weights": named})
