"""Patterns of peft, looked up as peft does, and in bounded time."""

import time

import pytest
from peft.utils.other import get_pattern_key

from d2f_fast.lora.patterns import PatternError, PatternTable

NAMES = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.proj_in",
    "conv_in",
    "down_blocks.1.resnets.0.conv1",
)


@pytest.mark.parametrize(
    "keys",
    [
        ["to_q"],
        ["attn1.to_q", "to_q"],
        ["to_q", "attn1.to_q"],
        [r"attn1\.to_q", "conv_in"],
        ["down_blocks.*to_q"],
        ["^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q$"],
        ["^attn1.to_q", "^conv_in"],
        ["attn.*", "proj_in"],
        ["down_blocks.*attn.+0", ".*"],
        ["blocks.0.*", "down_blocks.+.*conv1"],
        ["o_q", "q"],
        [".*transformer_blocks.*to_q"],
        ["down_blocks.0.attentions.*attn1.*attn1.to_q"],
        ["0.attn1.to_q.*", "conv_in.+"],
    ],
    ids=" ".join,
)
def test_same_key_counts_as_in_peft(keys: list[str]) -> None:
    table = PatternTable({key: key for key in keys})
    for name in NAMES:
        expected = get_pattern_key(keys, name)
        assert table.get(name, name) == expected, name


@pytest.mark.parametrize("key", ["(a+)+b", "a|b", "[ab]", r"\d", "a{2}", "a*", "a?", "a\\", "x" * 501, "a$b"])
def test_other_regular_expressions_are_refused(key: str) -> None:
    with pytest.raises(PatternError, match=r"regular expression other than|a key has 501 characters"):
        PatternTable({key: 1})


def test_many_wildcards_are_refused_and_long_keys_take_no_time() -> None:
    with pytest.raises(PatternError, match="65 keys have wildcards, at most 64 may"):
        PatternTable({f".*{i}": i for i in range(65)})
    table = PatternTable({".*a" * 160 + str(i): i for i in range(64)})
    started = time.process_time()
    assert table.get("a" * 400, None) is None and table.get("a." * 200, None) is None
    assert time.process_time() - started < 1
