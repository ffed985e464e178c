"""Files of two folders that belong together by their names."""

import re
from pathlib import Path

import pytest

from d2f_fast.data.partner_files import check_partners, files_by_stem
from d2f_fast.errors import DatasetError


def test_files_are_found_by_their_path_without_the_extension(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.d.PNG", "e.txt", ".f.png", ".g/h.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_by_stem(tmp_path, lambda name: name.lower().endswith(".png"))
    assert found == {"a": tmp_path / "a.png", "b/c.d": tmp_path / "b/c.d.PNG"}
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DatasetError, match=r"have one name: remove one of them"):
        files_by_stem(tmp_path, lambda name: name.startswith("a."))


def test_links_to_folders_and_broken_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DatasetError, match=r"a\.png is not a file, or a broken link: remove it"):
        files_by_stem(tmp_path, lambda name: name.endswith(".png"))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(DatasetError, match="c is a link to a folder: replace it by the folder, or remove it"):
        files_by_stem(tmp_path, lambda name: name.endswith(".png"))


@pytest.mark.parametrize(("missing", "kind"), [(0, "image"), (1, "depth")])
def test_file_without_a_partner_is_refused(missing: int, kind: str) -> None:
    both = [{stem: Path(f"{side}/{stem}.png") for stem in "ab"} for side in ("x", "y")]
    files = dict(zip(("image", "depth"), both, strict=True))
    check_partners(Path("folder"), files)
    del both[missing]["b"]
    sentence = f"folder: 1 of 2 files have no {kind} of the same name, such as {'yx'[missing]}/b.png: add what is"
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        check_partners(Path("folder"), files)
