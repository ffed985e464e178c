"""Find and read the test images of NYUv2, KITTI, ETH3D, ScanNet and DIODE as Marigold's evaluation does.

    nyu        <scene>/rgb_0001.png    depth_0001.png                                         millimetres, 16 bits
    kitti      2011_09_26/<drive>/image_02/data/0000000069.png
               <drive>/proj_depth/groundtruth/image_02/0000000069.png                         1/256 m, 16 bits
    eth3d      rgb/<scene>/images/dslr_images/DSC_0219.JPG
               depth/<scene>_dslr_depth/<scene>/ground_truth_depth/dslr_images/DSC_0219.JPG   metres, float32, no header
    scannet    <scene>/color/000300.jpg    <scene>/depth/000300.png                           millimetres, 16 bits
    diode      indoors/<scene>/<scan>/<name>.png    <name>_depth.npy    <name>_depth_mask.npy          metres

These are the folders that Marigold's archives unpack to. A pixel counts where its depth is above the smallest and below
the largest one of the data set, and in the region that is compared; in DIODE, where the mask says so. Images are read
as they are stored, also where their EXIF entry turns them, because their depth is stored the same way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2f_fast.data.depth_source import DepthLayout, DepthSample, DepthSource, check_sizes, check_units
from d2f_fast.errors import DatasetError, printable

if TYPE_CHECKING:
    from PIL import Image

_SCENE = "scene[0-9][0-9][0-9][0-9]_[0-9][0-9]"
_DRIVE = "[0-9][0-9][0-9][0-9]_[0-9][0-9]_[0-9][0-9]/*_drive_*_sync"


class _Files(NamedTuple):
    """Files of one image."""

    image: Path
    depth: Path
    mask: Path | None = None


@dataclass(frozen=True)
class _Benchmark(DepthLayout):
    """A data set of the protocol.

    Attributes:
        find: Function that yields the files of the images in a folder, in the order of their names.
        size: Width and height of the compared images; None for those of the files.
        cropped: Whether larger images are cropped to that size, at the bottom and in the middle.
        region: Rows and columns that count; None for all.
    """

    find: Callable[[Path], Iterator[_Files]] = lambda folder: iter(())
    size: tuple[int, int] | None = None
    cropped: bool = False
    region: tuple[slice, slice] | None = None


class DepthBenchmark(DepthSource):
    """Read the images of a data set of the protocol with their depth. See `DepthSource` for the arguments.

    `least` and `most` narrow the range of the data set. An image without its depth is refused, but for KITTI, whose
    split has 45 such images.
    """

    def _find(self) -> DepthLayout:
        """Find the files, and return the layout; see `DepthSource`."""
        self._benchmark, self._files = _found(self.place)
        return self._benchmark

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> DepthSample:
        from d2f_fast.data.depth_files import read_depth, read_float32  # They import torch.
        from d2f_fast.data.images import read_image
        from d2f_fast.data.loading import refused_sample

        files = self._files[index]
        name, depth_name = printable(files.image), printable(files.depth)
        with refused_sample(name):
            image: Image.Image = read_image(files.image).convert("RGB")
        if files.depth.suffix == files.image.suffix == ".JPG":
            depth = read_float32(files.depth, image.size)
        else:
            depth = read_depth(files.depth, self.scale)
        check_sizes(image, depth, name, depth_name)
        image, depth = self._cropped(image, depth, name)
        mask = None if files.mask is None else read_depth(files.mask, 1.0) > 0
        if mask is not None and mask.shape != depth.shape:
            raise DatasetError(f"{printable(files.mask)} has another size than {depth_name}: unpack both again")
        valid = self._valid(depth, mask)
        check_units(depth, valid, depth_name, self)
        return DepthSample(image, depth, valid, name)

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return the hashes of the files of an image; see `DepthSource.content`."""
        return " ".join(hash_of_file(path) for path in self._files[index] if path is not None)

    def _cropped(
        self, image: "Image.Image", depth: NDArray[np.float32], name: str
    ) -> tuple["Image.Image", NDArray[np.float32]]:
        """Return what is compared of an image and its depth.

        Raises:
            DatasetError: The image has not the size of the data set.
        """
        size = self._benchmark.size
        if size is None or image.size == size:
            return image, depth
        if not self._benchmark.cropped or image.width < size[0] or image.height < size[1]:
            raise DatasetError(
                f"{name} has {image.width}x{image.height} pixels, and the protocol of {self.layout} needs"
                f" {size[0]}x{size[1]}: take the images in their own size"
            )
        left, top = (image.width - size[0]) // 2, image.height - size[1]
        box = (left, top, left + size[0], top + size[1])
        return image.crop(box), depth[box[1] : box[3], box[0] : box[2]]

    def _valid(self, depth: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """Return which pixels count. A mask takes the place of the range of the data set."""
        own = self._benchmark
        least = 0.0 if mask is not None and self.least <= own.least else self.least
        most = np.inf if mask is not None and self.most >= own.most else self.most
        with np.errstate(invalid="ignore"):
            valid = np.isfinite(depth) & (depth > least) & (depth < most)
        if own.region is not None:
            inside = np.zeros_like(valid)
            inside[own.region] = True
            valid &= inside
        return valid if mask is None else valid & mask


def is_benchmark(folder: Path) -> bool:
    """Return whether a folder has the layout of a data set of the protocol.

    Args:
        folder: Folder of images with their depth.

    Raises:
        DatasetError: It holds both splits of NYUv2.
    """
    if next(_nyu_files(folder / "test"), None) is not None:
        cure = f"give its sub-folder {printable(folder / 'test')}"
        raise DatasetError(f"{printable(folder)} holds more than the test images of NYUv2: {cure}")
    return any(next(benchmark.find(folder), None) is not None for benchmark in _candidates(folder))


def _candidates(folder: Path) -> Iterator[_Benchmark]:
    """Yield the data sets that a folder may hold: one with the sub-folders rgb and depth is plain, or that of ETH3D."""
    plain = (folder / "rgb").is_dir() and (folder / "depth").is_dir()
    yield from (benchmark for benchmark in _BENCHMARKS if not plain or benchmark.name == "eth3d")


def _found(folder: Path) -> tuple[_Benchmark, list[_Files]]:
    """Return the data set of a folder, and the files of its images.

    Raises:
        DatasetError: It holds none, or the depth of an image is missing.
    """
    for benchmark in _candidates(folder):
        if files := list(benchmark.find(folder)):
            for image, *others in files:
                for path in others:
                    if path is not None and not path.is_file():
                        raise DatasetError(f"{printable(image)} has no depth {printable(path)}: unpack the depth, too")
            return benchmark, files
    known = ", ".join(benchmark.name for benchmark in _BENCHMARKS)
    raise DatasetError(f"{printable(folder)} has the layout of none of {known}: check the path")


def _nyu_files(folder: Path) -> Iterator[_Files]:
    """Yield the files of one split of NYUv2."""
    for image in sorted(folder.glob("*/rgb_[0-9][0-9][0-9][0-9].png")):
        yield _Files(image, image.with_name(image.name.replace("rgb", "depth")))


def _kitti_files(folder: Path) -> Iterator[_Files]:
    """Yield the files of KITTI's images that have a depth."""
    for image in sorted(folder.glob(f"{_DRIVE}/image_02/data/*.png")):
        depth = folder / image.parents[2].name / "proj_depth/groundtruth/image_02" / image.name
        if depth.is_file():
            yield _Files(image, depth)


def _eth3d_files(folder: Path) -> Iterator[_Files]:
    """Yield the files of ETH3D."""
    for image in sorted(folder.glob("rgb/*/images/dslr_images/*.JPG")):
        scene = image.parents[2].name
        yield _Files(image, folder / f"depth/{scene}_dslr_depth/{scene}/ground_truth_depth/dslr_images" / image.name)


def _scannet_files(folder: Path) -> Iterator[_Files]:
    """Yield the files of ScanNet."""
    for image in sorted(folder.glob(f"{_SCENE}/color/*.jpg")):
        yield _Files(image, image.parents[1] / "depth" / f"{image.stem}.png")


def _diode_files(folder: Path) -> Iterator[_Files]:
    """Yield the files of DIODE, or of its indoor or outdoor half."""
    for pattern in ("scene_*/scan_*/*.png", "*/scene_*/scan_*/*.png"):
        for image in sorted(folder.glob(pattern)):
            depth, mask = (image.with_name(f"{image.stem}_depth{end}.npy") for end in ("", "_mask"))
            yield _Files(image, depth, mask)


# Ranges, crops and resolutions are those of prs-eth/Marigold: src/dataset, config/dataset_depth and script/depth/eval.
_BENCHMARKS = (
    _Benchmark(
        name="nyu",
        find=_nyu_files,
        scale=1000.0,
        least=1e-3,
        most=10.0,
        nearest=0.3,
        plausible=20.0,
        processing_resolution=0,
        size=(640, 480),
        region=(slice(45, 471), slice(41, 601)),
    ),
    _Benchmark(
        name="kitti",
        find=_kitti_files,
        scale=256.0,
        least=1e-5,
        most=80.0,
        nearest=1.0,
        plausible=100.0,
        processing_resolution=0,
        size=(1216, 352),
        cropped=True,
        # Eigen's region: rows 0.3324324 to 0.91351351 of the height, columns 0.0359477 to 0.96405229 of the width.
        region=(slice(117, 321), slice(43, 1172)),
    ),
    _Benchmark(
        name="eth3d",
        find=_eth3d_files,
        scale=None,
        least=1e-5,
        most=np.inf,
        nearest=0.2,
        plausible=200.0,
        processing_resolution=760,  # 756 in Marigold's code; the pipeline in diffusers takes multiples of 8 only.
        fit_side=1024,
    ),
    _Benchmark(
        name="scannet",
        find=_scannet_files,
        scale=1000.0,
        least=1e-3,
        most=10.0,
        nearest=0.3,
        plausible=20.0,
        processing_resolution=0,
    ),
    _Benchmark(
        name="diode",
        find=_diode_files,
        scale=None,
        least=0.6,
        most=350.0,
        nearest=0.3,
        plausible=350.0,
        processing_resolution=640,
    ),
)
