"""Settings that every test runs under."""

import gc
import json
import os
import random
import re
import shutil
import signal
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may download

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

HAS_GPU = torch.cuda.is_available()

# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before triton is imported.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The imports of the test modules make half a million objects, of which almost none is garbage.
gc.set_threshold(200_000, 100, 100)


def pytest_collection_finish() -> None:
    """Let the search for cyclic garbage leave out what the imports made."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One torch thread: sums do not depend on the machine's cores, and small tensors are faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _children_are_no_workers() -> None:
    """Hide from the processes that tests start that this one is a worker: a benchmark among them would not measure."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_received() -> None:
    """Receive SIGINT also where a shell started the tests in the background, and so had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Seed every global generator, so that a test draws the same numbers alone, and in any order."""
    random.seed(0)
    np.random.seed(0)
    if HAS_GPU:
        torch.manual_seed(0)
    else:  # torch.manual_seed would also write down twice from where it was called, for a GPU that is started later.
        torch.default_generator.manual_seed(0)


@pytest.fixture
def check_capture() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Assert that a function runs without waiting for the GPU, and that a CUDA graph of it replays the same bits."""

    def check(run: Callable[[], Sequence[Tensor]]) -> None:
        eager = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for tensor in captured:
            tensor.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))

    return check


@pytest.fixture(scope="session")
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return the function `shared_folder(name, make)`: the folder `name` of this run, the same in every worker process.

    The first process that asks for the folder calls `make(folder)` to fill it, and the others wait until it has. What
    `make` returns is ignored: it writes all that the tests need into the folder, which no test may change.
    """
    base = tmp_path_factory.getbasetemp()
    run = base if worker_id == "master" else base.parent

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder, filled = run / name, run / f"{name}.filled"
        with FileLock(run / f"{name}.lock"):
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process in which `make` failed
                folder.mkdir()
                make(folder)
                filled.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def tiny_folder(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Folder of a Stable Diffusion pipeline with random weights: SD1.5's classes and layout, 40 thousand parameters."""
    return shared_folder("tiny", _save_tiny_pipeline) / "pipeline"


@pytest.fixture
def cached_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Return the function `cached_as(hub_id, folder)`: it puts a copy of a model into the hub's cache, and returns it.

    The cache of the test holds nothing else.
    """
    import huggingface_hub

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(hub_id: str, folder: Path) -> Path:
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))

    return put


@pytest.fixture(scope="session")
def depth_rooms(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Folder of six rendered rooms of 16 × 16 pixels with their depth, some of it missing."""
    from d2f_fast.miniature.rooms import write_rooms

    return shared_folder("depth", lambda folder: write_rooms(folder / "rooms", "train", 6, side=16)) / "rooms"


@pytest.fixture(scope="session")
def source_targets(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Folder of four pairs of a source and a target image of 16 × 16 pixels; the source is JPEG, the target PNG."""
    return shared_folder("source_targets", _save_source_targets)


def _save_source_targets(folder: Path) -> None:
    """Write pairs of smooth images and their damaged copies into `folder`."""
    from PIL import Image

    for name in ("source", "target"):
        (folder / name).mkdir()
    for i in range(4):
        coarse = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)
        image.save(folder / f"target/{i}.png")
        image.save(folder / f"source/{i}.jpg", quality=5)


def _save_tiny_pipeline(folder: Path) -> None:
    """Write the tokenizer's files into `folder`, and the pipeline into `folder`/pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>", model_max_length=8
    )
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae, "unet": unet, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "pipeline")


@pytest.fixture
def tiny_xl(tiny_folder: Path) -> Any:
    """A pipeline of SDXL's classes: two text encoders, pooled text and sizes beside the time."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    base = StableDiffusionPipeline.from_pretrained(tiny_folder)
    text = base.text_encoder.config.to_dict() | {"projection_dim": 12}
    config = dict(base.unet.config) | {
        # a single level, which is exported in a third of the time
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 6 * 4,
        "use_linear_projection": True,
    }
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=UNet2DConditionModel.from_config(config),
        scheduler=base.scheduler,
        add_watermarker=False,
    )


@pytest.fixture
def flow_xl(tiny_xl: Any) -> Any:
    """A pipeline of SDXL's classes whose scheduler says that the network predicts the flow, as rectified flows do."""
    from diffusers import DPMSolverMultistepScheduler

    tiny_xl.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    tiny_xl.set_progress_bar_config(disable=True)
    return tiny_xl


@pytest.fixture(scope="session")
def run_card() -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs each block of Python in a model card.

    Its further arguments replace the words in capitals. It returns the variables of each block.
    """

    def run(card: str, **words: object) -> list[dict[str, Any]]:
        found = []
        for block in re.findall(r"^  ```python\n(.*?)^  ```", card, re.MULTILINE | re.DOTALL):
            torch.manual_seed(0)  # The noise of d2f sample, where a block leaves the generator open.
            found.append(dict(words))
            exec(textwrap.dedent(block), found[-1])
        return found

    return run


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., Path]:
    """Return a function that writes a shard of random pairs with the prompts "a", "b" and so on, and returns its path.

    `change(record)` returns the record in place of the one that it is given.
    """
    from d2f_fast.data.pair_shards import PairRecord, write_shard

    def write(
        path: Path,
        count: int = 6,
        shape: tuple[int, ...] = (4, 8, 8),
        dtype: str = "float16",
        change: Callable[[PairRecord], PairRecord] = lambda record: record,
        meta: dict[str, object] | None = None,
    ) -> Path:
        generator = np.random.default_rng(sum(path.name.encode()))

        def records() -> Iterator[PairRecord]:
            for i in range(count):
                latents, noise = (generator.standard_normal(shape).astype(dtype) for _ in range(2))
                yield change(PairRecord(f"{path.stem}{i:03d}", latents, noise, "abcdefgh"[i % 8], meta or {"index": i}))

        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, records(), count)
        return path

    return write


@pytest.fixture(scope="session")
def adapted(tiny_folder: Path, adapt: Callable[[Path], tuple[Any, dict[str, Path]]]) -> tuple[Any, dict[str, Path]]:
    """A UNet with an active LoRA on every kind of layer, alpha = 2 r, scaled by 0.7; and its files by form."""
    return adapt(tiny_folder)


@pytest.fixture(scope="session")
def adapt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Any, dict[str, Path]]]:
    """Return the function that gives the UNet of a pipeline's folder the LoRA of `adapted`."""
    return lambda folder: _adapt(folder, tmp_path_factory.mktemp("adapter"))


def _adapt(model: Path, folder: Path) -> tuple[Any, dict[str, Path]]:
    """Return the UNet of the pipeline in `model` with an active LoRA, and the files of it, which are in `folder`."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    from d2f_fast.lora.inject import inject_lora, lora_layers
    from d2f_fast.lora.write import save_lora

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    torch.manual_seed(5)
    inject_lora(pipeline.unet, 3, alpha=6, conv_rank=2, first_last_layers=True)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    peft = save_lora(pipeline.unet, folder)
    kohya = {}
    for name, layer in lora_layers(pipeline.unet).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        kohya[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight.detach().clone()
        kohya[f"{key}.lora_up.weight"] = layer.lora_B["default"].weight.detach().clone()
        kohya[f"{key}.alpha"] = torch.tensor(layer.scaling["default"] * layer.r["default"])
    save_file(kohya, folder / "kohya.safetensors")
    for layer in lora_layers(pipeline.unet).values():
        layer.scale_layer(0.7)
    return pipeline.unet.eval(), {"peft": peft.parent, "kohya": folder / "kohya.safetensors"}


_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 32, 32),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "norm_num_groups": 4,
}
# The configurations of the three families, of which only the channels are fewer.
_NARROW_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_FOUR_LEVELS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (8, 16, 32),
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 2048,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="session")
def narrow_unets() -> dict[str, dict[str, Any]]:
    """Return the configuration of a narrow UNet by its family: "sd1", "sd2" and "sdxl"."""
    return _NARROW_UNETS


@pytest.fixture(scope="session")
def narrow_pipeline(
    shared_folder: Callable[[str, Callable[[Path], object]], Path], tiny_folder: Path
) -> Callable[[str], Path]:
    """Return the function `narrow_pipeline(family)`: the folder of a pipeline with random weights.

    "sd1" (epsilon), "sd2" (v-prediction) and "sdxl" (epsilon) have the blocks of their family, with few channels. The
    text encoders are narrower than the text that the UNet takes, so that the pipelines do not generate images.
    """
    return lambda family: shared_folder(f"narrow-{family}", lambda folder: _save_narrow(folder, family, tiny_folder))


def _save_narrow(folder: Path, family: str, tiny_folder: Path) -> None:
    """Write a narrow pipeline of a family into `folder`."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(1)
    is_sdxl = family == "sdxl"
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    prediction_type = "v_prediction" if family == "sd2" else "epsilon"
    text = {"vocab_size": 54, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 23 if family == "sd2" else 2}
    text |= {"hidden_act": "gelu" if family == "sd2" else "quick_gelu"}
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**_NARROW_UNETS[family], sample_size=64),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            scaling_factor=0.13025 if is_sdxl else 0.18215,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, hidden_size=12)),
        "tokenizer": tokenizer,
    }
    if is_sdxl:
        second = CLIPTextConfig(**text | {"hidden_act": "gelu"}, hidden_size=16, projection_dim=16)
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(second), "tokenizer_2": tokenizer}
        parts |= {"scheduler": EulerDiscreteScheduler(**schedule, prediction_type=prediction_type)}
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        scheduler = DDIMScheduler(**schedule, prediction_type=prediction_type, clip_sample=False)
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
