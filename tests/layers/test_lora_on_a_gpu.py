"""LoRA kernels at the shapes of Stable Diffusion, alone and in a UNet: exactness, repeats, CUDA graphs, compilation.

Tests that need no GPU are in `tests/kernels/test_lora_linear.py` and beside this file.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2f_fast.kernels.lora_dispatch import MIN_ROWS, PATH_VARIABLE, choose_path
from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_reference
from d2f_fast.layers.fused_lora import lora_paths, use_fused_lora
from d2f_fast.lora.inject import inject_lora

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Shapes are rows, output features, input features, rank: those of SD1.5 at batch 16, of packed q, k, v, of SDXL's text,
# and with rows that fill no block.
SHAPES = [
    *((65536, 320, 320, 16), (65536, 320, 320, 128), (16384, 640, 640, 64), (4096, 1280, 1280, 16)),
    *((65536, 2560, 320, 16), (65536, 320, 1280, 16), (65536, 960, 320, 48), (16384, 1920, 640, 24)),
    *((16384, 640, 960, 4), (308, 1280, 2048, 16), (4159, 320, 320, 1), (1, 320, 320, 16)),
]
Operands = dict[str, Tensor]


def operands(rows: int, n: int, k: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> Operands:
    """Return x, the frozen layer, and float32 A and B, scaled for outputs of about 1."""
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    return {
        "x": random(rows, k).to(dtype).requires_grad_(),
        "weight": (random(n, k) / k**0.5).to(dtype),
        "lora_a": (random(rank, k) / k**0.5).requires_grad_(),
        "lora_b": (random(n, rank) / rank**0.5).requires_grad_(),
        "bias": random(n).to(dtype),
    }


def results(function: Callable[..., Tensor], t: Operands) -> Operands:
    """Return output and gradients by name, for a fixed upstream gradient."""
    y = function(**t)
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, device=DEVICE).bfloat16().to(y.dtype)
    wanted = {name: tensor for name, tensor in t.items() if tensor.requires_grad}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))}


def errors(got: Operands, truth: Operands) -> dict[str, float]:
    return {name: float((got[name].double() - want).norm() / want.norm()) for name, want in truth.items()}


@pytest.fixture(params=["split", "addmm"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PATH_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_error_is_at_most_that_of_torch(path: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    t = operands(*shape, dtype)
    truth = results(
        lora_linear_reference, {n: v.detach().double().requires_grad_(v.requires_grad) for n, v in t.items()}
    )
    cast = {name: v.detach().to(dtype).requires_grad_(v.requires_grad) for name, v in t.items()}
    ours, plain = errors(results(lora_linear, t), truth), errors(results(lora_linear_reference, cast), truth)
    assert all(ours[name] <= 1.2 * plain[name] for name in truth), (ours, plain)


def test_float32_products_are_ieee_float32(path: str) -> None:
    t = operands(4159, 320, 320, 16, torch.float32)
    exact = {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in t.items()}
    # The sums have up to 4159 products; tf32 would be off by 3e-4.
    assert max(errors(results(lora_linear, t), results(lora_linear_reference, exact)).values()) <= 1e-5


def test_zero_adapter_gives_the_base_product_up_to_rounding(path: str) -> None:
    t = operands(65536, 320, 320, 16)
    t["lora_b"] = torch.zeros_like(t["lora_b"])
    with torch.no_grad():
        got, base = lora_linear(**t), F.linear(t["x"], t["weight"], t["bias"])
        exact = F.linear(t["x"].double(), t["weight"].double(), t["bias"].double())
    assert torch.equal(got, base) or path == "split"
    assert (got.double() - exact).norm() <= 1.05 * (base.double() - exact).norm()


@pytest.mark.parametrize("shape", [(65536, 320, 320, 16), (16384, 1920, 640, 48)], ids=str)
def test_hundred_runs_and_a_graph_give_the_same_bits(
    path: str, shape: tuple[int, int, int, int], check_capture: Callable[..., None]
) -> None:
    t = operands(*shape)
    first = results(lora_linear, t)
    for _ in range(100):
        again = results(lora_linear, t)
        assert all(torch.equal(again[name], first[name]) for name in first)
    upstream, wanted = torch.randn_like(first["y"]), [t["x"], t["lora_a"], t["lora_b"]]

    def run() -> list[Tensor]:
        y = lora_linear(**t)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]

    check_capture(run)


def test_compiled_linear_is_one_graph_and_agrees_with_eager(path: str) -> None:
    torch.compiler.reset()
    t, compiled = operands(8192, 320, 320, 16), torch.compile(lora_linear, fullgraph=True)
    got, want = results(compiled, t), results(lora_linear, t)
    # The products are the same, but Inductor may choose other kernels of cuBLAS, which may round bfloat16 otherwise.
    assert all(float((got[name] - want[name]).norm() / want[name].norm()) <= 2.0**-8 for name in want)
    torch.compiler.reset()


def test_autocast_decides_the_type_of_the_product(path: str) -> None:
    t = operands(4096, 320, 320, 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(lora_linear, t)
    low = {n: v if n.startswith("lora") else v.detach().bfloat16().requires_grad_(n == "x") for n, v in t.items()}
    want = results(lora_linear, low)
    assert got["y"].dtype == torch.bfloat16 and got["x"].dtype == torch.float32
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


def test_offsets_beyond_32_bits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 4.3 GB of x are zero except for the last rows, which lie beyond 2^31 elements."""
    monkeypatch.setenv(PATH_VARIABLE, "split")
    small = operands(300, 320, 320, 16)
    rows = 2**31 // 320 + 300
    x = torch.zeros(rows, 320, dtype=torch.bfloat16, device=DEVICE)
    x[-300:] = small["x"].detach()
    with torch.no_grad():
        got = lora_linear(**{**small, "x": x})[-300:].clone()
        want = lora_linear(**small)
    assert torch.equal(got, want)


def unet_of_sd(dtype: torch.dtype) -> Any:
    """Return a UNet of two levels of SD1.5's widths, with LoRA in attention, feed-forward and convolutions."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    unet.requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
    trainable = inject_lora(unet, 16, conv_rank=16)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in sorted(trainable):
            if "lora_B" in name:
                trainable[name].copy_(torch.randn(trainable[name].shape, generator=generator) * 0.02)
    return unet.train()


def step(unet: Any, dtype: torch.dtype) -> Operands:
    """Return the output for four images, and the gradients of A and B."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(4, 4, 64, 64, generator=generator).to(DEVICE, dtype, memory_format=torch.channels_last)
    text, timestep = torch.randn(4, 77, 768, generator=generator).to(DEVICE, dtype), torch.full((4,), 673.16).to(DEVICE)
    for parameter in unet.parameters():
        parameter.grad = None
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = unet(sample, timestep, text, return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return {"output": output.detach().clone(), **gradients}


def distance(got: Operands, want: Operands) -> float:
    assert got.keys() == want.keys() and len(want) > 100
    error = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    return (error / sum(float(tensor.double().square().sum()) for tensor in want.values())) ** 0.5


@pytest.fixture
def exact() -> tuple[Any, Operands]:
    """Return a bfloat16 network, and its results in float32 by peft's layers."""
    unet = unet_of_sd(torch.bfloat16)
    truth = unet_of_sd(torch.float32)
    truth.load_state_dict({name: tensor.float() for name, tensor in unet.state_dict().items()})
    return unet, step(truth, torch.float32)


def test_unet_error_is_at_most_that_of_peft_and_runs_are_repeatable(exact: tuple[Any, Operands]) -> None:
    unet, truth = exact
    peft = distance(step(unet, torch.bfloat16), truth)
    with use_fused_lora(unet):
        assert "0 of" not in lora_paths(unet, torch.device(DEVICE), torch.bfloat16)
        got = step(unet, torch.bfloat16)
        assert distance(got, truth) <= 1.2 * peft
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            # Attention runs by plain products: other backward kernels add in any order, and warn_only leaves them
            # allowed.
            with sdpa_kernel(SDPBackend.MATH):
                first, again = step(unet, torch.bfloat16), step(unet, torch.bfloat16)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_compiled_unet_is_one_graph_and_its_error_at_most_that_of_peft(exact: tuple[Any, Operands]) -> None:
    unet, truth = exact
    peft = distance(step(unet, torch.bfloat16), truth)
    torch.compiler.reset()
    with use_fused_lora(unet):
        unet.compile(fullgraph=True)
        assert distance(step(unet, torch.bfloat16), truth) <= 1.2 * peft
    torch.compiler.reset()


def test_table_leaves_small_batches_float32_and_unaligned_shapes_to_addmm() -> None:
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in (80, 86, 89, 90, 120):
        pytest.skip("the table does not hold this card")
    device = torch.device(DEVICE, 0)
    assert choose_path(MIN_ROWS - 1, 320, 320, 16, torch.bfloat16, device) == "addmm"
    assert choose_path(65536, 320, 320, 16, torch.float32, device) == "addmm"
    assert choose_path(65536, 324, 320, 16, torch.bfloat16, device) == "addmm"
