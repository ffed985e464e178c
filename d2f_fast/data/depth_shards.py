"""Read the webdataset shards of the published Diff2Flow code: images with depth in tar files.

    KEY.image.png           the image
    KEY.depth.npy           its depth in metres, [H, W]
    KEY.dataset             "hypersim", which no entry means, "vkitti2" or "diode"
    KEY.valid_mask.npy      which pixels count; may be left out

Other members, such as the latents image_latent.npy and depth_latent.npy, are passed over. The depth of Hypersim is the
distance from the camera, and becomes plane depth. The ranges are those of the published code.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2f_fast.data.depth_source import DepthLayout, DepthSample, DepthSource, check_sizes, check_units
from d2f_fast.errors import DatasetError, printable
from d2f_fast.files.tar_index import TarMember, opened, read_at, tar_members

IMAGE, DEPTH, DATASET, MASK = "image.png", "depth.npy", "dataset", "valid_mask.npy"
MOST = 120.0
_RANGES = {"hypersim": (1e-4, MOST), "vkitti2": (0.0, MOST), "diode": (0.1, MOST)}
_LAYOUT = DepthLayout("shards", None, MOST, 400.0)
_MAX_MEMBER_BYTES = 1 << 29
_MAX_NAME_BYTES = 256


class _Item(NamedTuple):
    """Members of one sample."""

    shard: Path
    key: str
    members: dict[str, TarMember]


class DepthShards(DepthSource):
    """Read images with their depth from the tar files of a folder, by the offsets of their members.

    See `DepthSource` for the arguments. The shards are taken in the order of their names, and the range of each data
    set counts beside `least` and `most`. A shard that cannot be read or is cut short is refused, and so is a sample
    that lacks its image or its depth.
    """

    def _find(self) -> DepthLayout:
        """Find the samples of the shards, and return their layout; see `DepthSource`."""
        self._items = [item for path in sorted(self.place.glob("*.tar")) for item in _items_of(path)]
        if not self._items:
            raise DatasetError(f"{printable(self.place)} holds no shards with {IMAGE} and {DEPTH}: check the folder")
        return _LAYOUT

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> DepthSample:
        from d2f_fast.data.depth_files import plane_depth_of_distance  # It imports torch.
        from d2f_fast.data.depth_normalization import valid_pixels
        from d2f_fast.data.images import decode_image, to_rgb
        from d2f_fast.data.loading import refused_sample

        item = self._items[index]
        name = f"{printable(item.shard)}: {printable(item.key)}"
        with refused_sample(name):
            image = to_rgb(decode_image(self._read(item, IMAGE)))
            depth = (self._array(item, DEPTH) / (self.scale or 1.0)).astype(np.float32)
            kind = self._read(item, DATASET).decode().strip() if DATASET in item.members else "hypersim"
            if kind not in _RANGES:
                raise ValueError(f"the data set {printable(kind)} is unknown: give {', '.join(_RANGES)}")
            allowed = self._array(item, MASK) > 0 if MASK in item.members else np.ones_like(depth, bool)
        check_sizes(image, depth, name, DEPTH)
        if allowed.shape != depth.shape:
            raise DatasetError(f"{name}: {MASK} has the shape {list(allowed.shape)}, and the depth {list(depth.shape)}")
        if kind == "hypersim":
            depth = plane_depth_of_distance(depth)
        low, high = _RANGES[kind]
        valid = valid_pixels(depth, max(self.least, low), min(self.most, high)) & allowed
        check_units(depth, valid, name, self)
        return DepthSample(image, depth, valid, name)

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return the hash of the members of a sample; see `DepthSource.content`."""
        item, digest = self._items[index], hashlib.sha256()
        for kind in (IMAGE, DEPTH, DATASET, MASK):
            if kind in item.members:
                digest.update(f"{kind} {item.members[kind].size} ".encode() + self._read(item, kind))
        return digest.hexdigest()

    def _read(self, item: _Item, kind: str) -> bytes:
        """Return the bytes of a member."""
        member = item.members[kind]
        with opened(item.shard) as descriptor:
            return read_at(descriptor, member.size, member.start, item.shard)

    def _array(self, item: _Item, kind: str) -> NDArray[np.number]:
        """Return an array [H, W] of real numbers, of which a dimension of 1 before or after is left out."""
        stored = np.load(io.BytesIO(self._read(item, kind)), allow_pickle=False)
        if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[-1]):
            stored = stored[0] if stored.shape[0] == 1 else stored[..., 0]
        if stored.ndim != 2 or stored.dtype.kind not in "fiub":
            raise ValueError(f"{kind} is {stored.dtype} of {list(stored.shape)}, and a depth map has [height, width]")
        array: NDArray[np.number] = stored
        return array


def _items_of(path: Path) -> list[_Item]:
    """Return the samples of a shard, from the headers of its members alone."""
    items: dict[str, _Item] = {}
    for member in tar_members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        if kind not in (IMAGE, DEPTH, DATASET, MASK):
            continue
        most = _MAX_NAME_BYTES if kind == DATASET else _MAX_MEMBER_BYTES
        if member.size > most:
            raise DatasetError(f"{printable(path)}: {printable(member.name)} has more than {most} bytes: make it again")
        key = f"{folder}/{stem}" if folder else stem
        items.setdefault(key, _Item(path, key, {})).members[kind] = member
    for item in items.values():
        for kind in (IMAGE, DEPTH):
            if kind not in item.members:
                raise DatasetError(
                    f"{printable(path)}: {printable(item.key)} has no {kind}: each sample needs {IMAGE} and {DEPTH}"
                )
    return list(items.values())
