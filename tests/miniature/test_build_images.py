"""Image folders of emoji at several sizes, from the npm packages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.errors import RefusedInputError
from d2f_fast.miniature import emoji
from d2f_fast.miniature.build_images import build_images

CODES = ("1F98A", "1F989")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the layout of both npm packages, and two emoji; the second has one style alone."""
    noto = tmp_path / "node_modules" / "emoji-datasource-google"
    fluent = tmp_path / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"
    (noto / "img/google/64").mkdir(parents=True)
    fluent.mkdir(parents=True)
    entries = []
    for number, code in enumerate(CODES):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = (10, 20, 30 + number, 255)  # a square in the middle, the rest transparent
        Image.fromarray(pixels).save(noto / "img/google/64" / f"{code.lower()}.png")
        entry = {"unified": code, "non_qualified": None, "image": f"{code.lower()}.png", "name": f"NAME {number}"}
        entries.append(entry | {"category": "Animals & Nature", "sort_order": number, "has_img_google": True})
    Image.new("RGBA", (96, 96), (200, 0, 0, 255)).save(fluent / f"{CODES[0].lower()}.webp", lossless=True)
    (noto / "emoji.json").write_text(json.dumps(entries))
    monkeypatch.setattr(emoji, "names", lambda: ("name 0", "name 1"))
    monkeypatch.setattr(emoji, "held_out_pairs", lambda: frozenset({(0, 2), (1, 0)}))
    return tmp_path / "node_modules"


@pytest.mark.parametrize("size", [48, 64])
def test_folder_holds_the_combinations_of_its_split_at_the_size(size: int, npm: Path, tmp_path: Path) -> None:
    build_images(npm, tmp_path / "train", size, "noto", "train")
    build_images(npm, tmp_path / "test", size, "noto", "test")
    train, test = CaptionedImages(tmp_path / "train"), CaptionedImages(tmp_path / "test")
    texts = [[folder.captions(i).text for i in range(len(folder))] for folder in (train, test)]
    assert texts[1] == ["a name 0 on a red background", "a name 1 on a black background"]
    assert len(texts[0]) == 14 and not set(texts[0]) & set(texts[1])
    image = test[0]["image"]
    assert image.size == (size, size) and image.getpixel((0, 0)) == emoji.BACKGROUNDS["red"]
    assert image.getpixel((size // 2, size // 2)) == (10, 20, 30)


def test_style_has_its_own_images_and_some_may_be_chosen(npm: Path, tmp_path: Path) -> None:
    build_images(npm, tmp_path / "all", 64, "fluent", "train")
    build_images(npm, tmp_path / "some", 64, "fluent", "train", 3)
    every, some = CaptionedImages(tmp_path / "all"), CaptionedImages(tmp_path / "some")
    assert len(every) == 7 and every[0]["image"].getpixel((5, 5)) == (200, 0, 0)
    texts = [[folder.captions(i).text for i in range(len(folder))] for folder in (every, some)]
    assert len(texts[1]) == 3 and set(texts[1]) < set(texts[0])


def test_images_that_cannot_be_made_are_refused(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with pytest.raises(RefusedInputError, match=r"size 72: .*1f98a\.png has 64 pixels: give a smaller size"):
        build_images(npm, output, 72, "noto", "train")
    with pytest.raises(RefusedInputError, match="size must be at least 1, got 0: 64 is the largest for noto"):
        build_images(npm, output, 0, "noto", "train")
    with pytest.raises(RefusedInputError, match="count must be 1 to 2 for the split test, got 3"):
        build_images(npm, output, 64, "noto", "test", 3)
    with pytest.raises(RefusedInputError, match=r"emoji\.json is missing: give the node_modules folder"):
        build_images(tmp_path, output, 64, "noto", "train")
    monkeypatch.setattr(emoji, "names", lambda: ("name 0",))
    with pytest.raises(RefusedInputError, match="has other emoji than this package: install the versions"):
        build_images(npm, output, 64, "noto", "train")
    assert not output.exists()
