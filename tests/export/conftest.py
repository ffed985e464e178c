"""Export each folder once for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.report import Report

MakeFolder = Callable[..., tuple[Path, Report]]


@pytest.fixture(scope="session")
def one_level() -> dict[str, Any]:
    """Return UNet options of a single level without a middle block, which is exported in a third of the time."""
    return {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }


@pytest.fixture(scope="session")
def one_level_folder(tiny_folder: Path, one_level: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the tiny pipeline with a UNet of a single level, and return its folder."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level)
    folder = tmp_path_factory.mktemp("one_level") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Export the tiny pipeline in float32 with every component and an unrolled sampler of 2 steps."""
    folder = tmp_path_factory.mktemp("exported") / "graphs"
    return folder, export_folder(ExportOptions(model=str(tiny_folder), output=str(folder), unroll=2))


@pytest.fixture(scope="session")
def exported_miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Export the embedded miniature with every component and an unrolled sampler of 4 steps."""
    folder = tmp_path_factory.mktemp("exported") / "miniature"
    return folder, export_folder(ExportOptions(output=str(folder), unroll=4))


@pytest.fixture(scope="session")
def exported_unet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Return a function that exports the UNet of the tiny pipeline, or what its options ask for."""

    def export(**options: Any) -> tuple[Path, Report]:
        folder = tmp_path_factory.mktemp("exported") / "graphs"
        made = {"model": str(tiny_folder), "output": str(folder), "components": "unet", **options}
        return folder, export_folder(ExportOptions(**made))

    return export


@pytest.fixture(scope="session")
def exported_half(exported_unet: MakeFolder) -> tuple[Path, Report]:
    """Export the tiny UNet in float16 and one size, with a sampler without guidance."""
    half = {"precision": "fp16", "static": "1x16x24", "guidance": False}
    return exported_unet(components="unet,sampler", steps="1,3", **half)


@pytest.fixture(scope="session")
def exported_static(exported_unet: MakeFolder, one_level_folder: Path) -> tuple[Path, Report]:
    """Export every component of the one-level pipeline for two images of one size, the decoder in the sampler."""
    components = "unet,sampler,text_encoder,vae_encoder,vae_decoder"
    options = {"static": "2x32x16", "with_vae": True, "steps": "2"}
    return exported_unet(model=str(one_level_folder), components=components, **options)
