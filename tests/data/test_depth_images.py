"""Folders of images with depth: the layouts, valid pixels, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from d2f_fast.data.depth_images import DepthImages
from d2f_fast.errors import DatasetError


def write_image(path: Path, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def write_depth(path: Path, depth: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.asarray(depth, np.float32))
    else:
        Image.fromarray(np.asarray(depth, np.uint16)).save(path)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for name, value in (("b/2", 2.0), ("a", 1.0)):
        write_image(tmp_path / "rgb" / f"{name}.png")
        write_depth(tmp_path / "depth" / f"{name}.npy", np.full((3, 4), value))
    return tmp_path


def test_plain_folder_pairs_files_of_one_name(plain: Path) -> None:
    images = DepthImages(plain)
    assert (images.layout, len(images), images.scale) == ("plain", 2, None)
    assert [images[i].depth[0, 0] for i in range(2)] == [1.0, 2.0]
    sample = images[0]
    assert sample.image.size == (4, 3) and sample.image.getpixel((0, 0)) == (10, 20, 30)
    assert sample.valid.all() and sample.name == str(plain / "rgb/a.png")


def test_depth_that_is_not_finite_positive_and_in_range_is_invalid(plain: Path) -> None:
    depth = [[np.nan, np.inf, -np.inf, -1.0], [0.0, 0.5, 1.0, 10.0], [11.0, 2.0, 2.0, 2.0]]
    write_depth(plain / "depth/a.npy", depth)
    assert (~DepthImages(plain)[0].valid).sum() == 5
    valid = DepthImages(plain, least=1.0, most=10.0)[0].valid
    assert valid.tolist() == [[False] * 4, [False, False, True, True], [False, True, True, True]]


def test_scale_is_the_number_of_a_metre(plain: Path) -> None:
    for name in ("a", "b/2"):
        (plain / "depth" / f"{name}.npy").unlink()
        write_depth(plain / "depth" / f"{name}.png", np.full((3, 4), 1500))
    assert (DepthImages(plain, scale=1000)[1].depth == 1.5).all()
    with pytest.raises(DatasetError, match=r"a\.png holds whole numbers \(uint16\) of an unknown unit"):
        DepthImages(plain)[0]


def test_virtual_kitti_2_is_in_centimetres_up_to_80_metres(tmp_path: Path) -> None:
    for scene, camera in (("Scene01/clone", 0), ("Scene20/rain", 1)):
        frames = tmp_path / scene / "frames"
        write_image(frames / f"rgb/Camera_{camera}/rgb_00007.jpg")
        depth = [[65535, 8000, 8001, 150], [100, 100, 100, 100], [0, 100, 100, 100]]
        write_depth(frames / f"depth/Camera_{camera}/depth_00007.png", depth)
    images = DepthImages(tmp_path)
    assert (images.layout, len(images), images.scale, images.most) == ("vkitti2", 2, 100.0, 80.0)
    sample = images[1]
    assert "Scene20" in sample.name and sample.depth[0, 3] == 1.5
    assert sample.valid.tolist() == [[False, True, False, True], [True] * 4, [False, True, True, True]]
    (tmp_path / "Scene01/clone/frames/depth/Camera_0/depth_00007.png").unlink()
    with pytest.raises(DatasetError, match=r"rgb_00007\.jpg has no depth .*depth_00007\.png: unpack the depth, too"):
        DepthImages(tmp_path)


def test_distances_of_hypersim_become_plane_depth(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    views = tmp_path / "ai_001_002/images"
    write_image(views / "scene_cam_00_final_preview/frame.0003.tonemap.jpg", (64, 48))
    path = views / "scene_cam_00_geometry_hdf5/frame.0003.depth_meters.hdf5"
    with pytest.raises(DatasetError, match=r"tonemap\.jpg has no depth .*depth_meters\.hdf5: unpack the geometry"):
        DepthImages(tmp_path)
    path.parent.mkdir()
    x, y = np.arange(64) - 31.5, np.arange(48) - 23.5
    wall = 3 * np.sqrt(x**2 + y[:, None] ** 2 + (886.81 / 16) ** 2) / (886.81 / 16)
    wall[0, 0], wall[0, 1] = np.nan, 100.0
    with h5py.File(path, "w") as file:
        file["dataset"] = wall.astype(np.float32)
    images = DepthImages(tmp_path)
    assert (images.layout, len(images), images.most) == ("hypersim", 1, 65.0)
    sample = images[0]
    assert np.abs(sample.depth[sample.valid] - 3).max() <= 1e-5
    assert (~sample.valid).sum() == 2 and not sample.valid[0, :2].any()


def test_archives_of_marigold_are_read_as_its_code_reads_them(tmp_path: Path) -> None:
    # prs-eth/Marigold: data_split/vkitti_depth and data_split/hypersim_depth name the files, src/dataset the units.
    kitti, hypersim = tmp_path / "vkitti", tmp_path / "hypersim"
    write_image(kitti / "rgb/Scene02/clone/frames/rgb/Camera_0/rgb_00001.jpg")
    depth_of_kitti = kitti / "depth/Scene02/clone/frames/depth/Camera_0/depth_00001.png"
    write_depth(depth_of_kitti, np.full((3, 4), 250))
    write_image(hypersim / "ai_001_001/rgb_cam_00_fr0000.png")
    depth_of_hypersim = hypersim / "ai_001_001/depth_plane_cam_00_fr0000.png"
    write_depth(depth_of_hypersim, [[2500] * 4, [2500] * 4, [0, 65001, 2500, 2500]])
    images = DepthImages(kitti)
    assert (images.layout, len(images), images.most, images[0].depth[0, 0]) == ("vkitti2", 1, 80.0, 2.5)
    images = DepthImages(hypersim)
    assert (images.layout, len(images), images.most) == ("hypersim_planes", 1, 65.0)
    sample = images[0]
    assert (sample.depth[sample.valid] == 2.5).all()  # It is plane depth already.
    assert sample.valid.tolist() == [[True] * 4, [True] * 4, [False, False, True, True]]
    depth_of_kitti.unlink()
    depth_of_hypersim.unlink()
    for folder, cure in ((kitti, "unpack the depth, too"), (hypersim, "prepare the scene again")):
        with pytest.raises(DatasetError, match=cure):
            DepthImages(folder)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no depth": (lambda f: remove(f, "depth/a.npy"), r"1 of 2 files have no depth of the same name, such as .*a\.png"),
    "no image": (lambda f: remove(f, "rgb/a.png"), r"1 of 2 files have no image of the same name, such as .*a\.npy"),
    "two depths": (lambda f: write_depth(f / "depth/a.png", np.ones((3, 4))), "have one name: remove one of them"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_image_without_its_partner_is_refused(plain: Path, name: str) -> None:
    change, sentence = CHANGES[name]
    change(plain)
    with pytest.raises(DatasetError, match=sentence):
        DepthImages(plain)


def turned(folder: Path) -> None:
    image, exif = Image.new("RGB", (4, 3)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(folder / "rgb/a.png", exif=exif)


SAMPLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "size": (
        lambda f: write_depth(f / "depth/a.npy", np.ones((4, 3))),
        r"a\.png has 4x3 pixels and .*a\.npy 3x4: give both in the same size",
    ),
    "nothing valid": (
        lambda f: write_depth(f / "depth/a.npy", np.full((3, 4), np.nan)),
        r"a\.npy: no pixel has a depth between 0 and 50 m \(none is finite and positive\)",
    ),
    "out of range": (
        lambda f: write_depth(f / "depth/a.npy", np.full((3, 4), 60)),
        r"no pixel has a depth between 0 and 50 m \(they are around 60 m\): check its unit",
    ),
    "millimetres": (
        lambda f: write_depth(f / "depth/a.npy", np.full((3, 4), 2500)),
        r"half of the pixels are beyond 2500 m, and 1000 m is the most that can be right: check its unit",
    ),
    "turned": (turned, r"a\.png is turned by its EXIF entry, and its depth is not: save it upright"),
    "damaged": (lambda f: (f / "rgb/a.png").write_bytes(b"x"), r"a\.png does not decode"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_that_cannot_be_used_is_refused_when_it_is_read(plain: Path, name: str) -> None:
    change, sentence = SAMPLES[name]
    change(plain)
    images = DepthImages(plain, most=50.0)
    with pytest.raises(DatasetError, match=sentence) as caught:
        images[0]
    assert "\n" not in str(caught.value)
    assert images[1].valid.all()


def test_folder_of_no_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no images with depth: expected the sub-folders rgb and depth"):
        DepthImages(tmp_path)
    for name in ("rgb", "depth"):
        (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match="holds no images with depth"):
        DepthImages(tmp_path)
    with pytest.raises(DatasetError, match="is not a folder"):
        DepthImages(tmp_path / "missing")
