"""Errors that a user can act on; the command line prints their one line and exits with code 2."""


class RefusedInputError(ValueError):
    """Input that cannot be used. The message is one line: the file, the key, and what to do."""


class DatasetError(RefusedInputError):
    """A training set, an image or a caption that cannot be read or understood."""


class CheckpointError(RefusedInputError):
    """A checkpoint that is missing, incomplete or corrupt."""


class ModelError(RefusedInputError):
    """A base model, scheduler configuration or LoRA file that cannot be used."""


def printable(name: object) -> str:
    """Text of a path or a key for a one-line message: escaped where it holds line breaks or control characters."""
    text = str(name)
    return text if text.isprintable() else repr(text)
