"""Check captions, read caption files, and choose one of several captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from d2f_fast.errors import DatasetError, printable

MAX_CAPTION_CHARACTERS = 10_000
_MAX_CAPTION_BYTES = 4 * MAX_CAPTION_CHARACTERS + 3  # UTF-8 characters and a byte order mark


@dataclass(frozen=True)
class Captions:
    """Checked captions of one image, of which each epoch uses one.

    Attributes:
        alternatives: One caption or more, none of them empty, without white space at either end.
    """

    alternatives: tuple[str, ...]

    @classmethod
    def check(cls, text: object, where: str) -> "Captions":
        """Return the captions that a data set gave for an image, or refuse them.

        This is the one place that checks captions: the type says that it was done.

        Args:
            text: A caption, or a list of alternative captions.
            where: Beginning of an error message: the file, line or sample, and the key.

        Raises:
            DatasetError: A caption is missing, empty, too long, or not text.
        """
        given = text if isinstance(text, list) and text else [None if text == [] else text]
        return cls(tuple(_check_caption(caption, where) for caption in given))

    @property
    def text(self) -> str | list[str]:
        """Return the only caption, or the list of alternatives where there are several."""
        return self.alternatives[0] if len(self.alternatives) == 1 else list(self.alternatives)

    def choose(self, number: float) -> str:
        """Return the caption that a number in [0, 1) selects, each with the same probability."""
        return self.alternatives[int(number * len(self.alternatives))]


def read_caption_file(path: Path) -> Captions:
    """Read a UTF-8 text file as one caption.

    Args:
        path: Text file. White space at either end and a byte order mark are not part of the caption.

    Raises:
        DatasetError: The file cannot be read, is not UTF-8, or is not a usable caption.
    """
    try:
        with path.open("rb") as file:
            encoded = file.read(_MAX_CAPTION_BYTES + 1)
        if len(encoded) > _MAX_CAPTION_BYTES:
            _refuse_long(printable(path))
        return Captions.check(encoded.decode("utf-8-sig"), printable(path))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{printable(path)} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error


def read_prompts(path: Path) -> list[str]:
    """Read a UTF-8 text file with one prompt on each line.

    Args:
        path: Text file. Empty lines, white space at either end of a line and a byte order mark are passed over.

    Raises:
        DatasetError: The file cannot be read, is not UTF-8, holds no prompt, or a line is not a usable prompt.
    """
    prompts = []
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_CAPTION_BYTES + 1):
                number += 1
                where = f"{printable(path)}, line {number}"
                if len(line) > _MAX_CAPTION_BYTES:
                    _refuse_long(where)
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    prompts.append(_check_caption(text, where))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is not UTF-8 text: save the file as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error
    if not prompts:
        raise DatasetError(f"{printable(path)} holds no prompts: write one on each line")
    return prompts


def _check_caption(caption: object, where: str) -> str:
    """Return one caption without the white space around it, or refuse it."""
    if not isinstance(caption, str) or not caption.strip():
        problem = "is not text" if caption is not None and not isinstance(caption, str) else "is missing or empty"
        raise DatasetError(f"{where} {problem}: give each image a caption")
    if len(caption.strip()) > MAX_CAPTION_CHARACTERS:
        _refuse_long(where)
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"{where} holds half a surrogate pair, which no tokenizer reads: correct it") from error
    return caption.strip()


def _refuse_long(where: str) -> NoReturn:
    """Raise the error for a caption that is too long."""
    raise DatasetError(f"{where} is a caption of more than {MAX_CAPTION_CHARACTERS} characters: shorten it")
