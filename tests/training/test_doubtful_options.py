"""Options that are accepted, but probably not meant."""

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.training.doubtful_options import doubts, doubts_about_pairs


@pytest.mark.parametrize(
    ("side", "own", "words"),
    [
        (256, 512, None),
        (1024, 512, None),
        (248, 512, "less than half of"),
        (1032, 512, "more than twice"),
        (8, None, None),
    ],
)
def test_resolution_far_from_the_size_of_the_model_is_said(side: int, own: int | None, words: str | None) -> None:
    lines = doubts(TrainingConfig(resolution=side), own)
    sentence = f"resolution {side} is {words} the size that the model was made for, {own} x {own} pixels: expect worse"
    assert len(lines) == (words is not None) and all(line.startswith(sentence) for line in lines)


def test_warm_up_that_is_not_shorter_than_the_run_is_said() -> None:
    options = {"lr_scheduler": "linear", "lr_warmup_steps": 40, "learning_rate": 1e-3}
    assert doubts(TrainingConfig(max_train_steps=41, **options), None) == []
    (line,) = doubts(TrainingConfig(max_train_steps=10, **options), None)
    assert line == "lr_warmup_steps 40 is not shorter than the run: the learning rate only reaches 25% of 0.001"


def test_oblong_size_is_judged_by_its_area() -> None:
    assert doubts(TrainingConfig(resolution=(512, 2048)), 512) == []  # 1024 x 1024
    (line,) = doubts(TrainingConfig(resolution=(512, 512, 512, 2056)), 512)
    assert line.startswith("resolution 512 x 2056 is more than twice the size that the model was made for, 512 x 512")


def test_pairs_of_another_start_are_said() -> None:
    made_with = ["0123:1"]
    assert doubts_about_pairs(TrainingConfig(), []) == doubts_about_pairs(TrainingConfig(), None) == []
    assert doubts_about_pairs(TrainingConfig(init_lora="a", distill=True), made_with) == []
    (line,) = doubts_about_pairs(TrainingConfig(), made_with)
    assert line.startswith("the pairs were made with a LoRA, and the run starts without it: to start where they were")
    (line,) = doubts_about_pairs(TrainingConfig(distill=True), [])
    assert line.startswith("--distill learns a single jump, which follows a straightened path only")
    assert doubts_about_pairs(TrainingConfig(distill=True, adapter="full"), []) == []
