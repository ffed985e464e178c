"""What the names of files and folders of a data set mean."""

from pathlib import Path

import pytest

from d2f_fast.data.file_names import MAX_REPEATS, check_columns, is_image, repeats_of, unread_images
from d2f_fast.errors import DatasetError


@pytest.mark.parametrize(
    ("name", "repeats"),
    [
        ("a.png", ("", 1)),
        ("2024/3d_cat/a.png", ("", 1)),
        ("10_cat/a.png", ("10_cat", 10)),
        ("10_cat/deep/a.png", ("10_cat", 10)),
        ("10_cat/0_off/a.png", ("10_cat/0_off", 0)),
        ("10_cat.png", ("", 1)),
        (f"{'1' * 5000}_x/a.png", (f"{'1' * 5000}_x", MAX_REPEATS + 1)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_innermost_numbered_folder_gives_the_repeats(name: str, repeats: tuple[str, int]) -> None:
    assert repeats_of(name) == repeats


def test_extensions_are_compared_without_case() -> None:
    assert is_image("A.PNG") and is_image("b.JfIf") and not is_image("png") and not is_image("a.tif")


def test_only_captioned_images_without_a_readable_twin_are_unread() -> None:
    names = ["a.png", "a.tif", "b.tif", "c.GIF", "0_off/d.tif", "notes.md", "e.avif"]
    assert unread_images(names, lambda name: name != "e.avif") == ["b.tif", "c.GIF"]


def test_option_of_the_other_layout_is_refused(tmp_path: Path) -> None:
    for options, name in (({"image_column": "image"}, "image_column image"), ({"caption_column": "text"}, "caption_c")):
        with pytest.raises(
            DatasetError, match=rf"{name}.* is read from metadata\.jsonl, which .* does not hold: leave"
        ):
            check_columns(
                tmp_path, **{"image_column": None, "caption_column": None, "caption_extension": None} | options
            )
    check_columns(tmp_path, None, None, ".caption")
    (tmp_path / "metadata.jsonl").touch()
    check_columns(tmp_path, "image", "text", None)
    with pytest.raises(DatasetError, match=r"caption_extension \.txt has no effect, .* leave caption_extension out"):
        check_columns(tmp_path, None, None, ".txt")
