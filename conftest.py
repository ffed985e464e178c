"""Options, the number of worker processes and a large model, which tests/ and benchmarks/ share."""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run benchmarks/ instead of tests/, slow and gpu ones too"
    )
    parser.addoption("--results", default="benchmarks/results", help="folder that benchmarks append their rows to")
    parser.addoption("--keep", help="folder where benchmarks keep the large model and its export for their next run")
    parser.addoption("--go_on", action="store_true", help="leave out what --results has by an earlier --go_on")
    parser.addoption("--wheel", help="wheel that tests/test_layout.py checks; it builds one by default")
    parser.addoption("--dry_run", action="store_true", help="try each benchmark once at its smallest size")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    config.addinivalue_line("python_files", "bench_*.py")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # paths the user typed are kept
        config.args = [str(config.rootpath / "benchmarks")]
    if config.option.markexpr in config.getini("addopts"):  # so is a -m the user typed
        config.option.markexpr = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many worker processes `-n auto`, the default, starts; 0 runs the tests in this process alone.

    The default selection of tests runs in two processes. Benchmarks measure time, tests chosen with -m may need the
    GPU or most of the memory, `-s` shows what a test prints, and one test named by its id gains nothing from a second
    process: these run in one. `-n 4` starts four processes whatever is selected.
    """
    typed_markers = config.option.markexpr not in config.getini("addopts")
    shows_output = config.getoption("capture") == "no"
    names_a_test = any("::" in argument for argument in config.args)
    if config.getoption("--benchmark") or typed_markers or shows_output or names_a_test or os.cpu_count() == 1:
        return 0
    return 2


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # here: collecting and listing tests needs no torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def sd15_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in Stable Diffusion 1.5's exact sizes, 1.07 billion parameters, with random weights: 4 GB on disk."""
    kept = pytestconfig.getoption("--keep")
    if kept and (Path(kept) / "sd15_size/model_index.json").exists():
        return Path(kept) / "sd15_size"
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from d2f_fast import load_miniature

    small = load_miniature()
    small.tokenizer.model_max_length = 77  # its words are ids below 2000, which the large vocabulary has too
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=small.tokenizer,
        unet=unet,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = Path(kept) / "sd15_size" if kept else tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(folder)
    return folder
