"""Check captions, read caption files, and choose one of several captions."""

from pathlib import Path
from typing import NoReturn

from d2f_fast.errors import DatasetError, printable


def choose_caption(text: str | list[str], draw: float) -> str:
    """Caption that a draw in [0, 1) picks among the alternatives."""
    return text if isinstance(text, str) else text[int(draw * len(text))]


MAX_CAPTION_CHARACTERS = 10_000


_MAX_CAPTION_BYTES = 4 * MAX_CAPTION_CHARACTERS + 3  # UTF-8 and a byte order mark


def read_caption_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            encoded = file.read(_MAX_CAPTION_BYTES + 1)
        if len(encoded) > _MAX_CAPTION_BYTES:
            _refuse_long(printable(path))
        return _validated_caption(encoded.decode("utf-8-sig"), printable(path))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{printable(path)} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error


def _refuse_long(where: str) -> NoReturn:
    raise DatasetError(f"{where} is a caption of more than {MAX_CAPTION_CHARACTERS} characters: shorten it")


def _validated_caption(caption: object, where: str) -> str:
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


def validated_text(text: object, where: str) -> str | list[str]:
    """A caption, or a list of captions, stripped."""
    if isinstance(text, list) and text:
        return [_validated_caption(caption, where) for caption in text]
    return _validated_caption(None if text == [] else text, where)
