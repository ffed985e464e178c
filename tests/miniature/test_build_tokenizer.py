"""Test the shipped tokenizer on the captions and on any other text."""

import itertools

import pytest
from transformers import CLIPTokenizer

from d2f_fast.miniature import MINIATURE, emoji
from d2f_fast.miniature.build_tokenizer import all_captions

PAIRS = list(itertools.product(range(len(emoji.names())), range(len(emoji.BACKGROUNDS))))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")


def test_every_caption_fits_without_truncation(tokenizer: CLIPTokenizer) -> None:
    captions = all_captions()
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    assert max(lengths) == tokenizer.model_max_length
    assert len(captions) == len(set(captions)) == len(emoji.names()) * 9 + 1
    assert len(tokenizer) <= 2000


def test_tokens_decode_to_the_caption(tokenizer: CLIPTokenizer) -> None:
    for name, colour in PAIRS[:: len(PAIRS) // 100]:
        caption = emoji.caption(name, colour)
        read = tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True)
        assert read.replace(" ", "") == caption.replace(" ", "")  # CLIP's decoder puts spaces around hyphens.


@pytest.mark.parametrize(
    "text", ["", "quetzalcoatl", "ein Bär 🐻 auf 赤い背景", "\x00 \u200d \U0010ffff", "<|x|> " * 30]
)
def test_any_text_is_encoded_at_full_length(tokenizer: CLIPTokenizer, text: str) -> None:
    length = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
    assert len(ids) == length
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    words = tokenizer(text, add_special_tokens=False, padding=False, truncation=False).input_ids
    assert tokenizer.eos_token_id not in words  # As in CLIP the unknown token is the end token.
