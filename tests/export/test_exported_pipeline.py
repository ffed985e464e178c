"""What the pipelines of exported graphs have in common."""

import json
import shutil

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.inference import OnnxPipeline


def test_network_for_inpainting_is_refused(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "copy")
    path = tmp_path / "copy/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    with pytest.raises(RefusedInputError, match=r"takes 9 channels, not 4, or 8 with one image .*: run unet"):
        OnnxPipeline(tmp_path / "copy")
