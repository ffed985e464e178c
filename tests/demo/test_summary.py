"""Test that the sentences follow the numbers, for wins and losses alike."""

from collections.abc import Callable
from typing import Any

from d2f_fast.demo.summary import readings

Rows = list[dict[str, Any]]


def test_readings_report_wins_and_losses(make_rows: Callable[..., Rows]) -> None:
    won: Any = make_rows(aligned=5.0, naive=90.0, reflow=6.0, base=40.0)
    lost: Any = make_rows(aligned=90.0, naive=5.0, reflow=40.0, base=6.0)
    wins, losses = readings(won), readings(lost)
    first = "After 20 training steps the aligned LoRA has a Fréchet distance (lower is better) of"
    assert wins["continued"][0] == (
        f"{first} 5 (4.5 to 5.5), which is lower than that of the naive LoRA after 40: 90 (89.5 to 90.5)."
    )
    assert losses["continued"][0].startswith(f"{first} 90 (89.5 to 90.5), which is higher than")
    assert "the aligned network is the base, with 14, and the naive one has 99." in wins["continued"][1]
    assert wins["few_steps"][0] == (
        "With 1 network evaluation for each image, the reflow LoRA has a Fréchet distance of 6 (5.5 to 6.5), which is"
        " lower than that of the base at the best of its settings with at most 2, 20 (19.5 to 20.5)."
    )
    assert "is higher than" in losses["few_steps"][0] and "is higher than" in losses["few_steps"][1]
    assert "With at most 25 network evaluations the base reaches 1.6" in wins["few_steps"][-1]
    assert "no pixel differs by more than 0.013 of 255" in wins["same_images"][0]
    assert "images are 10 above real images of the second style (the base's 89), and 75%" in wins["style"][1]


def test_each_sentence_is_short(make_rows: Callable[..., Rows]) -> None:
    rows: Any = make_rows(aligned=5.0, naive=5.2, reflow=6.0, base=6.2)
    sentences = [sentence for section in readings(rows).values() for sentence in section]
    assert max(len(sentence.split(". ")[0].split()) for sentence in sentences) <= 50
    assert sum("cannot be distinguished from" in sentence for sentence in sentences) == 2
