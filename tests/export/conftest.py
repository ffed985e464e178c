"""Folders that are exported once and read by many tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions

MakeFolder = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tiny pipeline in float32, every component, with a sampler of 2 steps written out; and its report."""
    folder = tmp_path_factory.mktemp("exported") / "graphs"
    return folder, export_folder(ExportOptions(model=str(tiny_folder), output=str(folder), unroll=2))


@pytest.fixture(scope="session")
def exported_miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The embedded miniature, every component, with a sampler of 4 steps written out; and its report."""
    folder = tmp_path_factory.mktemp("exported") / "miniature"
    return folder, export_folder(ExportOptions(output=str(folder), unroll=4))


@pytest.fixture(scope="session")
def exported_half(exported_unet: MakeFolder) -> tuple[Path, dict[str, Any]]:
    """The tiny UNet in float16, of one size, and its sampler without guidance; and the report."""
    half = {"precision": "fp16", "static": "1x16x24", "guidance": False}
    return exported_unet(components="unet,sampler", steps="1,3", **half)


@pytest.fixture(scope="session")
def exported_unet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Export the UNet, and the sampler where asked, of the tiny pipeline with further options."""

    def export(**options: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("exported") / "graphs"
        made = {"model": str(tiny_folder), "output": str(folder), "components": "unet", **options}
        return folder, export_folder(ExportOptions(**made))

    return export


@pytest.fixture(scope="session")
def exported_static(exported_unet: MakeFolder) -> tuple[Path, dict[str, Any]]:
    """Every component of the tiny pipeline at two pictures of one size, the decoder in its sampler; and the report."""
    components = "unet,sampler,text_encoder,vae_encoder,vae_decoder"
    return exported_unet(components=components, static="2x32x16", with_vae=True, steps="2")
