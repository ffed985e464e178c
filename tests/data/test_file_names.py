"""What the names of files and folders of a data set mean."""

import pytest

from d2f_fast.data.file_names import MAX_REPEATS, is_image, repeats_of, unread_images


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
