"""CLIP's tokenizer: made of an installed package's byte pairs, read from folders, and refused in one line."""

import gzip
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from d2f_fast.errors import ModelError
from d2f_fast.models.clip_tokenizer import clip_tokenizer, find_byte_pairs

PAIRS = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "t</w>"), ("Ġ", "x")]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Package named "open_clip" that fails when it is imported, with a file of few byte pairs."""
    for name in ("open_clip", "clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    folder = tmp_path / "packages" / "open_clip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package was imported')")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in PAIRS), ""]
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wb") as file:
        file.write("\n".join(lines).encode())
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def merged(word: str) -> list[str]:
    """Return the parts of a word, by OpenAI's rule: the pair that is listed first is merged first."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while found := [pair for pair in PAIRS if pair in pairwise(parts)]:
        i = list(pairwise(parts)).index(found[0])
        parts[i : i + 2] = ["".join(found[0])]
    return parts


def test_byte_pairs_of_an_installed_package_give_the_tokens_of_openai(package: Path) -> None:
    assert find_byte_pairs() == package / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = clip_tokenizer(None, "!", 10, 512 + len(PAIRS) + 2)
    assert len(tokenizer) == 512 + len(PAIRS) + 2 and tokenizer.pad_token == "!"
    # The first tokens are the bytes in the order of their letters, once inside and once at the end of a word.
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("!", "~", "¡", "!</w>")] == [0, 93, 94, 256]
    text = "cat dog CAT oat at"
    expected = [token for word in text.lower().split() for token in merged(word)]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<|startoftext|>", *expected, "<|endoftext|>"]
    assert tokenizer("cat", padding="max_length").input_ids[3:] == [0] * 7


def test_folder_of_a_tokenizer_or_of_a_pipeline_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    ids = clip_tokenizer(str(tiny_folder / "tokenizer"), "!", 8, 54)("ab").input_ids
    assert clip_tokenizer(str(tiny_folder), "!", 8, 54)("ab").input_ids == ids
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_folder.parent / name, tmp_path / name)
    assert clip_tokenizer(str(tmp_path), "!", 8, 54)("ab").input_ids == ids


def test_pad_token_that_the_vocabulary_lacks_is_not_added(tiny_folder: Path) -> None:
    tokenizer = clip_tokenizer(str(tiny_folder), "!", 8, 54)
    assert len(tokenizer) == 54 and tokenizer.pad_token == "<|endoftext|>"


def test_missing_vocabulary_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2f_fast.models.clip_tokenizer._PACKAGES", ())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no installed package has CLIP's: pip install open_clip_torch, or"):
        clip_tokenizer(None, "!", 77, 49408)
    for source, sentence in (
        ("./nothing", "nothing is not a folder"),
        (str(tmp_path), "holds no vocab.json and merges.txt"),
    ):
        with pytest.raises(ModelError, match=sentence) as caught:
            clip_tokenizer(source, "!", 77, 49408)
        assert "\n" not in str(caught.value) and "tokenizer_name_or_path" in str(caught.value)


def test_damaged_files_are_refused(package: Path, tmp_path: Path) -> None:
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(ModelError, match=r"cannot be read .*: install the package again"):
        clip_tokenizer(None, "!", 77, 49408)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        clip_tokenizer(str(tmp_path), "!", 77, 49408)
    assert "\n" not in str(caught.value)


def test_vocabulary_that_is_larger_than_the_text_encoder_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="has 54 tokens, and the model's text encoder knows 53"):
        clip_tokenizer(str(tiny_folder), "!", 8, 53)


def test_published_vocabulary_gives_the_published_tokens() -> None:
    if find_byte_pairs() is None:
        pytest.skip("open_clip_torch is not installed")
    tokenizer = clip_tokenizer(None, "<|endoftext|>", 77, 49408)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
