"""Read a depth map from a file: a PNG of 8 or 16 bits, a numpy array, an OpenEXR image, or one of Hypersim's.

Whole numbers need a scale, the number that stands for one metre: 1000 for millimetres, 100 for the centimetres of
Virtual KITTI 2, 256 for KITTI. Floating-point numbers are metres unless a scale is given.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2f_fast.data.image_headers import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, reason_of
from d2f_fast.data.images import read_image
from d2f_fast.errors import DatasetError, RefusedInputError, printable

DEPTH_EXTENSIONS = (".png", ".npy", ".exr", ".hdf5")
HYPERSIM_FOCAL, HYPERSIM_WIDTH = 886.81, 1024
_SCALE_CURE = "give --depth_scale, the number that stands for one metre: 1000 for millimetres, 100 for centimetres"
_EXR_CHANNELS = ("Z", "Y", "depth", "V", "R")


def read_depth(path: Path, scale: float | None = None) -> NDArray[np.float32]:
    """Read a depth map.

    Args:
        path: File of at most 512 MiB and 2**26 pixels; its extension says its format.
        scale: Number in the file that stands for one metre; None for files in metres.

    Returns:
        Depth in metres, [H, W]. Pixels without a depth are as the file has them: 0, NaN, infinite or negative.

    Raises:
        DatasetError: The file cannot be read, is not a depth map, or holds whole numbers and there is no scale.
    """
    kind = path.suffix.lower()
    if kind not in DEPTH_EXTENSIONS:
        raise DatasetError(f"{printable(path)} is not a depth map: give one of {', '.join(DEPTH_EXTENSIONS)}")
    try:
        stored = {".png": _read_png, ".npy": _read_array, ".exr": _read_exr, ".hdf5": _read_hdf5}[kind](path)
        if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[-1]):
            stored = stored[0] if stored.shape[0] == 1 else stored[..., 0]
        if stored.ndim != 2 or not 0 < stored.size <= MAX_IMAGE_PIXELS:
            raise ValueError(f"its shape is {list(stored.shape)}, and a depth map has [height, width]")
    except RefusedInputError:
        raise
    except Exception as error:  # Decoders raise exceptions of any type when a file is damaged.
        raise DatasetError(
            f"{printable(path)} cannot be read as a depth map ({reason_of(error)}): replace it"
        ) from error
    if scale is None and not np.issubdtype(stored.dtype, np.floating):
        raise DatasetError(f"{printable(path)} holds whole numbers ({stored.dtype}) of an unknown unit: {_SCALE_CURE}")
    with np.errstate(over="ignore"):
        depth: NDArray[np.float32] = (stored.astype(np.float64) / (scale or 1.0)).astype(np.float32)
    return depth


def read_float32(path: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """Read a depth map that is stored as plain float32 numbers, row by row, as those of ETH3D.

    Args:
        path: File without a header.
        size: Width and height of its image.

    Returns:
        Depth in metres, [H, W]. Pixels without a depth are as the file has them: infinite.

    Raises:
        DatasetError: The file cannot be read, or does not hold one number for each pixel.
    """
    width, height = size
    try:
        if (bytes_found := path.stat().st_size) != 4 * width * height:
            raise ValueError(f"{bytes_found} bytes, and {width}x{height} pixels of float32 take {4 * width * height}")
        return np.fromfile(path, "<f4").reshape(height, width)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{printable(path)} cannot be read as a depth map ({reason_of(error)}): replace it"
        ) from error


def plane_depth_of_distance(distance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the plane depth of Hypersim's distances from the camera.

        depth = distance · f / sqrt(x² + y² + f²),    x, y: pixels from the middle, f = 886.81 · width / 1024

    Args:
        distance: Distance of each pixel from the camera along its own ray, in metres, [H, W].

    Returns:
        Depth along the optical axis, in metres, [H, W].
    """
    height, width = distance.shape
    focal = HYPERSIM_FOCAL * width / HYPERSIM_WIDTH
    x, y = (np.arange(side) - (side - 1) / 2 for side in (width, height))
    depth: NDArray[np.float32] = (distance * focal / np.sqrt(x**2 + y[:, None] ** 2 + focal**2)).astype(np.float32)
    return depth


def _read_png(path: Path) -> NDArray[np.integer]:
    """Return the numbers of a PNG of one channel."""
    image = read_image(path)
    if image.mode not in ("L", "I", "I;16"):
        raise ValueError(f"it has the mode {image.mode}, and a depth map has one channel of 8 or 16 bits")
    return np.asarray(image)


def _read_array(path: Path) -> NDArray[np.number]:
    """Return the numbers of an .npy file, whose header is checked before anything is read."""
    _check_size(path)
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray) or mapped.dtype.kind not in "fiub":
        raise ValueError("it holds no array of real numbers")
    return np.array(mapped)


def _read_exr(path: Path) -> NDArray[np.floating]:
    """Return the depth channel of an OpenEXR image."""
    try:
        import OpenEXR
    except ImportError as error:
        raise DatasetError(
            f"{printable(path)} needs the package OpenEXR: pip install OpenEXR, which the extra [depth] of this package"
            " installs, too; or convert the file to .npy"
        ) from error
    _check_size(path)
    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = file.channels()
        name = next((name for name in _EXR_CHANNELS if name in channels), None)
        if name is None:
            raise ValueError(f"it has the channels {', '.join(channels)}, and none of {', '.join(_EXR_CHANNELS)}")
        return np.array(channels[name].pixels)


def _read_hdf5(path: Path) -> NDArray[np.number]:
    """Return the array "dataset" of a file of Hypersim."""
    try:
        import h5py
    except ImportError as error:
        raise DatasetError(
            f"{printable(path)} needs the package h5py: pip install h5py, which the extra [depth] of this package"
            " installs, too; or convert the file to .npy"
        ) from error
    _check_size(path)
    with h5py.File(path, "r") as file:
        stored = file["dataset"]
        if not 0 < stored.size <= MAX_IMAGE_PIXELS or stored.dtype.kind not in "fiu":
            raise ValueError(f"its array is {stored.dtype} of {list(stored.shape)}")
        return np.array(stored)


def _check_size(path: Path) -> None:
    """Refuse a file that is too large to be a depth map."""
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes, more than {MAX_IMAGE_BYTES}")
