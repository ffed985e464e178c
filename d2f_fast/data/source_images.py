"""Find pairs of a source and a target image in a folder, with the captions of the targets.

    source/<name>.png|.jpg|…      image that the flow starts from
    target/<name>.png|.jpg|…      image of the same size that it leads to, with or without a caption

No torch is imported before an image is read, so that `d2f train` refuses a folder at once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from d2f_fast.data.captions import Captions
from d2f_fast.data.file_names import CAPTION_EXTENSIONS, METADATA_FILE, UNREAD_EXTENSIONS, checked_repeats, is_image
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.image_headers import stored_size
from d2f_fast.data.mixed import locate, mixture_of
from d2f_fast.data.partner_files import check_partners, files_by_stem, find_files
from d2f_fast.data.source_options import SourceOptions
from d2f_fast.errors import DatasetError, printable

_EXPECTED = "expected the sub-folders source and target with images of the same names (source/a.png and target/a.png)"
_NO_CAPTION = Captions(("",))


class ImagePair(NamedTuple):
    """Files of a source image and its target image, and the captions of the target.

    Attributes:
        source: Image that the flow starts from.
        target: Image that it leads to.
        captions: Captions of the target; the empty caption where the folder has none.
    """

    source: Path
    target: Path
    captions: Captions


class SourceTargetFolder:
    """Find the pairs of a folder. An image is decoded only when it is trained on.

    Args:
        folder: Folder with the sub-folders `source` and `target`.
        image_column, caption_column, caption_extension: How the captions in `target` are read; see `CaptionedImages`.
            They are not needed in a folder without captions.

    Attributes:
        folder: The folder.
        captioned: The captioned target images; None where there are no captions.
        files: Number of target images; repeats are not counted.
        repeats: Number of repeats of each sub-folder of `target` named `<number>_<name>`, as in `CaptionedImages`.

    Raises:
        DatasetError: A sub-folder is missing or empty, an image has no partner of its name or is of a format that is
            not read, two images of a sub-folder have one name, there are captions outside `target`, or those in it
            cannot be used; see `CaptionedImages`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_extension: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        found = {name: self._images(name) for name in ("source", "target")}
        sources, targets = found["source"], found["target"]
        check_partners(self.folder, {"source image": sources, "target image": targets})
        self._check_places_of_captions(sources, targets)
        columns = image_column, caption_column, caption_extension
        self.captioned: CaptionedImages | None = None
        if _captions_of(self.folder / "target", targets) is not None or any(column is not None for column in columns):
            self.captioned = CaptionedImages(self.folder / "target", *columns)
            self.files, self.repeats = self.captioned.files, self.captioned.repeats
            self._pairs = [self._pair(sources, self.captioned, index) for index in range(len(self.captioned))]
            return
        self.files, self.repeats = 0, dict[str, int]()
        self._pairs = []
        for stem in sorted(targets):
            repeats = checked_repeats(self.folder / "target", stem)
            self.files += 1 if repeats.times else 0
            self._pairs += [ImagePair(sources[stem], targets[stem], _NO_CAPTION)] * repeats.times
            if repeats.folder:
                self.repeats[repeats.folder] = repeats.times
        if not self._pairs:
            raise DatasetError(f"{printable(self.folder / 'target')} holds no images but those repeated 0 times")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> ImagePair:
        return self._pairs[index]

    def check_sizes(self) -> None:
        """Refuse images that their headers show to be damaged, or of another size than their partner. None is decoded.

        The size of an image that its EXIF entry turns is known only once it is decoded, so that swapped sides are
        accepted here.

        Raises:
            DatasetError: An image cannot be used.
        """
        for source, target in dict.fromkeys((pair.source, pair.target) for pair in self._pairs):
            sizes = stored_size(source), stored_size(target)
            if sorted(sizes[0]) != sorted(sizes[1]):
                raise sizes_differ(source, sizes[0], target, sizes[1])

    def _images(self, name: Literal["source", "target"]) -> dict[str, Path]:
        """Return the images of a sub-folder by their stems."""
        if not (self.folder / name).is_dir():
            raise DatasetError(f"{printable(self.folder)} has no sub-folder {name}: {_EXPECTED}")
        folder = self.folder / name
        if not (images := files_by_stem(folder, is_image)):
            raise DatasetError(f"{printable(folder)} holds no images: {_EXPECTED}")
        for path in find_files(folder, lambda name: name.lower().endswith(UNREAD_EXTENSIONS)):
            if path.relative_to(folder).with_suffix("").as_posix() not in images:
                raise DatasetError(
                    f"{printable(path)} is of a format that is not read: convert it to PNG, or remove it"
                )
        return images

    def _check_places_of_captions(self, sources: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
        """Refuse captions outside the sub-folder of the target images, where they would be ignored."""
        beside = {stem: self.folder / path.name for stem, path in targets.items() if "/" not in stem}
        for folder, images in ((self.folder, beside), (self.folder / "source", sources)):
            if (found := _captions_of(folder, images)) is not None:
                raise DatasetError(
                    f"{printable(found)}: captions are those of the target images: move them into"
                    f" {printable(self.folder / 'target')}, or remove them"
                )

    def _pair(self, sources: Mapping[str, Path], captioned: CaptionedImages, index: int) -> ImagePair:
        """Return the pair of a captioned target image."""
        target = captioned.path(index)
        stem = target.relative_to(captioned.folder).with_suffix("").as_posix()
        if stem not in sources:  # metadata.jsonl may list a hidden image
            raise DatasetError(f"{printable(target)} has no source image of the same name: add it, or remove the line")
        return ImagePair(sources[stem], target, captioned.captions(index))


def sizes_differ(source: Path, size: tuple[int, int], target: Path, other: tuple[int, int]) -> DatasetError:
    """Return the error about a source and a target image of different sizes.

    Args:
        source: File of the source image.
        size: Its width and height in pixels.
        target: File of the target image.
        other: Its width and height in pixels.
    """
    return DatasetError(
        f"{printable(source)} has {size[0]}x{size[1]} pixels and {printable(target)} {other[0]}x{other[1]}: give both"
        " in the same size"
    )


class SourceTargetDataset:
    """Pairs of a source and a target image that a model is trained on, and where their flow starts.

    Args:
        folders: The pairs of one folder, or of several that are mixed.
        options: Options of the start; None for the defaults.
        weights: Weight of each of several folders; None for the numbers of their pairs. See `Mixture`.

    Attributes:
        folders: The folders.
        options: Options of the start.
        mixture: How several folders are mixed; None for a single one.

    Raises:
        RefusedInputError: The weights do not fit the folders.
    """

    def __init__(
        self,
        folders: SourceTargetFolder | Sequence[SourceTargetFolder],
        options: SourceOptions | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.folders = (folders,) if isinstance(folders, SourceTargetFolder) else tuple(folders)
        self.options = options or SourceOptions()
        self.mixture = mixture_of([len(folder) for folder in self.folders], weights)

    def __len__(self) -> int:
        return sum(map(len, self.folders))

    def __getitem__(self, index: int) -> ImagePair:
        folder, own_index = locate(self.folders, self.mixture, index)
        return folder[own_index]

    def path(self, index: int) -> Path:
        """Return the path of a target image, which names the pair in messages."""
        return self[index].target

    def captions(self, index: int) -> Captions:
        """Return the captions of a target image."""
        return self[index].captions

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return a text that changes when the source or the target image changes.

        Args:
            index: Index of the pair.
            hash_of_file: Function that returns the hash of a file.

        Raises:
            OSError: A file cannot be read.
        """
        pair = self[index]
        return f"{hash_of_file(pair.source)} {hash_of_file(pair.target)}"

    def settings(self) -> dict[str, float]:
        """Return what a continuation of a run must match, beside the files."""
        return {"source_noise": self.options.source_noise}


def _captions_of(folder: Path, images: Mapping[str, Path]) -> Path | None:
    """Return a file of captions of a folder's images, in any way of other programs; None where there is none."""
    if (metadata := folder / METADATA_FILE).is_file():
        return metadata
    beside = (path.with_suffix(extension) for path in images.values() for extension in CAPTION_EXTENSIONS)
    return next((path for path in beside if path.is_file()), None)
