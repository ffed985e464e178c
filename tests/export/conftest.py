"""Export each folder once for all tests of this folder, in whichever worker process they run."""

import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from diffusers import AutoencoderKL

from d2f_fast import Alignment, load_miniature
from d2f_fast.export import folder as folder_module
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.report import Report
from d2f_fast.export.sampler_graph import Guidance, write_sampler
from d2f_fast.export.step_tables import step_table, write_tables
from d2f_fast.export.wrappers import Component

MakeFolder = Callable[..., tuple[Path, Report]]


@pytest.fixture(scope="session", autouse=True)
def _one_operator_table() -> Iterator[None]:
    """Keep torch's table of ONNX operators: each export parses the sources of all of them, a fifth of a short one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = ONNXRegistry.from_torchlib

    @functools.cache
    def make_once(**options: Any) -> ONNXRegistry:
        made = make(**options)
        gc.freeze()  # An export searches for cyclic garbage several times, and need not look through the table.
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(make_once))
        yield


@pytest.fixture(scope="session")
def one_level() -> dict[str, Any]:
    """Return UNet options of a single level without a middle block, which is exported in much less time.

    Its way down has the attention, so that each kind of layer is there once or twice.
    """
    return {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }


@pytest.fixture(scope="session")
def short_vae() -> Callable[[AutoencoderKL], AutoencoderKL]:
    """Return the function that makes a random autoencoder of another one's sizes with as few layers as it can have."""

    def make(vae: AutoencoderKL) -> AutoencoderKL:
        channels = vae.config.block_out_channels
        torch.manual_seed(1)
        # Without layers of its own, a block of the encoder has as many channels as the one before it.
        short = {"block_out_channels": (channels[0],) * len(channels), "layers_per_block": 0}
        return AutoencoderKL.from_config(dict(vae.config) | short)

    return make


@pytest.fixture(scope="session")
def one_level_folder(
    tiny_folder: Path,
    one_level: dict[str, Any],
    short_vae: Callable[[AutoencoderKL], AutoencoderKL],
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> Path:
    """Save the tiny pipeline with a UNet of a single level and a short autoencoder, and return its folder."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level)
    pipeline.vae = short_vae(pipeline.vae)
    return shared_folder("one_level", lambda folder: pipeline.save_pretrained(folder / "pipeline")) / "pipeline"


@pytest.fixture
def tiny_xl(tiny_xl: Any, one_level: dict[str, Any], short_vae: Callable[[AutoencoderKL], AutoencoderKL]) -> Any:
    """Return the tiny pipeline of SDXL's classes, with a UNet of a single level and a short autoencoder."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    tiny_xl.unet = UNet2DConditionModel.from_config(dict(tiny_xl.unet.config) | one_level)
    tiny_xl.vae = short_vae(tiny_xl.vae)
    return tiny_xl


@pytest.fixture(scope="session")
def export_once(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> MakeFolder:
    """Return the function `export_once(name, **options)`: the worker process that calls it first exports."""

    def export(name: str, **options: Any) -> tuple[Path, Report]:
        def make(folder: Path) -> None:
            report = export_folder(ExportOptions(output=str(folder / "graphs"), **options))
            (folder / "returned.json").write_text(json.dumps(report))

        folder = shared_folder(name, make)
        return folder / "graphs", json.loads((folder / "returned.json").read_text())

    return export


@pytest.fixture(scope="session")
def exported(one_level_folder: Path, export_once: MakeFolder) -> tuple[Path, Report]:
    """Export the one-level pipeline in float32 with every component and an unrolled sampler of 2 steps."""
    return export_once("exported", model=str(one_level_folder), unroll=2)


@pytest.fixture
def text_encoder_of_exported(exported: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export read the text encoder of the one-level pipeline from `exported` in place of converting it again."""

    def convert(component: Component, opset: int, sizes: dict[str, int] | None) -> onnx_ir.Model:
        assert (component.name, opset, sizes) == ("text_encoder", exported[1]["opset"], None)
        return onnx_ir.load(exported[0] / "text_encoder/model.onnx")

    monkeypatch.setattr(folder_module.graphs, "convert", convert)


@pytest.fixture(scope="session")
def short_miniature(
    one_level: dict[str, Any],
    short_vae: Callable[[AutoencoderKL], AutoencoderKL],
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> Path:
    """Save the embedded miniature with a random UNet of a single level and a random autoencoder of few layers."""
    from diffusers import UNet2DConditionModel

    pipeline = load_miniature()
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level | {"attention_head_dim": 2})
    pipeline.vae = short_vae(pipeline.vae)
    return shared_folder("short_miniature", lambda folder: pipeline.save_pretrained(folder / "pipeline")) / "pipeline"


@pytest.fixture(scope="session")
def exported_miniature(export_once: MakeFolder, short_miniature: Path) -> tuple[Path, Report]:
    """Export every component of the embedded miniature, with a UNet of a single level and a short autoencoder."""
    return export_once("exported_miniature", model=str(short_miniature))


@pytest.fixture(scope="session")
def unrolled_miniature(export_once: MakeFolder) -> tuple[Path, Report]:
    """Export the embedded miniature with every component and an unrolled sampler of 4 steps."""
    return export_once("unrolled_miniature", unroll=4)


@pytest.fixture(scope="session")
def exported_unet(one_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Return a function that exports the UNet of the one-level pipeline, or what its options ask for."""

    def export(**options: Any) -> tuple[Path, Report]:
        folder = tmp_path_factory.mktemp("exported") / "graphs"
        made = {"model": str(one_level_folder), "output": str(folder), "components": "unet", **options}
        return folder, export_folder(ExportOptions(**made))

    return export


@pytest.fixture(scope="session")
def exported_half(one_level_folder: Path, export_once: MakeFolder) -> tuple[Path, Report]:
    """Export the one-level UNet in float16 and one size, with a sampler without guidance."""
    half = {"precision": "fp16", "static": "1x16x24", "guidance": False}
    return export_once("exported_half", model=str(one_level_folder), components="unet,sampler", steps="1,3", **half)


@pytest.fixture(scope="session")
def exported_static(export_once: MakeFolder, one_level_folder: Path) -> tuple[Path, Report]:
    """Export every component of the one-level pipeline for two images of one size, the decoder in the sampler."""
    components = "unet,sampler,text_encoder,vae_encoder,vae_decoder"
    options = {"static": "2x32x16", "with_vae": True, "steps": "2"}
    return export_once("exported_static", model=str(one_level_folder), components=components, **options)


@pytest.fixture(scope="session")
def marigold_folder(one_level_folder: Path, shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Save a depth pipeline in Marigold's layout, with a UNet of a single level, and return its folder."""
    from diffusers import DDIMScheduler, MarigoldDepthPipeline, StableDiffusionPipeline, UNet2DConditionModel

    base = StableDiffusionPipeline.from_pretrained(one_level_folder)
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    torch.manual_seed(2)
    pipeline = MarigoldDepthPipeline(
        unet=UNet2DConditionModel.from_config(dict(base.unet.config) | {"in_channels": 8}),
        vae=base.vae,
        scheduler=DDIMScheduler.from_config(base.scheduler.config, **options),
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        prediction_type="depth",
        default_denoising_steps=2,
        default_processing_resolution=0,
    )
    return shared_folder("marigold", lambda folder: pipeline.save_pretrained(folder / "pipeline")) / "pipeline"


@pytest.fixture(scope="session")
def exported_depth(
    exported: tuple[Path, Report],
    marigold_folder: Path,
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> tuple[Path, Report]:
    """Export the UNet of a depth pipeline, with a sampler of 1 and 2 steps; its other graphs are of `exported`."""

    def make(folder: Path) -> None:
        graphs = folder / "graphs"
        options = {"model": str(marigold_folder), "components": "unet,sampler", "steps": "1,2"}
        report = export_folder(ExportOptions(output=str(graphs), **options))
        for part in ("text_encoder", "vae_encoder", "vae_decoder"):
            shutil.copytree(exported[0] / part, graphs / part)
        (folder / "returned.json").write_text(json.dumps(report))

    folder = shared_folder("exported_depth", make)
    return folder / "graphs", json.loads((folder / "returned.json").read_text())


@pytest.fixture(scope="session")
def pix2pix_folder(marigold_folder: Path, shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Save a pipeline of InstructPix2Pix with the parts of the depth pipeline, and return its folder."""
    from diffusers import MarigoldDepthPipeline, StableDiffusionInstructPix2PixPipeline

    base = MarigoldDepthPipeline.from_pretrained(marigold_folder)
    parts = base.components | {"safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    return shared_folder("pix2pix", lambda folder: pipeline.save_pretrained(folder / "pipeline")) / "pipeline"


@pytest.fixture(scope="session")
def exported_pix2pix(
    exported_depth: tuple[Path, Report],
    pix2pix_folder: Path,
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> Path:
    """Return a folder as an export of InstructPix2Pix writes it, with the graph of the depth pipeline's UNet."""
    from diffusers import DDIMScheduler

    def make(folder: Path) -> None:
        graphs = folder / "graphs"
        shutil.copytree(exported_depth[0], graphs)
        unet = graphs / "unet"
        guidance = Guidance(text=True, image=True, context_first=False)
        write_sampler(unet / "sampler.onnx", unet / "model.onnx", guidance=guidance, scaling={})
        scheduler = DDIMScheduler.from_pretrained(pix2pix_folder / "scheduler")
        write_tables(unet / "steps.json", {2: step_table(Alignment.from_scheduler(scheduler), 2)})
        changes = {
            "model_index.json": {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
            "export.json": {"guidance": True, "image_guidance": True},
        }
        for name, entries in changes.items():
            (graphs / name).write_text(json.dumps(json.loads((graphs / name).read_text()) | entries))

    return shared_folder("exported_pix2pix", make) / "graphs"
