"""Find the images with depth that a folder holds, whatever its layout is."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from d2f_fast.data.depth_benchmarks import DepthBenchmark, is_benchmark
from d2f_fast.data.depth_images import DepthImages
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.depth_shards import DepthShards
from d2f_fast.data.depth_source import DepthSource
from d2f_fast.errors import RefusedInputError


def find_depth_images(folder: str | os.PathLike[str], options: DepthOptions) -> DepthSource:
    """Return the images of a folder with their depth, read as the options say.

    Args:
        folder: Folder in one of the layouts of `DepthImages` or `DepthBenchmark`, or of the shards of `DepthShards`.
        options: Options of the depth.

    Raises:
        DatasetError: The folder cannot be used; see the classes.
    """
    place = Path(folder)
    shards = any(place.glob("*.tar"))
    kind = DepthShards if shards else DepthBenchmark if is_benchmark(place) else DepthImages
    return kind(folder, scale=options.depth_scale, least=options.depth_min, most=options.depth_max)


def find_depth_sources(folders: Sequence[str | os.PathLike[str]], options: DepthOptions) -> list[DepthSource]:
    """Return the images of each of several folders with their depth.

    Args:
        folders: Folders in any layout.
        options: Options of the depth. Where there are several folders, the unit and the range that they give are those
            of the plain folders, because every other layout has its own.

    Raises:
        DatasetError: A folder cannot be used.
        RefusedInputError: A unit or a range is given, and no folder is plain.
    """
    if len(folders) == 1:
        return [find_depth_images(folders[0], options)]
    sources = [find_depth_images(folder, DepthOptions()) for folder in folders]
    is_given = dataclasses.replace(options, depth_normalization=DepthOptions().depth_normalization) != DepthOptions()
    if is_given and all(each.layout != "plain" for each in sources):
        raise RefusedInputError(
            "depth_scale, depth_min and depth_max have no effect on several folders of which none is plain, because"
            " each has its own unit and range: leave them out"
        )
    return [find_depth_images(each.place, options) if each.layout == "plain" else each for each in sources]
