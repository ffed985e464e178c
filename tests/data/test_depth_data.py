"""The layout of a folder decides how its depth is read."""

import tarfile
from pathlib import Path

import pytest

from d2f_fast.data.depth_data import find_depth_images, find_depth_sources
from d2f_fast.data.depth_images import DepthImages
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.depth_shards import DepthShards
from d2f_fast.errors import RefusedInputError


def test_folder_of_files_and_folder_of_shards_are_told_apart(depth_rooms: Path, tmp_path: Path) -> None:
    options = DepthOptions(depth_min=0.5, depth_max=5.0, depth_scale=2.0)
    images = find_depth_images(depth_rooms, options)
    assert isinstance(images, DepthImages)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(depth_rooms / "rgb/00000.png", "a.image.png")
        tar.add(depth_rooms / "depth/00000.npy", "a.depth.npy")
    shards = find_depth_images(tmp_path, options)
    assert isinstance(shards, DepthShards)
    for source in (images, shards):
        assert (source.scale, source.least, source.most) == (2.0, 0.5, 5.0)


def test_options_of_several_folders_are_those_of_the_plain_ones(depth_rooms: Path, tmp_path: Path) -> None:
    for name in ("rgb", "depth"):
        (tmp_path / f"Scene01/clone/frames/{name}/Camera_0").mkdir(parents=True)
    frames = tmp_path / "Scene01/clone/frames"
    (frames / "rgb/Camera_0/rgb_00000.jpg").touch()
    (frames / "depth/Camera_0/depth_00000.png").touch()
    options = DepthOptions(depth_scale=1000.0, depth_max=5.0)
    plain, kitti = find_depth_sources([depth_rooms, tmp_path], options)
    assert (plain.layout, plain.scale, plain.most) == ("plain", 1000.0, 5.0)
    assert (kitti.layout, kitti.scale, kitti.most) == ("vkitti2", 100.0, 80.0)
    (alone,) = find_depth_sources([tmp_path], options)
    assert (alone.scale, alone.most) == (1000.0, 5.0)
    with pytest.raises(RefusedInputError, match="have no effect on several folders of which none is plain"):
        find_depth_sources([tmp_path, tmp_path], options)
    assert len(find_depth_sources([tmp_path, tmp_path], DepthOptions(depth_normalization="log"))) == 2
