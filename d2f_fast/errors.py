"""Errors that a user can act on. The command line prints their one line and exits with code 2."""


class RefusedInputError(ValueError):
    """Input that cannot be used. The message is one line that names the file or key, the problem and the cure."""


class DatasetError(RefusedInputError):
    """A training set, an image or a caption that cannot be read or understood."""


class CheckpointError(RefusedInputError):
    """A checkpoint that is missing, incomplete or corrupt."""


class ModelError(RefusedInputError):
    """A base model, scheduler configuration or LoRA file that cannot be used."""


def printable(name: object) -> str:
    """Return the text of a path or key for a one-line message.

    Args:
        name: Path, key or other object. Its text is escaped where it holds line breaks or control characters.
    """
    text = str(name)
    return text if text.isprintable() else repr(text)
