"""Data sets of the depth protocol, in files of their exact layouts: ranges, crops, regions, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from d2f_fast.data.depth_benchmarks import DepthBenchmark
from d2f_fast.data.depth_data import find_depth_images
from d2f_fast.data.depth_images import DepthImages
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.errors import DatasetError


def write_image(path: Path, size: tuple[int, int]) -> None:
    """Write an image whose red and green channels count the columns and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.arange(size[0]) % 256, np.arange(size[1]) % 256)
    Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)).save(path, compress_level=0)


def write_png(path: Path, stored: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(stored, np.uint16)).save(path, compress_level=0)


def in_range(depth: NDArray[np.float64], least: float, most: float) -> NDArray[np.bool_]:
    """Return the valid pixels as src/dataset/base_depth_dataset.py of the published code finds them."""
    tensor = torch.from_numpy(depth).float()
    return torch.logical_and(tensor > least, tensor < most).numpy()


def test_nyu_is_in_millimetres_below_10_metres_in_eigens_region(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 11000, (480, 640))
    stored[100, 100:105] = [0, 1, 2, 9999, 10000]
    write_image(tmp_path / "kitchen_0004/rgb_0001.png", (640, 480))
    write_png(tmp_path / "kitchen_0004/depth_0001.png", stored)
    write_png(tmp_path / "kitchen_0004/filled_0001.png", np.full((480, 640), 5000))
    images = find_depth_images(tmp_path, DepthOptions())
    assert isinstance(images, DepthBenchmark) and len(images) == 1
    assert (images.layout, images.least, images.most, images.scale) == ("nyu", 1e-3, 10.0, 1000.0)
    assert (images.processing_resolution, images.fit_side) == (0, None)
    sample = images[0]
    # src/dataset/nyu_dataset.py
    region = np.zeros((480, 640), bool)
    region[45:471, 41:601] = True
    assert np.array_equal(sample.depth, (stored / 1000.0).astype(np.float32))
    assert np.array_equal(sample.valid, in_range(stored / 1000.0, 1e-3, 10.0) & region)
    assert sample.valid[100, 100:105].tolist() == [False, False, True, True, False]
    nearer = find_depth_images(tmp_path, DepthOptions(depth_min=2.0, depth_max=5.0))[0]
    assert nearer.depth[nearer.valid].min() > 2 and nearer.depth[nearer.valid].max() < 5


def test_kitti_is_cropped_to_its_benchmark_and_compared_in_eigens_region(tmp_path: Path) -> None:
    folder, drive = tmp_path / "2011_09_26", "2011_09_26_drive_0002_sync"
    stored = np.random.default_rng(0).integers(0, 21000, (375, 1242))
    stored[::2] = 0  # no return of the laser
    write_png(tmp_path / drive / "proj_depth/groundtruth/image_02/0000000069.png", stored)
    for name in ("0000000054", "0000000069"):  # The split lists images without a depth, which are not compared.
        write_image(folder / drive / f"image_02/data/{name}.png", (1242, 375))
    images = find_depth_images(tmp_path, DepthOptions())
    assert (images.layout, len(images), images.least, images.most) == ("kitti", 1, 1e-5, 80.0)
    sample = images[0]
    # src/dataset/kitti_dataset.py
    top, left = (375 - 352), int((1242 - 1216) / 2)
    depth = (stored / 256.0)[top : top + 352, left : left + 1216]
    region = np.zeros((352, 1216), bool)
    region[int(0.3324324 * 352) : int(0.91351351 * 352), int(0.0359477 * 1216) : int(0.96405229 * 1216)] = True
    assert np.array_equal(sample.depth, depth.astype(np.float32))
    assert np.array_equal(sample.valid, in_range(depth, 1e-5, 80.0) & region)
    assert sample.image.size == (1216, 352) and sample.image.getpixel((0, 0)) == (left, top, 0)


def test_eth3d_is_raw_float32_of_any_finite_depth(tmp_path: Path) -> None:
    image = tmp_path / "rgb/office/images/dslr_images/DSC_0219.JPG"
    write_image(image, (6, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(image).save(image, exif=exif)  # Its depth is stored as the sensor is, too.
    raw = tmp_path / "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"
    raw.parent.mkdir(parents=True)
    depth = np.random.default_rng(0).uniform(1, 90, (4, 6)).astype("<f4")
    depth[0, :3], depth[1, 0] = np.inf, 0
    raw.write_bytes(depth.tobytes())
    images = find_depth_images(tmp_path, DepthOptions())
    assert (images.layout, images.least, images.most) == ("eth3d", 1e-5, np.inf)
    assert (images.processing_resolution, images.fit_side) == (760, 1024)
    sample = images[0]
    assert sample.image.size == (6, 4) and np.array_equal(sample.depth, depth)
    assert np.array_equal(sample.valid, np.isfinite(depth) & (depth > 0))
    raw.write_bytes(depth.tobytes()[:-4])
    with pytest.raises(DatasetError, match=r"DSC_0219\.JPG .*92 bytes, and 6x4 pixels of float32 take 96.*replace it"):
        images[0]


def test_scannet_is_in_millimetres_below_10_metres(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 2, 9999], [10000, 65535, 3000, 4000]])
    write_image(tmp_path / "scene0406_02/color/000300.jpg", (4, 2))
    write_png(tmp_path / "scene0406_02/depth/000300.png", stored)
    images = find_depth_images(tmp_path, DepthOptions())
    assert (images.layout, images.least, images.most, images.processing_resolution) == ("scannet", 1e-3, 10.0, 0)
    sample = images[0]
    assert np.array_equal(sample.depth, (stored / 1000.0).astype(np.float32))
    assert np.array_equal(sample.valid, in_range(stored / 1000.0, 1e-3, 10.0))


def test_diode_counts_the_pixels_of_its_mask(tmp_path: Path) -> None:
    depth = np.array([[0.5, 0.0, 2.0], [400.0, 3.0, np.nan]])
    mask = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    for half in ("indoors", "outdoor"):
        stem = tmp_path / half / "scene_00021/scan_00189" / f"00021_00189_{half}_200_010"
        write_image(stem.with_suffix(".png"), (3, 2))
        np.save(stem.with_name(f"{stem.name}_depth.npy"), depth[..., None])
        np.save(stem.with_name(f"{stem.name}_depth_mask.npy"), mask > 0 if half == "outdoor" else mask)
    images = find_depth_images(tmp_path, DepthOptions())
    assert (images.layout, len(images), images.least, images.most) == ("diode", 2, 0.6, 350.0)
    assert images.processing_resolution == 640
    for index in range(2):  # src/dataset/diode_dataset.py takes the mask alone; depth that is not positive is no depth.
        assert images[index].valid.tolist() == [[True, False, True], [True, False, False]]
    assert len(find_depth_images(tmp_path / "indoors", DepthOptions())) == 1
    limited = find_depth_images(tmp_path, DepthOptions(depth_min=1.0, depth_max=80.0))[0]
    assert limited.valid.tolist() == [[False, False, True], [False, False, False]]
    hashed = images.content(0, lambda path: path.name)
    assert hashed.split()[2] == "00021_00189_indoors_200_010_depth_mask.npy"


def nyu(folder: Path, size: tuple[int, int] = (640, 480), metres: float = 2.0) -> None:
    write_image(folder / "kitchen_0004/rgb_0001.png", size)
    write_png(folder / "kitchen_0004/depth_0001.png", np.full(size[::-1], metres * 1000))


def kitti(folder: Path) -> None:
    drive = "2011_09_26_drive_0002_sync"
    write_image(folder / f"2011_09_26/{drive}/image_02/data/0000000069.png", (1200, 375))
    write_png(folder / drive / "proj_depth/groundtruth/image_02/0000000069.png", np.full((375, 1200), 256))


def scannet(folder: Path) -> None:
    write_image(folder / "scene0406_02/color/000300.jpg", (8, 6))
    write_png(folder / "scene0406_02/depth/000300.png", np.full((3, 4), 1000))


def without_depth(folder: Path) -> None:
    write_image(folder / "scene0406_02/color/000300.jpg", (8, 6))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "resized": (
        lambda f: nyu(f, (320, 240)),
        r"rgb_0001\.png has 320x240 pixels, and the protocol of nyu needs",
    ),
    "too small": (kitti, r"0000000069\.png has 1200x375 pixels, and the protocol of kitti needs 1216x352: take the"),
    "sizes": (scannet, r"000300\.jpg has 8x6 pixels and .*000300\.png 4x3: give both in the same size"),
    "wrong unit": (
        lambda f: nyu(f, metres=30),
        r"depth_0001\.png: half of the pixels are beyond 30 m, and 20 m is",
    ),
    "too near": (lambda f: nyu(f, metres=0.1), r"half of the pixels are nearer than 0\.1 m, and 0\.3 m is the least"),
    "nothing valid": (lambda f: nyu(f, metres=0), r"depth_0001\.png: no pixel has a depth between 0\.001 and 10 m"),
    "no depth": (without_depth, r"000300\.jpg has no depth .*000300\.png: unpack the depth, too"),
    "all of NYUv2": (
        lambda f: nyu(f / "test"),
        r"holds more than the test images of NYUv2: give its sub-folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_image_that_does_not_fit_the_protocol_is_refused(tmp_path: Path, name: str) -> None:
    write, sentence = REFUSED[name]
    write(tmp_path)
    with pytest.raises(DatasetError, match=sentence) as caught:
        find_depth_images(tmp_path, DepthOptions())[0]
    assert "\n" not in str(caught.value)


def test_plain_folder_with_names_of_a_data_set_is_read_as_plain(tmp_path: Path) -> None:
    write_image(tmp_path / "rgb/rgb_0001.png", (4, 3))
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth/rgb_0001.npy", np.ones((3, 4)))
    assert isinstance(find_depth_images(tmp_path, DepthOptions()), DepthImages)
    with pytest.raises(DatasetError, match="has the layout of none of nyu, kitti, eth3d, scannet, diode: check"):
        DepthBenchmark(tmp_path)
