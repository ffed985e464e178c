"""Find the images of a folder and the depth of each, in a plain folder or in that of a known data set.

    plain              rgb/<name>.png    depth/<name>.png|.npy|.exr              metres, or a scale that is given
    Virtual KITTI 2    Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg           depth at most 80 m
                       Scene01/clone/frames/depth/Camera_0/depth_00000.png       centimetres, 16 bits
                       or rgb/Scene01/… and depth/Scene01/…
    Hypersim           ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg              at most 65 m
                       ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5        distances
                       or, as Marigold's script prepares it,
                       ai_001_001/rgb_cam_00_fr0000.png                          depth at most 65 m
                       ai_001_001/depth_plane_cam_00_fr0000.png                  millimetres, 16 bits, plane depth

No torch is imported before an image is read, so that `d2f train` refuses a folder at once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from d2f_fast.data.depth_source import DepthLayout, DepthSample, DepthSource, check_sizes, check_units
from d2f_fast.data.file_names import is_image
from d2f_fast.data.partner_files import check_partners, files_by_stem
from d2f_fast.errors import DatasetError, printable

EXPECTED_LAYOUTS = (
    "expected the sub-folders rgb and depth with files of the same names (rgb/a.png and depth/a.png, .npy or .exr), or"
    " the folders Scene01 … of Virtual KITTI 2, ai_001_001 … of Hypersim, shards *.tar with image.png and depth.npy, or"
    " the test images of NYUv2, KITTI, ETH3D, ScanNet or DIODE (docs/depth.md)"
)
_DEPTH_EXTENSIONS = (".png", ".npy", ".exr")  # those of `depth_files`, which imports torch

_PLAIN = DepthLayout("plain", None, np.inf, 1000.0)
_VKITTI2 = DepthLayout("vkitti2", 100.0, 80.0, 400.0, nearest=0.5)
_HYPERSIM = DepthLayout("hypersim", None, 65.0, 200.0, nearest=0.05)
_HYPERSIM_PLANES = DepthLayout("hypersim_planes", 1000.0, 65.0, 200.0, nearest=0.05)
_VKITTI2_IMAGES = "Scene[0-9][0-9]/*/frames/rgb/Camera_[01]/rgb_*.jpg"
_HYPERSIM_SCENE = "ai_[0-9][0-9][0-9]_[0-9][0-9][0-9]"


class DepthFiles(NamedTuple):
    """Files of one image."""

    image: Path
    depth: Path


class DepthImages(DepthSource):
    """Read images with their depth from a folder, whose layout is detected. An image is decoded only when asked for.

    See `DepthSource` for the arguments. A folder without a known layout is refused, and so is one in which an image or
    a depth has no partner.
    """

    def _find(self) -> DepthLayout:
        """Find the pairs of files, and return the layout; see `DepthSource`."""
        layout, find_files = _layout_of(self.place)
        self._files = list(find_files(self.place))
        if not self._files:
            raise DatasetError(f"{printable(self.place)} holds no images with depth: {EXPECTED_LAYOUTS}")
        return layout

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> DepthSample:
        from d2f_fast.data.depth_files import plane_depth_of_distance, read_depth  # They import torch.
        from d2f_fast.data.depth_normalization import valid_pixels
        from d2f_fast.data.images import is_turned, read_image, to_rgb
        from d2f_fast.data.loading import refused_sample

        files = self._files[index]
        name, depth_name = printable(files.image), printable(files.depth)
        with refused_sample(name):
            stored = read_image(files.image)
            if is_turned(stored):
                raise DatasetError(f"{name} is turned by its EXIF entry, and its depth is not: save it upright")
            image = to_rgb(stored)
        depth = read_depth(files.depth, self.scale)
        check_sizes(image, depth, name, depth_name)
        if self.layout == _HYPERSIM.name:
            depth = plane_depth_of_distance(depth)
        valid = valid_pixels(depth, self.least, self.most)
        check_units(depth, valid, depth_name, self)
        return DepthSample(image, depth, valid, name)

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return the hashes of the files of an image; see `DepthSource.content`."""
        return " ".join(map(hash_of_file, self._files[index]))


def _layout_of(folder: Path) -> tuple[DepthLayout, Callable[[Path], Iterator[DepthFiles]]]:
    """Return the layout of a folder, and the function that yields its files.

    Raises:
        DatasetError: It is not a folder, or has none of the layouts.
    """
    if not folder.is_dir():
        raise DatasetError(f"{printable(folder)} is not a folder: give a folder of images with depth")
    if (folder / "rgb").is_dir() and (folder / "depth").is_dir():
        if any((folder / "rgb").glob(_VKITTI2_IMAGES)):
            return _VKITTI2, _vkitti2_files
        return _PLAIN, _plain_files
    if any(path.is_dir() for path in folder.glob("Scene[0-9][0-9]")):
        return _VKITTI2, _vkitti2_files
    if any(folder.glob(f"{_HYPERSIM_SCENE}/rgb_cam_*.png")):
        return _HYPERSIM_PLANES, _hypersim_plane_files
    if any(path.is_dir() for path in folder.glob(_HYPERSIM_SCENE)):
        return _HYPERSIM, _hypersim_files
    raise DatasetError(f"{printable(folder)} holds no images with depth: {EXPECTED_LAYOUTS}")


def _plain_files(folder: Path) -> Iterator[DepthFiles]:
    """Yield the files of a plain folder, in the order of their names."""
    images = files_by_stem(folder / "rgb", is_image)
    depths = files_by_stem(folder / "depth", lambda name: name.lower().endswith(_DEPTH_EXTENSIONS))
    check_partners(folder, {"image": images, "depth": depths})
    for stem in sorted(images):
        yield DepthFiles(images[stem], depths[stem])


def _vkitti2_files(folder: Path) -> Iterator[DepthFiles]:
    """Yield the files of Virtual KITTI 2, in the order of their names."""
    apart = (folder / "rgb").is_dir()
    images, depths = (folder / "rgb", folder / "depth") if apart else (folder, folder)
    for image in sorted(images.glob(_VKITTI2_IMAGES)):
        frames = depths / image.relative_to(images).parents[2]
        depth = frames / "depth" / image.parent.name / f"depth_{image.stem.removeprefix('rgb_')}.png"
        if not depth.is_file():
            raise DatasetError(f"{printable(image)} has no depth {printable(depth)}: unpack the depth, too")
        yield DepthFiles(image, depth)


def _hypersim_files(folder: Path) -> Iterator[DepthFiles]:
    """Yield the files of Hypersim, in the order of their names."""
    views = f"{_HYPERSIM_SCENE}/images/scene_cam_*_final_preview/frame.*.tonemap.jpg"
    for image in sorted(folder.glob(views)):
        geometry = image.parent.name.replace("final_preview", "geometry_hdf5")
        depth = image.parents[1] / geometry / image.name.replace("tonemap.jpg", "depth_meters.hdf5")
        if not depth.is_file():
            raise DatasetError(f"{printable(image)} has no depth {printable(depth)}: unpack the geometry, too")
        yield DepthFiles(image, depth)


def _hypersim_plane_files(folder: Path) -> Iterator[DepthFiles]:
    """Yield the files of Hypersim as Marigold's script prepares it, in the order of their names."""
    for image in sorted(folder.glob(f"{_HYPERSIM_SCENE}/rgb_cam_*.png")):
        depth = image.with_name(image.name.replace("rgb_cam", "depth_plane_cam"))
        if not depth.is_file():
            raise DatasetError(f"{printable(image)} has no depth {printable(depth)}: prepare the scene again")
        yield DepthFiles(image, depth)
