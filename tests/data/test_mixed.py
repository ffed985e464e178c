"""Captioned images of several folders behind one index."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.mixed import MixedDataset, MixedImages, mixture_of
from d2f_fast.errors import RefusedInputError


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str, int], CaptionedImages]:
    """Return a function that writes a folder of captioned images."""

    def write(name: str, count: int) -> CaptionedImages:
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
        return CaptionedImages(tmp_path / name)

    return write


def test_images_of_the_first_folder_come_first(folder: Callable[[str, int], CaptionedImages]) -> None:
    mixed = MixedImages([folder("a", 2), folder("b", 3)], (1.0, 4.0))
    assert isinstance(mixed, MixedDataset) and mixed.mixture is not None and mixed.mixture.counts == (1, 4)
    assert [mixed.captions(index).text for index in range(len(mixed))] == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    assert mixed.path(3).parts[-2:] == ("b", "1.png")
    image: Image.Image = mixed[4]["image"]
    assert image.getpixel((0, 0)) == (2, 0, 0) and mixed[4]["text"] == "b 2"


def test_weights_are_the_numbers_of_samples_unless_they_are_given() -> None:
    assert mixture_of([7], None) is None
    plain, weighted = mixture_of([30, 10], None), mixture_of([30, 10], [1, 1])
    assert plain is not None and plain.counts == (30, 10)
    assert weighted is not None and weighted.counts == (20, 20)


@pytest.mark.parametrize(
    ("sizes", "weights", "sentence"),
    [
        ([7], [1.0], "dataset_weights: 1 for 1 data set: give several folders after --train_data_dir, and one weight"),
        ([7, 7], [1.0], "dataset_weights: 1 for 2 data sets: give several folders"),
        ([7, 7], [1.0, -1.0], "dataset_weights: sizes and weights must be positive and finite"),
        ([7, 7], [1.0, 1e-9], "dataset_weights: the weight 1e-09 leaves data set 1 without a sample in an epoch: corr"),
    ],
)
def test_weights_that_do_not_fit_the_data_sets_are_refused(
    sizes: list[int], weights: list[float], sentence: str
) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        mixture_of(sizes, weights)
