"""Find the images with depth that a folder holds, whatever its layout is."""

import os
from pathlib import Path

from d2f_fast.data.depth_images import DepthImages
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.depth_shards import DepthShards
from d2f_fast.data.depth_source import DepthSource


def find_depth_images(folder: str | os.PathLike[str], options: DepthOptions) -> DepthSource:
    """Return the images of a folder with their depth, read as the options say.

    Args:
        folder: Folder in one of the layouts of `DepthImages`, or of the shards of `DepthShards`.
        options: Options of the depth.

    Raises:
        DatasetError: The folder cannot be used; see the two classes.
    """
    kind = DepthShards if any(Path(folder).glob("*.tar")) else DepthImages
    return kind(folder, scale=options.depth_scale, least=options.depth_min, most=options.depth_max)
