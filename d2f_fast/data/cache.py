"""Disk cache of what the frozen networks make of images and captions, keyed by content.

    file = sha256({content, settings}),  settings = {kind, model, precision, preprocessing}

One safetensors file a sample, in 256 sub-folders. A latent is its posterior's mean and standard deviation, so that each
epoch samples anew, and each orientation of an image is a sample of its own. A file is renamed into place when it is
complete and carries a checksum of its tensors: whatever a killed process, a power cut or another program leaves behind
is recognised, and made again.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2f_fast.data.images import to_rgb
from d2f_fast.errors import DatasetError, RefusedInputError, printable

FORMAT = "d2f_fast.data.cache"
# Part of every key. Raise it when `preprocess` or the content of the files changes: older files are then left alone.
VERSION = 1
# A file changed again within the resolution of its file system's clock would keep its size and time.
SETTLED_NS = 2_000_000_000
ABANDONED_SECONDS = 3600

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheKey:
    """Digest of everything a cached sample depends on, and the name of the sample for messages."""

    digest: str
    label: str


class TensorCache:
    """Keep a dictionary of tensors for each sample in a folder; several processes may share it.

    Args:
        folder: made when missing; caches of any kind and model may share one.
        settings: what all samples depend on beside their content; part of each key.
        dtype: floating-point tensors are stored, and returned, in it.

    Raises:
        RefusedInputError: the folder cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, str | int | bool], dtype: torch.dtype
    ) -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        self._settings = {**settings, "dtype": str(dtype), "version": VERSION}
        self._unfinished = self.folder / "unfinished"
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            for file in self._unfinished.iterdir():
                if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()
        except FileNotFoundError:  # another process was first to clear it away
            pass
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def get_or_compute(
        self, keys: Sequence[CacheKey], compute: Callable[[list[int]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of all samples, computing and storing those that the folder lacks.

        A sample that is computed comes back as it will be read later, in the stored precision, so that training does
        not depend on what the cache holds.

        Args:
            keys: one for each sample; equal keys are computed once.
            compute: called at most once, with the positions in `keys` that are missing; returns their tensors, each
                with a leading dimension as long as that list.

        Returns:
            On the CPU, each tensor with a leading dimension of `len(keys)`; empty if there are no keys.

        Raises:
            DatasetError: a computed tensor is not finite; the message names its sample.
            RefusedInputError: the folder cannot be written.
        """
        return self.complete(keys, self.read(keys), compute)

    def read(self, keys: Sequence[CacheKey]) -> dict[str, dict[str, Tensor]]:
        """Tensors of the samples that the folder has, by digest; from any thread."""
        digests = dict.fromkeys(key.digest for key in keys)
        return {digest: tensors for digest in digests if (tensors := self._read(digest)) is not None}

    def complete(
        self,
        keys: Sequence[CacheKey],
        found: Mapping[str, dict[str, Tensor]],
        compute: Callable[[list[int]], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """As `get_or_compute`, where `read` has given what the folder has."""
        positions: dict[str, int] = {}
        for position, key in enumerate(keys):
            positions.setdefault(key.digest, position)
        samples = dict(found)
        missing = [position for digest, position in positions.items() if digest not in samples]
        if missing:
            computed = {name: self._as_stored(tensor) for name, tensor in compute(missing).items()}
            for name, tensor in computed.items():
                if len(tensor) != len(missing):
                    raise ValueError(f"compute must return {len(missing)} samples, got {len(tensor)} of {name!r}")
            for row, position in enumerate(missing):
                # Copies: two names may share a tensor, which safetensors does not write.
                tensors = {name: tensor[row].clone() for name, tensor in computed.items()}
                _check_finite(tensors, keys[position].label)
                self._write(keys[position].digest, tensors)
                samples[keys[position].digest] = tensors
        if not keys:
            return {}
        return {name: torch.stack([samples[key.digest][name] for key in keys]) for name in samples[keys[0].digest]}

    def _key(self, label: str, content: Mapping[str, str | bool]) -> CacheKey:
        described = json.dumps([self._settings, content], sort_keys=True)
        return CacheKey(hashlib.sha256(described.encode()).hexdigest(), label)

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _as_stored(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        # VAEs run in channels_last: the files keep the plain layout.
        return tensor.detach().to("cpu", dtype).contiguous()

    def _read(self, digest: str) -> dict[str, Tensor] | None:
        """Tensors of a sample; None where they must be computed."""
        path = self._file(digest)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("key") != digest:
                    raise SafetensorError("not this cache's file")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if metadata.get("checksum") != _checksum(tensors):
                raise SafetensorError("its checksum differs")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            _logger.warning("%s is damaged (%s) and is made again", printable(path), error)
            return None
        return tensors

    def _write(self, digest: str, tensors: dict[str, Tensor]) -> None:
        path = self._file(digest)
        unfinished = self._unfinished / f"{digest}.{secrets.token_hex(8)}"
        metadata = {"format": FORMAT, "key": digest, "checksum": _checksum(tensors)}
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                # No fsync: after a power cut the checksum tells a file that never reached the disk, at the cost of
                # computing one sample again instead of waiting for the disk at each.
                unfinished.write_bytes(safetensors.torch.save(tensors, metadata))
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error


class LatentCache(TensorCache):
    """Posterior means and standard deviations of an autoencoder: `compute` returns {"mean", "std"}, each [m, C, h, w].

    Args:
        folder: see `TensorCache`.
        model: fingerprint of the autoencoder's weights.
        resolution: side of the square images, pixels.
        center_crop: must be on: a random crop shows another part of the image in each epoch.
        dtype: precision of the stored tensors.

    Raises:
        RefusedInputError: `center_crop` is off, or the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: str,
        resolution: int,
        center_crop: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not center_crop:
            raise RefusedInputError(
                "cached latents cannot follow random crops: set center_crop, or turn the latent cache off"
            )
        super().__init__(folder, {"kind": "latents", "model": model, "resolution": resolution, "crop": "center"}, dtype)
        self._hashes = FileHashes(self.folder / "hashes.jsonl")

    def key(self, image: Path | Image.Image, flip: bool, label: str | None = None) -> CacheKey:
        """Key of one orientation of an image: of a file by its bytes, of a picture in memory by its pixels.

        Raises:
            DatasetError: the file cannot be read.
        """
        if isinstance(image, Path):
            return self._key(label or printable(image), {"file": self._hashes(image), "flip": flip})
        pixels = to_rgb(image)
        digest = hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()
        return self._key(label or "an image", {"pixels": digest, "flip": flip})


class EmbeddingCache(TensorCache):
    """Outputs of frozen text encoders: `compute` returns any dictionary of tensors with a row for each caption.

    Args:
        folder: see `TensorCache`.
        model: fingerprint of the weights of the text encoders, and of their tokenizers.
        dtype: precision of the stored floating-point tensors.
    """

    def __init__(self, folder: str | os.PathLike[str], *, model: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, {"kind": "embeddings", "model": model}, dtype)

    def key(self, caption: str) -> CacheKey:
        """Key of a caption."""
        return self._key(f"the caption {caption[:80]!r}", {"caption": caption})


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change in a file of JSON lines.

    Lines that a killed process cut short, or that are not ours, are passed over: their files are hashed again.
    """

    def __init__(self, index: Path) -> None:
        self._index = index
        self._known: dict[str, tuple[int, int, str]] = {}
        try:
            with index.open("rb") as lines:
                for line in lines:
                    try:
                        path, size, changed_ns, digest = json.loads(line)
                        self._known[path] = (size, changed_ns, digest)
                    except (ValueError, TypeError):
                        continue
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RefusedInputError(f"{printable(index)} cannot be read ({error.strerror}): remove it") from error

    def __call__(self, path: Path) -> str:
        """Return the hexadecimal SHA-256 of a file.

        Raises:
            DatasetError: the file cannot be read.
            RefusedInputError: the index cannot be written.
        """
        name = os.path.abspath(path)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                size, changed_ns, digest = self._known.get(name, (-1, -1, ""))
                if (size, changed_ns) == (status.st_size, status.st_mtime_ns):
                    return digest
                settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error
        if settled:
            self._known[name] = (status.st_size, status.st_mtime_ns, digest)
            line = json.dumps([name, status.st_size, status.st_mtime_ns, digest])
            try:
                with self._index.open("ab") as index:
                    # The line break comes first: it ends whatever a killed process left unfinished.
                    index.write(f"\n{line}\n".encode())
            except OSError as error:
                raise _unwritable(self._index, error) from error
        return digest


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor], label: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DatasetError(
                f"{label}: {name} is not finite in {tensor.dtype}: run the encoder in float32 or bfloat16, "
                "or replace the sample"
            )


def _unwritable(path: Path, error: OSError) -> RefusedInputError:
    return RefusedInputError(
        f"cannot write the cache {printable(path)} ({error.strerror}): free space, or choose another folder"
    )
