"""Checked captions, and the choice between alternatives."""

import pytest

from d2f_fast.data.captions import Captions, read_prompts
from d2f_fast.errors import DatasetError


def test_each_alternative_can_be_chosen():
    assert Captions(("only",)).choose(0.99) == "only"
    assert [Captions(("a", "b", "c")).choose(number) for number in (0, 0.33, 0.34, 0.66, 0.67)] == [
        "a",
        "a",
        "b",
        "b",
        "c",
    ]
    largest = 1 - 2**-53
    assert all(Captions(("x",) * (count - 1) + ("last",)).choose(largest) == "last" for count in range(1, 1000))


def test_checked_captions_are_stripped_and_keep_their_order():
    assert Captions.check(" a cat\n", "file") == Captions(("a cat",))
    assert Captions.check([" b", "a "], "file") == Captions(("b", "a"))
    assert Captions.check(["only"], "file").text == "only"
    assert Captions.check(["b", "a"], "file").text == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is missing or empty: give each image a caption"),
        ([], "is missing or empty: give each image a caption"),
        (["fine", " "], "is missing or empty: give each image a caption"),
        (7, "is not text: give each image a caption"),
        ("x" * 10_001, "is a caption of more than 10000 characters: shorten it"),
        ("\ud800", "holds half a surrogate pair, which no tokenizer reads: correct it"),
    ],
)
def test_unusable_caption_is_refused_by_name(text, problem):
    with pytest.raises(DatasetError) as caught:
        Captions.check(text, "a.txt")
    assert str(caught.value) == f"a.txt {problem}"


def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a cat \r\n\n\tb\nlast".encode())
    assert read_prompts(path) == ["a cat", "b", "last"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b" \n\n", "prompts.txt holds no prompts: write one on each line"),
        (b"a\nb\xff\n", "prompts.txt, line 2 is not UTF-8 text"),
        (b"a\n" + b"x" * 10_001, "prompts.txt, line 2 is a caption of more than 10000 characters"),
        (b"a\n" + b"x" * 100_000, "prompts.txt, line 2 is a caption of more than 10000 characters"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_with_their_line(content, sentence, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_prompts(path)
    assert sentence in str(caught.value)
