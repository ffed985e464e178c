"""Captions that are longer than the text encoder's tokens, counted with the tokenizer of the tiny model."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPTokenizer

from d2f_fast.data.captions import Captions
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.long_captions import find_long_captions


class InMemory:
    """Samples with captions and without files."""

    def __init__(self, *captions: str | list[str]) -> None:
        self._captions = [Captions.check(caption, "a caption") for caption in captions]

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("no image is read")

    def captions(self, index: int) -> Captions:
        return self._captions[index]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> CLIPTokenizer:
    """Tokenizer of the tiny model."""
    return CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")


def tokens_of(tokenizer: CLIPTokenizer, caption: str) -> int:
    return len(tokenizer(caption)["input_ids"])


def test_captions_above_the_limit_are_counted_once_each(tokenizer: CLIPTokenizer) -> None:
    limit = tokenizer.model_max_length
    words = ["a"] * limit
    while tokens_of(tokenizer, " ".join(words)) > limit:
        words.pop()
    fits, longer = " ".join(words), " ".join([*words, "a"])
    assert tokens_of(tokenizer, fits) == limit < tokens_of(tokenizer, longer)
    assert find_long_captions(InMemory(fits, "a"), [tokenizer]) is None
    found = find_long_captions(InMemory(fits, ["a", longer], longer, longer + " b"), [tokenizer, tokenizer])
    assert found == (2, 4, limit, "sample 1")
    assert str(found) == (
        f"2 of 4 captions are longer than the {limit} tokens of the text encoder, which does not see the rest; the"
        " first is that of sample 1"
    )


def test_first_long_caption_is_named_by_its_file(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    for name, caption in {"a": "a", "b": "a " * 500}.items():
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    found = find_long_captions(CaptionedImages(tmp_path), [tokenizer])
    assert found is not None
    assert (found.cut, found.first) == (1, str(tmp_path / "b.png"))


def test_data_set_that_returns_captions_only_with_images_is_not_read(tokenizer: CLIPTokenizer) -> None:
    assert find_long_captions([{"image": None, "text": "a " * 500}], [tokenizer]) is None
