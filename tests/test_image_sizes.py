"""Sizes of training images, as `--resolution` states them."""

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.image_sizes import Size, check_data_sets, first_size, size_text, sizes_differ, sizes_of


@pytest.mark.parametrize(
    ("given", "kept", "sizes", "text"),
    [
        (64, 64, [(64, 64)], "64"),
        ((64,), 64, [(64, 64)], "64"),
        ((48, 48), 48, [(48, 48)], "48"),
        ((48, 64), (48, 64), [(48, 64)], "48x64"),
        ((48, 64, 64, 64), (48, 64, 64, 64), [(48, 64), (64, 64)], "48x64 64x64"),
        ((48, 64, 48, 64), (48, 64, 48, 64), [(48, 64), (48, 64)], "48x64 48x64"),
    ],
)
def test_numbers_are_a_side_or_pairs_of_height_and_width(
    given: int | tuple[int, ...], kept: object, sizes: list[tuple[int, int]], text: str
) -> None:
    resolution = TrainingConfig(resolution=given).resolution
    assert resolution == kept and resolution is not None
    assert sizes_of(resolution) == tuple(Size(*size) for size in sizes)
    assert sizes_differ(resolution) == (len(set(sizes)) > 1)
    assert size_text(resolution) == text and first_size(text) == sizes[0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (4, "resolution must be at least 8, got 4"),
        ((64, 4), "resolution must be at least 8, got 4"),
        ((64, 1 << 15), "resolution must be at most 16,384, got 32768"),
        ((), "must be one number for squares, or pairs of a height and a width, got 0 numbers"),
        ((48, 64, 64), "must be one number for squares, or pairs of a height and a width, got 3 numbers"),
    ],
)
def test_numbers_that_do_not_form_a_size_are_refused(given: int | tuple[int, ...], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        TrainingConfig(resolution=given)


@pytest.mark.parametrize(
    ("resolution", "data_sets", "sentence"),
    [
        ((48, 64, 64, 64), 1, "resolution: 4 numbers for 1 data set: give one number for a square, or its height and"),
        (
            (48, 64),
            2,
            "2 numbers for 2 data sets: give one number for squares of one size, or 4 numbers, the height an",
        ),
        (
            (48, 64, 64, 64),
            3,
            "resolution: 4 numbers for 3 data sets: give one number for squares of one size, or 6 nu",
        ),
    ],
)
def test_numbers_that_leave_open_which_size_a_data_set_has_are_refused(
    resolution: tuple[int, ...], data_sets: int, sentence: str
) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        check_data_sets(resolution, data_sets)


def test_one_number_or_a_size_for_each_data_set_is_accepted() -> None:
    for resolution, data_sets in ((None, 3), (64, 3), ((48, 64), 1), ((48, 64, 64, 64), 2)):
        check_data_sets(resolution, data_sets)


@pytest.mark.parametrize("text", ["", "wide", "64x", "0", "64x0", "16385", "-8"])
def test_text_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a size in pixels, such as 64 or 48x64 \(height x width\), got"):
        first_size(text)
