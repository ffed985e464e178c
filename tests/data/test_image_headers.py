"""Sizes of image files, read from their headers."""

from pathlib import Path

import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

from d2f_fast.data.image_headers import stored_size
from d2f_fast.errors import DatasetError


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_size_is_read_without_decoding(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (5, 3)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(ImageFile, "load", lambda image: pytest.fail("the image was decoded"))
    assert stored_size(tmp_path / f"a.{suffix}") == (5, 3)


def test_file_without_the_header_of_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(
        DatasetError, match=r"a\.png does not decode as PNG, JPEG, WEBP, BMP \(unknown format\): replace"
    ):
        stored_size(tmp_path / "a.png")
