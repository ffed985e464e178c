"""Keep the outputs of frozen networks for images and captions on disk, keyed by content.

    file = sha256({content, settings}),  settings = {kind, model, precision, preprocessing}

There is one safetensors file for each sample, in 256 sub-folders. A latent is stored as the mean and the standard
deviation of its posterior, so that each epoch samples anew; each orientation of an image has a file of its own. A file
is renamed into place when it is complete, and carries a checksum of its tensors: a file that a killed process, a power
cut or another program damaged is recognised, and computed again.
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
from typing import Literal

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.files.hashes import FileHashes
from d2f_fast.image_sizes import Size, simplest, size_text

FORMAT = "d2f_fast.data.cache"
# The version is part of every key. Raise it when `preprocess` or the content of the files changes: older files then
# stay where they are, unused.
VERSION = 1
# An unfinished file that is older than this belongs to a process that was killed.
ABANDONED_SECONDS = 3600

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheKey:
    """Key of one cached sample.

    Attributes:
        digest: SHA-256, in hexadecimal, of everything that the sample depends on.
        label: Name of the sample in messages.
    """

    digest: str
    label: str


@dataclass(frozen=True)
class ImageIdentity:
    """Content of an image, in place of the image itself; equal identities mean equal images.

    Attributes:
        kind: "file" for the SHA-256 of a file, "pixels" for that of the pixels, "key" for the data set's own key.
        value: The hash or key.
    """

    kind: Literal["file", "pixels", "key"]
    value: str


class TensorCache:
    """Keep a dictionary of tensors for each sample in a folder. Several threads and processes may share the folder.

    Args:
        folder: Folder of the cache, made when missing. Caches of any kind and model may share one.
        settings: Everything that all samples depend on beside their content; it is part of each key.
        dtype: Type in which floating-point tensors are stored and returned.

    Raises:
        RefusedInputError: The folder cannot be made.
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
        except FileNotFoundError:  # Another process removed it first.
            pass
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def get_or_compute(
        self, keys: Sequence[CacheKey], compute: Callable[[list[int]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of all samples, computing and storing those that the folder lacks.

        A computed sample is returned in the stored precision, as it will be read later, so that training does not
        depend on what the cache holds.

        Args:
            keys: One key for each sample; equal keys are computed once.
            compute: Function from the positions in `keys` that are missing to their tensors, each with a leading
                dimension as long as that list. It is called at most once.

        Returns:
            Tensors on the CPU, each with a leading dimension of `len(keys)`; nothing if there are no keys.

        Raises:
            DatasetError: A computed tensor is not finite; the message names its sample.
            RefusedInputError: The folder cannot be written.
        """
        return self.complete(keys, self.read(keys), compute)

    def read(self, keys: Sequence[CacheKey]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the samples that the folder has, by digest. Any thread may call it."""
        digests = dict.fromkeys(key.digest for key in keys)
        return {digest: tensors for digest in digests if (tensors := self._read(digest)) is not None}

    def complete(
        self,
        keys: Sequence[CacheKey],
        found: Mapping[str, dict[str, Tensor]],
        compute: Callable[[list[int]], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the tensors of all samples, computing and storing those that are not in `found`.

        Args:
            keys: One key for each sample, as for `get_or_compute`.
            found: Samples that the folder has, by digest, as `read` returned them.
            compute: Function that computes the missing samples, as for `get_or_compute`.

        Returns:
            Tensors as `get_or_compute` returns them.

        Raises:
            DatasetError: A computed tensor is not finite; the message names its sample.
            RefusedInputError: The folder cannot be written.
        """
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
                # Two names may share a tensor, and safetensors does not write shared memory: each gets a copy.
                tensors = {name: tensor[row].clone() for name, tensor in computed.items()}
                _check_finite(tensors, keys[position].label)
                self._write(keys[position].digest, tensors)
                samples[keys[position].digest] = tensors
        if not keys:
            return {}
        return {name: torch.stack([samples[key.digest][name] for key in keys]) for name in samples[keys[0].digest]}

    def _key(self, label: str, content: Mapping[str, str | bool]) -> CacheKey:
        """Return the key of a sample from its content and the settings of the cache."""
        described = json.dumps([self._settings, content], sort_keys=True)
        return CacheKey(hashlib.sha256(described.encode()).hexdigest(), label)

    def _file(self, digest: str) -> Path:
        """Return the path of a sample's file."""
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _as_stored(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the stored precision, on the CPU."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        # Autoencoders run in channels_last; the files have the plain layout.
        return tensor.detach().to("cpu", dtype).contiguous()

    def _read(self, digest: str) -> dict[str, Tensor] | None:
        """Return the tensors of a sample, or None where they must be computed."""
        path = self._file(digest)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("key") != digest:
                    raise SafetensorError("it is not a file of this cache")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if metadata.get("checksum") != _checksum(tensors):
                raise SafetensorError("its checksum differs")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            _logger.warning("%s is damaged (%s) and is computed again", printable(path), error)
            return None
        return tensors

    def _write(self, digest: str, tensors: dict[str, Tensor]) -> None:
        """Write a sample's file, complete or not at all."""
        path = self._file(digest)
        unfinished = self._unfinished / f"{digest}.{secrets.token_hex(8)}"
        metadata = {"format": FORMAT, "key": digest, "checksum": _checksum(tensors)}
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                # Without fsync, a power cut may damage a file. The checksum shows it, and one sample is computed again;
                # waiting for the disk at each sample would cost more.
                unfinished.write_bytes(safetensors.torch.save(tensors, metadata))
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error


class LatentCache(TensorCache):
    """Keep the posterior means and standard deviations of an autoencoder.

    `compute` returns {"mean", "std"}, each [m, C, h, w].

    Args:
        folder: Folder of the cache, made when missing.
        model: Fingerprint of the autoencoder's weights.
        resolution: Side of square images in pixels, or their size.
        center_crop: Must be True: a random crop shows another part of the image in each epoch.
        dtype: Type of the stored tensors.

    Raises:
        RefusedInputError: `center_crop` is False, or the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: str,
        resolution: int | Size,
        center_crop: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not center_crop:
            raise RefusedInputError(
                "cached latents cannot follow random crops: set center_crop, or turn the latent cache off"
            )
        # Squares have the key of the time when there were no other sizes.
        side = simplest(resolution)
        size = side if isinstance(side, int) else size_text(resolution)
        super().__init__(folder, {"kind": "latents", "model": model, "resolution": size, "crop": "center"}, dtype)
        self._hashes = FileHashes(self.folder / "hashes.jsonl")

    def identify(self, image: Path | Image.Image | str) -> ImageIdentity:
        """Return the identity of an image: a file's by its bytes, an image in memory's by its pixels.

        The hash of a file is remembered in the cache's folder, and computed again only when the file changes.

        Args:
            image: Image file, image of mode "RGB", or the key that the data set gave the image.

        Raises:
            DatasetError: The file cannot be read.
            RefusedInputError: The index of the hashes cannot be written.
        """
        if isinstance(image, str):
            return ImageIdentity("key", image)
        if isinstance(image, Path):
            try:
                return ImageIdentity("file", self._hashes(image))
            except OSError as error:
                raise DatasetError(f"{printable(image)} cannot be read ({error.strerror}): check the file") from error
        return ImageIdentity("pixels", hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())

    def key(self, image: ImageIdentity, flip: bool, label: str = "an image") -> CacheKey:
        """Return the key of one orientation of an image.

        Args:
            image: Identity of the image.
            flip: Whether the orientation is the mirrored one.
            label: Name of the image in messages.
        """
        return self._key(label, {image.kind: image.value, "flip": flip})


class EmbeddingCache(TensorCache):
    """Keep the outputs of frozen text encoders.

    `compute` returns any dictionary of tensors with a row for each caption.

    Args:
        folder: Folder of the cache, made when missing.
        model: Fingerprint of the weights of the text encoders, and of their tokenizers.
        dtype: Type of the stored floating-point tensors.

    Raises:
        RefusedInputError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], *, model: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, {"kind": "embeddings", "model": model}, dtype)

    def key(self, caption: str) -> CacheKey:
        """Return the key of a caption."""
        return self._key(f"the caption {caption[:80]!r}", {"caption": caption})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor], label: str) -> None:
    """Refuse to store NaN or an infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DatasetError(
                f"{label}: {name} is not finite in {tensor.dtype}: run the encoder in float32 or bfloat16, "
                "or replace the sample"
            )


def _unwritable(path: Path, error: OSError) -> RefusedInputError:
    """Return the error for a path of the cache that cannot be written."""
    return RefusedInputError(
        f"cannot write the cache {printable(path)} ({error.strerror}): free space, or choose another folder"
    )
