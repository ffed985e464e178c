"""Find the captions that a model's tokenizers cut."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from d2f_fast.data.loading import CaptionedDataset, FileDataset, ImageDataset
from d2f_fast.data.source_images import SourceTargetDataset
from d2f_fast.errors import printable


class Tokenizer(Protocol):
    """Describe what is used of a tokenizer of transformers."""

    model_max_length: int

    def __call__(self, text: str, *, verbose: bool) -> "Tokens":
        """Return the tokens of a text, uncut, together with those that mark its start and end."""
        ...


class Tokens(Protocol):
    """Describe what is used of the result of a tokenizer."""

    input_ids: list[int]


class LongCaptions(NamedTuple):
    """Captions that are cut.

    Attributes:
        cut: Number of different captions that have more tokens than the text encoder takes.
        captions: Number of different captions.
        tokens: Number of tokens that the text encoder takes, its start and end included.
        first: File or sample of the first one.
    """

    cut: int
    captions: int
    tokens: int
    first: str

    def __str__(self) -> str:
        """Return the line that a run prints."""
        verb = "is" if self.cut == 1 else "are"
        return (
            f"{self.cut} of {self.captions} captions {verb} longer than the {self.tokens} tokens of the text encoder,"
            f" which does not see the rest; the first is that of {self.first}"
        )


def find_long_captions(
    dataset: ImageDataset | SourceTargetDataset, tokenizers: Iterable[Tokenizer]
) -> LongCaptions | None:
    """Count the captions that have more tokens than a text encoder takes.

    Args:
        dataset: Data set that returns its captions without reading the images (`CaptionedDataset`). Any other one is
            not looked at.
        tokenizers: Tokenizers of the model, each with the number of tokens that its text encoder takes.

    Returns:
        The captions, or None where none is too long.
    """
    if not isinstance(dataset, CaptionedDataset):
        return None
    tokenizers = list(tokenizers)
    tokens = min((tokenizer.model_max_length for tokenizer in tokenizers), default=0)
    seen: set[str] = set()
    cut, first = 0, ""
    for index in range(len(dataset)):
        for caption in dataset.captions(index).alternatives:
            if caption in seen:
                continue
            seen.add(caption)
            if any(_is_cut(caption, tokenizer) for tokenizer in tokenizers):
                first = first or _name(dataset, index)
                cut += 1
    return LongCaptions(cut, len(seen), tokens, first) if cut else None


def _name(dataset: object, index: int) -> str:
    """Return the file of a sample, or its number where the data set has no files."""
    return printable(dataset.path(index)) if isinstance(dataset, FileDataset) else f"sample {index}"


def _is_cut(caption: str, tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer cuts a caption."""
    # A token stands for one byte at least, and the marks of start and end are two more.
    if len(caption.encode()) + 2 <= tokenizer.model_max_length:
        return False
    return len(tokenizer(caption, verbose=False).input_ids) > tokenizer.model_max_length
