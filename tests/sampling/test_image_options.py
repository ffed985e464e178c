"""Options of the images that a network sees."""

from pathlib import Path

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.image_options import ImageOptions


def test_unusable_images_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    ImageOptions().check(2)
    ImageOptions((str(file),), 1.5).check(1)
    assert ImageOptions().given() == {}
    assert ImageOptions((str(file),), 1.5).given() == {"image": [str(file)], "image_guidance_scale": 1.5}
    with pytest.raises(RefusedInputError, match="image: give one file for each of the 2 prompts, got 1"):
        ImageOptions((str(file),)).check(2)
    with pytest.raises(RefusedInputError, match=r"image: .*missing\.png is not a file: check the path"):
        ImageOptions((str(tmp_path / "missing.png"),)).check(1)
    with pytest.raises(RefusedInputError, match=r"image_guidance_scale 1\.5 has no image to guide by: give --image"):
        ImageOptions(image_guidance_scale=1.5).check(1)
    with pytest.raises(RefusedInputError, match=r"image_guidance_scale must be .*got 0"):
        ImageOptions(image_guidance_scale=0)
