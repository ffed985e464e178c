"""Depth files: formats, units, and files that are refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.depth_files import plane_depth_of_distance, read_depth
from d2f_fast.errors import DatasetError

STORED = np.array([[0, 1, 1500], [65535, 256, 3]], np.uint16)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.fromarray(STORED).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_png_of_16_bits_is_divided_by_its_scale(png: Path) -> None:
    for scale in (1000.0, 256.0):
        assert np.array_equal(read_depth(png, scale), (STORED / scale).astype(np.float32))


def test_png_of_8_bits_is_read_with_a_scale(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png", 51.0).tolist() == [[0.0, 5.0]]
    with pytest.raises(DatasetError, match=r"a\.png holds whole numbers \(uint8\) of an unknown unit: give --depth_sc"):
        read_depth(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 3, 1)])
def test_array_in_metres_is_read_as_it_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    depth = np.array([[np.nan, 0.0, -1.0], [2.5, np.inf, 1e9]])
    np.save(tmp_path / "a.npy", depth.reshape(shape))
    assert np.array_equal(read_depth(tmp_path / "a.npy"), depth.astype(np.float32), equal_nan=True)
    assert read_depth(tmp_path / "a.npy", 100.0)[1, 0] == np.float32(0.025)


def test_exr_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    OpenEXR = pytest.importorskip("OpenEXR")
    depth = np.array([[1.5, np.inf], [0.25, 2.0]], np.float32)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Z": depth}).write(str(tmp_path / "a.exr"))
    assert np.array_equal(read_depth(tmp_path / "a.exr"), depth)
    OpenEXR.File(header, {"blue": depth}).write(str(tmp_path / "b.exr"))
    with pytest.raises(DatasetError, match="it has the channels blue, and none of Z"):
        read_depth(tmp_path / "b.exr")


def test_hdf5_of_hypersim_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    depth = np.array([[1.5, np.nan], [0.25, 2.0]], np.float16)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["dataset"] = depth
    assert np.array_equal(read_depth(tmp_path / "a.hdf5"), depth.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(("name", "package"), [("a.exr", "OpenEXR"), ("a.hdf5", "h5py")])
def test_format_without_its_package_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=f"{name} needs the package {package}: pip install {package}, which"):
        read_depth(tmp_path / name)


def test_distance_of_hypersim_becomes_plane_depth_as_in_the_published_code() -> None:
    # diff2flow/dataset/depth_preprocessing.py, distance_to_planar_depth
    height, width, focal = 768, 1024, 886.81
    x = np.linspace((-0.5 * width) + 0.5, (0.5 * width) - 0.5, width).reshape(1, width).repeat(height, 0)
    y = np.linspace((-0.5 * height) + 0.5, (0.5 * height) - 0.5, height).reshape(height, 1).repeat(width, 1)
    rays = np.stack([x, y, np.full((height, width), focal)], axis=2)
    distance = np.random.default_rng(0).uniform(1, 9, (height, width))
    depth = plane_depth_of_distance(distance)
    assert np.abs(depth - distance / np.linalg.norm(rays, 2, 2) * focal).max() <= 1e-6
    # A wall that faces the camera is as far away in an image of half the size.
    wall = np.linalg.norm(rays, 2, 2) / focal * 3.0
    half = wall.reshape(384, 2, 512, 2).mean(axis=(1, 3))
    assert np.abs(plane_depth_of_distance(half) - 3.0).max() <= 1e-5


def test_unreadable_depth_is_refused_in_one_line(tmp_path: Path, png: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:40])
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "cube.npy", np.zeros((2, 3, 4)))
    (tmp_path / "a.tiff").write_bytes(b"")
    sentences = {
        "rgb.png": "mode RGB, and a depth map has one channel",
        "cut.png": "does not decode",
        "text.npy": "cannot be read as a depth map",
        "objects.npy": "cannot be read as a depth map",
        "words.npy": "no array of real numbers",
        "cube.npy": r"its shape is \[2, 3, 4\], and a depth map has \[height, width\]",
        "a.tiff": "is not a depth map",
        "missing.npy": "missing.npy cannot be read",
    }
    for name, sentence in sentences.items():
        with pytest.raises(DatasetError, match=sentence) as caught:
            read_depth(tmp_path / name, 1000.0)
        assert name in str(caught.value) and "\n" not in str(caught.value)
