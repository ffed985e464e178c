"""What a description says of folders of images and of caches, and what it finds missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from d2f_fast.data.cache import CacheKey, TensorCache
from d2f_fast.data.describe import describe_cache, describe_data_set


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images with captions, one of them in a folder that repeats it."""
    folder = tmp_path / "images"
    for name, size in {"a.png": (600, 512), "b.JPG": (64, 300), "5_cat/c.png": (512, 512)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("a cat")
    return folder


def test_complete_folder_is_counted(images: Path) -> None:
    found = describe_data_set(images)
    assert found["kind"] == "data set, captions in *.txt files"
    assert (found["images"], found["captions"], found["repeats"]) == (3, 3, "5_cat")
    assert found["sizes"] == "64 × 300 to 600 × 512"
    assert [text.split(",")[0] for text in found["odd"]] == [
        "1 images are shorter than 512 pixels on one side",
        "1 images are more than three times as long as wide: most is cropped away",
    ]


def test_missing_empty_and_other_captions_are_named(images: Path) -> None:
    (images / "a.txt").unlink()
    (images / "b.txt").rename(images / "b.caption")
    (images / "5_cat/c.txt").write_text(" \n")
    (images / "d.png").write_bytes(b"no image")
    found = describe_data_set(images)
    assert found["captions"] == 0
    odd = "\n".join(found["odd"])
    assert "1 images cannot be read, such as" in odd and "d.png" in odd
    assert "3 images have no caption file *.txt" in odd
    assert "1 of them have a .caption file: train with --caption_extension .caption" in odd
    assert "1 captions are empty" in odd


def test_unread_formats_and_too_many_repeats_are_named(images: Path) -> None:
    (images / "2024_trip").mkdir()
    for name in ("2024_trip/d.png", "e.tif"):
        Image.new("RGB", (512, 512)).save(images / name)
        (images / name).with_suffix(".txt").write_text("a cat")
    found = describe_data_set(images)
    assert (found["images"], found["repeats"]) == (4, "2024_trip, 5_cat")
    assert "1 captioned images are of formats that are not read, such as e.tif" in found["odd"]
    assert "2024_trip asks for more than 200 repeats, which is refused: rename it" in found["odd"]


def test_lines_of_the_metadata_file_are_compared_with_the_images(images: Path) -> None:
    lines = [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}, {"file_name": "b.JPG"}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno JSON\n")
    found = describe_data_set(images)
    assert found["kind"] == "data set, captions in metadata.jsonl" and found["captions"] == 1
    odd = "\n".join(found["odd"])
    assert "2 lines have no file_name, no text or are not JSON" in odd
    assert "1 images that are listed do not exist, such as gone.png" in odd
    assert "2 images are not listed with a caption" in odd


def test_contents_of_a_cache_are_counted(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, {}, torch.float16)
    for i in range(3):
        key = CacheKey(f"{i:064x}", "an image")
        cache.get_or_compute([key], lambda _: {"mean": torch.ones(1, 4, 8, 8), "std": torch.ones(1, 4, 8, 8)})
    captions = CacheKey("ab" * 32, "a caption")
    cache.get_or_compute([captions], lambda _: {"encoder_hidden_states": torch.ones(1, 77, 768)})
    found = describe_cache(tmp_path)
    assert found["samples"] == 4 and found["odd"] == []
    assert found["contents"] == {
        "latents: mean F16 [4, 8, 8], std F16 [4, 8, 8]": 3,
        "captions: encoder_hidden_states F16 [77, 768]": 1,
    }
    (tmp_path / "00" / f"{0:064x}.safetensors").write_bytes(b"cut")
    (tmp_path / "unfinished" / "x").write_bytes(b"")
    odd = describe_cache(tmp_path)["odd"]
    assert odd[0].startswith("1 files are damaged and will be computed again")
    assert odd[1].startswith("1 unfinished files")


def test_describing_imports_no_torch() -> None:
    code = "import sys, d2f_fast.data.describe; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
