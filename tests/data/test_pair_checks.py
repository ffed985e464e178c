"""Pairs compared with the configuration of the model; test_pair_encoding.py compares them with the model itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.data.pair_checks import check_pairs_fit, check_pairs_of_run, options_for_pairs
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError
from d2f_fast.models.configs import read_configs
from d2f_fast.models.options import ModelOptions

Write = Callable[..., Path]


def test_open_options_are_settled_by_the_pairs(write_pairs: Write, tmp_path: Path) -> None:
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", meta={"height": 24, "width": 16})])
    settled = options_for_pairs(TrainingConfig(), dataset)
    assert settled.caption_dropout == 0 and settled.resolution == (24, 16)
    given = options_for_pairs(TrainingConfig(caption_dropout=0.2, resolution=32), dataset)
    assert given.caption_dropout == 0.2 and given.resolution == 32
    assert options_for_pairs(TrainingConfig(), PairDataset([write_pairs(tmp_path / "1.tar")])).resolution is None
    for side in (True, 0, 10**100, 16.0, "16"):
        odd = PairDataset([write_pairs(tmp_path / "2.tar", meta={"height": side, "width": side})])
        assert options_for_pairs(TrainingConfig(), odd).resolution is None


def test_pairs_are_compared_with_the_configuration(write_pairs: Write, tiny_folder: Path, tmp_path: Path) -> None:
    configs = read_configs(str(tiny_folder), ModelOptions())
    assert configs is not None
    good = PairDataset([write_pairs(tmp_path / "0.tar")])
    large = PairDataset([write_pairs(tmp_path / "1.tar", shape=(4, 16, 16))])
    odd = PairDataset([write_pairs(tmp_path / "3.tar", shape=(4, 8, 9))])
    scaled = PairDataset([write_pairs(tmp_path / "2.tar", change=lambda r: r._replace(latents=r.latents * 5))])
    late = write_pairs(tmp_path / "4.tar", change=lambda r: r._replace(latents=r.latents * 20))
    later = PairDataset([good.shards[0].path, late])
    check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, None, good, None)
    # The size at which the model was trained counts before that of its network.
    check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, 32, large, None)
    with pytest.raises(DatasetError, match="shorter side is 16 pixels, and the resolution is 32"):
        check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, 32, good, None)
    for datasets, config, sentence in (
        ((large, None), TrainingConfig(), "shorter side is 32 pixels, and the resolution is 16"),
        ((odd, None), TrainingConfig(resolution=16), "has images of 16 x 18 pixels, and no others than multiples of 8"),
        ((good, large), TrainingConfig(), "1.tar has images whose shorter side is 32 pixels"),
        ((object(), large), TrainingConfig(resolution=24), "and the resolution is 24: give --resolution 32"),
        ((scaled,), TrainingConfig(), "with its scaling factor of 0.5: store latents in the scale"),
        ((later,), TrainingConfig(), r"4\.tar: the latents have a deviation of 19\.\d, and those of the model about 1"),
    ):
        with pytest.raises(DatasetError, match=sentence):
            check_pairs_of_run(config, ModelOptions(), configs, None, *datasets)
    # The scale of another autoencoder is not known before it is loaded.
    check_pairs_of_run(TrainingConfig(), ModelOptions(pretrained_vae_model_name_or_path="other"), configs, None, scaled)
    check_pairs_of_run(TrainingConfig(), ModelOptions(vae_custom_scale=0.03), configs, None, scaled)


def test_shards_of_two_models_are_refused_unless_they_are_meant(
    write_pairs: Write, tiny_folder: Path, tmp_path: Path
) -> None:
    paths = [write_pairs(tmp_path / f"{name}.tar", meta={"model": name * 16}) for name in "ab"]
    configs = read_configs(str(tiny_folder), ModelOptions())
    assert configs is not None
    with pytest.raises(DatasetError, match=r"b.tar was made with another model \(b{16}\) than .*a.tar \(a{16}\): give"):
        check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, None, PairDataset(paths))
    meant = PairDataset(paths, of_another_model=True)
    check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, None, meant)
    metas = iter([{"model": "a"}] * 5 + [{"model": "b"}])
    mixed = PairDataset([write_pairs(tmp_path / "c.tar", change=lambda pair: pair._replace(meta=next(metas)))])
    with pytest.raises(DatasetError, match=r"c\.tar has pairs made with another model \(b\) than its first ones \(a\)"):
        check_pairs_of_run(TrainingConfig(), ModelOptions(), configs, None, mixed)


def test_size_of_oblong_pairs_is_compared(write_pairs: Write, tmp_path: Path) -> None:
    meta = {"height": 16, "width": 24}
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", shape=(4, 8, 12), meta=meta)])
    assert options_for_pairs(TrainingConfig(), dataset).resolution == (16, 24)
    for resolution in (16, (16, 24)):
        check_pairs_fit(dataset, 4, 2, None, resolution)
    with pytest.raises(DatasetError, match="has images of 16 x 24 pixels, and the resolution is 24 x 16: give --resol"):
        check_pairs_fit(dataset, 4, 2, None, (24, 16))
