"""Batches of pairs, and pairs that do not fit the model."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.data.order import BatchPlan, batch_indices, plan_batches
from d2f_fast.data.pair_encoding import PairEncoder, check_pairs
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError
from d2f_fast.models.base_model import BaseModel

Write = Callable[..., Path]
COUNT, BATCH_SIZE = 7, 3


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    return BaseModel.load(tiny_folder)


@pytest.fixture
def encoder(model: BaseModel, write_pairs: Write, tmp_path: Path) -> PairEncoder:
    """Return the encoder of seven pairs in two shards."""
    write_pairs(tmp_path / "pairs" / "0.tar", 4)
    write_pairs(tmp_path / "pairs" / "1.tar", 3)
    config = TrainingConfig(output_dir=str(tmp_path / "run"), resolution=16)
    return PairEncoder(model, config, PairDataset([tmp_path / "pairs"]), model.fingerprints())


def test_batch_holds_noise_latents_and_encoded_prompts_in_the_seeded_order(
    encoder: PairEncoder, model: BaseModel, tmp_path: Path
) -> None:
    dataset = PairDataset([tmp_path / "pairs"])
    for step, plan in enumerate(islice(plan_batches(COUNT, BATCH_SIZE, seed=5), 4)):
        batch = encoder.encode(plan, encoder.load(plan))
        pairs = [dataset[index] for index in batch_indices(COUNT, BATCH_SIZE, 5, step)[1]]
        assert batch["global_batch_size"] == len(pairs) and batch["offset"] == 0
        for i, pair in enumerate(pairs):
            assert np.array_equal(batch["latents"][i].numpy(), pair.latents.astype("f4"))
            assert np.array_equal(batch["noise"][i].numpy(), pair.noise.astype("f4"))
            text = model.encode_prompts([pair.prompt])["encoder_hidden_states"][0]
            assert torch.equal(batch["encoder_hidden_states"][i], text)
        assert batch["latents"].dtype == batch["noise"].dtype == torch.float32


def test_slices_of_two_processes_are_the_batch_of_one(encoder: PairEncoder) -> None:
    whole = islice(plan_batches(COUNT, BATCH_SIZE, seed=5), 4)
    parts = [islice(plan_batches(COUNT, BATCH_SIZE, seed=5, rank=rank, world_size=2), 4) for rank in (0, 1)]
    for plan, first, second in zip(whole, *parts, strict=True):
        one, *two = (encoder.encode(each, encoder.load(each)) for each in (plan, first, second))
        for name in ("latents", "noise"):
            joined = torch.cat([batch[name] for batch in two if len(batch["latents"])])  # type: ignore[literal-required]
            assert torch.equal(joined, one[name])  # type: ignore[literal-required]
    # The last batch of the epoch has one pair, and none for the second process.
    empty = BatchPlan(0, [], [], 1, 1)
    assert len(encoder.encode(empty, encoder.load(empty))["latents"]) == 0


def test_prompts_are_encoded_once_and_then_read_from_the_cache(
    encoder: PairEncoder, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BatchPlan(0, [0, 1, 4], [], 3, 0)  # The prompts a, b, a.
    encoded: list[str] = []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: encoded.extend(prompts) or encode(prompts))
    first = encoder.encode(plan, encoder.load(plan))
    assert encoded == ["a", "b"]
    second = encoder.encode(plan, encoder.load(plan))
    assert encoded == ["a", "b"]
    assert torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])


def test_sdxl_gets_the_size_of_the_pairs(tiny_xl: Any, write_pairs: Write, tmp_path: Path) -> None:
    model = BaseModel(tiny_xl)
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", 2, (4, 8, 12))])
    config = TrainingConfig(output_dir=str(tmp_path / "run"), resolution=16)
    encoder, plan = PairEncoder(model, config, dataset, model.fingerprints()), BatchPlan(0, [1], [], 1, 0)
    added = encoder.encode(plan, encoder.load(plan))["added_cond_kwargs"]
    assert added is not None and added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]


@pytest.mark.parametrize("number", [1e100, -1e38])
def test_number_whose_square_overflows_is_refused(
    number: float, model: BaseModel, write_pairs: Write, tmp_path: Path
) -> None:
    def enlarge(pair: Any) -> Any:
        large = np.where(pair.latents == pair.latents.max(), number, pair.latents)
        return pair._replace(latents=large if pair.key == "0001" else pair.latents)

    dataset = PairDataset([write_pairs(tmp_path / "0.tar", 70, dtype="float64")])
    config = TrainingConfig(output_dir=str(tmp_path / "run"), resolution=16)
    encoder = PairEncoder(model, config, dataset, model.fingerprints())
    write_pairs(tmp_path / "0.tar", 70, dtype="float64", change=enlarge)
    with pytest.raises(DatasetError, match=r"0\.tar: pair 0001 holds NaN, infinity, or a number beyond 65504"):
        encoder.load(BatchPlan(0, [0, 1], [], 1, 0))


def test_pair_that_is_not_finite_is_refused(encoder: PairEncoder, tmp_path: Path) -> None:
    path = tmp_path / "pairs" / "1.tar"
    content = bytearray(path.read_bytes())
    start = encoder._dataset.shards[1]._rows[0][0]
    content[start : start + 2] = np.float16("nan").tobytes()
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"1\.tar: pair 1000 holds NaN, infinity, or a number"):
        encoder.load(BatchPlan(0, [0, 4, 5], [], 1, 0))


def test_shard_that_is_cut_after_the_start_is_refused(encoder: PairEncoder, tmp_path: Path) -> None:
    path = tmp_path / "pairs" / "1.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"1\.tar is cut short"):
        encoder.load(BatchPlan(0, [6], [], 1, 0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": (16, 8, 8)}, "0.tar has latents of 16 channels, and the model takes 4: train the model that made"),
        ({"shape": (4, 16, 20)}, "shorter side is 32 pixels, and the resolution is 16: give --resolution 32"),
        (
            {"change": lambda r: r._replace(latents=r.latents * 5)},
            "deviation of 5.02, and those of the model about 1",
        ),
        (
            {"change": lambda r: r._replace(latents=r.latents / 5)},
            "scaling factor of 0.5: store latents in the scale",
        ),
        ({"meta": {"model": "0" * 16}}, "was made with another model (0000000000000000) than the one that is trained"),
        ({"meta": {"vae": "0" * 16}}, "was made with another autoencoder (0000000000000000) than the one that"),
        ({"meta": {"text_encoders": "0"}}, "was made with another text encoder (0) than the one that is trained"),
    ],
    ids=["channels", "size", "unscaled", "scaled twice", "model", "autoencoder", "text encoder"],
)
def test_pairs_of_another_model_or_scale_are_refused(
    options: dict[str, Any], sentence: str, model: BaseModel, write_pairs: Write, tmp_path: Path
) -> None:
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", 64, **options)])
    with pytest.raises(DatasetError) as caught:
        check_pairs(dataset, model, model.fingerprints(), 16)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [1.0, 1 / 0.18215, 0.18215])
def test_scale_of_stable_diffusion_is_told_from_unscaled_latents(
    factor: float, tiny_folder: Path, write_pairs: Write, tmp_path: Path
) -> None:
    model = BaseModel.load(tiny_folder)
    model.vae.register_to_config(scaling_factor=0.18215)
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", change=lambda r: r._replace(latents=r.latents * factor))])
    if factor == 1:
        check_pairs(dataset, model, model.fingerprints(), 16)
        return
    with pytest.raises(DatasetError, match=r"with its scaling factor of 0\.18215"):
        check_pairs(dataset, model, model.fingerprints(), 16)


def test_pairs_of_another_model_are_accepted_where_they_are_meant(
    model: BaseModel, write_pairs: Write, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "0.tar", meta={"model": "0" * 16, "vae": "1" * 16})
    check_pairs(PairDataset([path], of_another_model=True), model, model.fingerprints(), 16)
    own = model.fingerprints()
    path = write_pairs(tmp_path / "1.tar", meta={"model": own["unet"], "vae": own["vae"]})
    check_pairs(PairDataset([path]), model, own, 16)
