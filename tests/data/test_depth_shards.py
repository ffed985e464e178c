"""Shards of the published code: keys, data sets and masks, and what is refused."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.depth_files import plane_depth_of_distance
from d2f_fast.data.depth_shards import DepthShards
from d2f_fast.errors import DatasetError

Members = Mapping[str, bytes]


def npy(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, samples: Mapping[str, Members]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


DEPTH = np.linspace(1.0, 6.0, 12, dtype=np.float32).reshape(3, 4)
SAMPLE: dict[str, bytes] = {
    "image.png": png(),
    "image_latent.npy": npy(np.zeros((4, 1, 1))),
    "depth.npy": npy(DEPTH),
    "depth_latent.npy": npy(np.zeros((4, 1, 1))),
}


def test_published_keys_are_read_and_others_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "000000.tar", {"a": SAMPLE, "b": SAMPLE | {"dataset": b"vkitti2", "normal_cam.npy": b"x"}})
    write(tmp_path / "000001.tar", {"c": SAMPLE | {"dataset": b"diode"}})
    shards = DepthShards(tmp_path)
    assert (len(shards), shards.layout, shards.most) == (3, "shards", 120.0)
    assert np.array_equal(shards[0].depth, plane_depth_of_distance(DEPTH))  # distances, as no entry means Hypersim
    assert np.array_equal(shards[1].depth, DEPTH) and np.array_equal(shards[2].depth, DEPTH)
    assert shards[1].image.getpixel((0, 0)) == (10, 20, 30) and shards[1].valid.all()
    assert shards[2].name.endswith("000001.tar: c")


def test_mask_and_range_decide_which_pixels_count(tmp_path: Path) -> None:
    depth = DEPTH.copy()
    depth[0] = [np.nan, 0.05, 121.0, 0.0]
    mask = np.ones((1, 3, 4), np.uint8)
    mask[0, 1, 1] = 0
    for name, kind in (("a", b"vkitti2"), ("b", b"diode")):
        write(
            tmp_path / f"{name}.tar",
            {name: SAMPLE | {"depth.npy": npy(depth), "valid_mask.npy": npy(mask), "dataset": kind}},
        )
    shards = DepthShards(tmp_path)
    for index, near in ((0, True), (1, False)):
        assert shards[index].valid.tolist() == [[False, near, False, False], [True, False, True, True], [True] * 4]
    assert DepthShards(tmp_path, most=3.0)[0].valid.sum() < shards[0].valid.sum()


def test_content_changes_with_the_image_and_its_depth(tmp_path: Path) -> None:
    samples = {
        "a": SAMPLE,
        "b": SAMPLE,
        "c": SAMPLE | {"depth.npy": npy(DEPTH + 1)},
        "d": SAMPLE | {"dataset": b"diode"},
    }
    write(tmp_path / "0.tar", samples)
    shards = DepthShards(tmp_path)
    contents = [shards.content(index, lambda path: "") for index in range(4)]
    assert contents[0] == contents[1] and len(set(contents)) == 3


CHANGES: dict[str, tuple[Members, str]] = {
    "no depth": ({"image.png": png()}, r"a has no depth\.npy: each sample needs image\.png and depth\.npy"),
    "size": (SAMPLE | {"image.png": png((3, 3))}, r"has 3x3 pixels and depth\.npy 4x3: give both in the same size"),
    "data set": (SAMPLE | {"dataset": b"moon"}, "the data set moon is unknown: give hypersim, vkitti2, diode"),
    "image": (SAMPLE | {"image.png": b"x"}, "0.tar: a"),
    "shape": (SAMPLE | {"depth.npy": npy(np.zeros((2, 3, 4)))}, "a depth map has"),
    "objects": (SAMPLE | {"depth.npy": b"\x93NUMPY"}, "0.tar: a"),
    "unit": (SAMPLE | {"depth.npy": npy(DEPTH * 1000), "dataset": b"diode"}, "half of the pixels are beyond 3500 m"),
    "mask": (SAMPLE | {"valid_mask.npy": npy(np.ones((2, 2)))}, r"valid_mask\.npy has the shape \[2, 2\]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sample_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    members, sentence = CHANGES[name]
    write(tmp_path / "0.tar", {"a": members})
    with pytest.raises(DatasetError, match=sentence) as caught:
        _ = DepthShards(tmp_path)[0]
    assert "\n" not in str(caught.value)


def test_shards_without_depth_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"a": {"prompt.txt": b"x"}})
    with pytest.raises(DatasetError, match=r"holds no shards with image\.png and depth\.npy: check the folder"):
        DepthShards(tmp_path)
