"""What a description says of LoRA files of each form, and of files that programs trip over."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast.lora.describe import describe_lora


def kohya(layers: dict[str, tuple[int, int]], rank: int = 2, alpha: Any = 1.0) -> dict[str, Tensor]:
    """Return the tensors of a kohya file with layers of the given sizes."""
    tensors = {}
    for name, (out, width) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(rank, width)
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, rank)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def described(tmp_path: Path) -> Any:
    """Function that saves tensors and returns their description."""

    def describe(tensors: dict[str, Tensor], **entries: str) -> dict[str, Any]:
        save_file(tensors, tmp_path / "a.safetensors", metadata=entries)
        return describe_lora(tmp_path / "a.safetensors")

    return describe


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(("width", "family"), [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL"), (128, "not known")])
def test_family_is_seen_from_the_width_of_the_text(width: int, family: str, described: Any) -> None:
    found = described(kohya({TO_K: (8, width)}))
    assert found["family"] == f"{family} (its layers take text of width {width})"
    assert found["odd"] == []


def test_family_is_seen_from_the_header_where_no_layer_takes_text(described: Any) -> None:
    found = described(kohya({"lora_unet_mid_block_resnets_0_conv1": (8, 4)}), ss_base_model_version="sdxl_base_v1-0")
    assert found["family"] == "SDXL (header ss_base_model_version)"


@pytest.mark.parametrize(("sigmas", "counted"), [("14.6146, 0", "1 step"), ("15.6146, 1, 0", "2 steps")])
def test_sigmas_are_those_of_their_number_of_steps(sigmas: str, counted: str, described: Any) -> None:
    found = described(kohya({TO_K: (8, 768)}), **{"d2f.recommended_sigmas": sigmas})
    assert f"the sigmas {sigmas} for {counted}, as it was trained for" in found["needs"]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float8_e4m3fn, 1.5), (torch.float8_e4m3fn, 0.001953125), (torch.float8_e4m3fn, 448.0),
        (torch.float8_e5m2, 1.25), (torch.bfloat16, 1.5), (torch.uint8, 2.0), (torch.int16, 2.0),
    ],
)  # fmt: skip
def test_alpha_of_any_type_is_read(dtype: torch.dtype, value: float, described: Any) -> None:
    found = described(kohya({TO_K: (8, 768)}, alpha=0.0) | {f"{TO_K}.alpha": torch.tensor(value).to(dtype)})
    assert found["scale"] == str(round(value / 2, 4))


def test_whole_numbers_in_place_of_matrices_are_odd(described: Any) -> None:
    found = described({key: value.to(torch.int8) for key, value in kohya({TO_K: (8, 768)}).items()})
    assert f"2 matrices are of type I8, which no loader reads, such as {TO_K}.lora_down.weight" in found["odd"]


def test_names_ranks_scales_and_types_are_counted(described: Any) -> None:
    tensors = kohya({TO_K: (8, 768), "lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 4)}, rank=4, alpha=2.0)
    found = described({key: tensor.half() for key, tensor in tensors.items()}, **{"d2f.shift": "2.0", "ss_tag": "x"})
    assert found["kind"] == "LoRA" and found["names"] == "kohya, diffusers blocks"
    assert found["layers"] == "1 of text_encoder, 1 of unet"
    assert (found["rank"], found["scale"], found["types"]) == ("4", "0.5", "F16")
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["entries"] == {"d2f.shift": "2.0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_alpha_of_every_type_is_read(dtype: torch.dtype, described: Any) -> None:
    tensors = kohya({TO_K: (8, 768)})
    tensors[f"{TO_K}.alpha"] = torch.tensor(6, dtype=dtype)
    assert described(tensors)["scale"] == "3.0"


def test_files_of_this_package_have_nothing_odd_but_the_first_and_last_layer(adapted: Any) -> None:
    for path, names in (
        (adapted[1]["peft"] / "pytorch_lora_weights.safetensors", "peft"),
        (adapted[1]["kohya"], "kohya, diffusers blocks"),
    ):
        found = describe_lora(path)
        assert found["names"] == names
        assert [text.split()[0] for text in found["odd"]] == ["mixed", "it"]
        assert "first or last convolution" in found["odd"][1]


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        ({"foreign.key": torch.ones(1)}, "1 of 4 keys are foreign"),
        ({f"{TO_K}.alpha": None}, "alpha is missing in every layer"),
        ({f"{TO_K}.lora_up.weight": None}, "1 layers lack one of their two matrices"),
        ({f"{TO_K}.alpha": torch.tensor(0.0)}, "1 layers have an alpha of 0"),
        ({f"{TO_K}.lora_up.weight": torch.ones(8, 2).half()}, "its matrices are of several types"),
        (kohya({"lora_unet_conv_in": (8, 4)}, rank=3), "mixed ranks"),
        ({"lora_unet_b.lora_down.weight": torch.ones(2, 4), "lora_unet_b.lora_up.weight": torch.ones(4, 2)}, "1 of 2"),
        ({f"{TO_K}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LoCon's core"),
        (kohya({"lora_transformer_double_blocks_0_img": (8, 4)}), "its layers are of a transformer network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_programs_trip_over_is_named(change: Any, odd: str, described: Any) -> None:
    tensors = {key: value for key, value in (kohya({TO_K: (8, 768)}) | change).items() if value is not None}
    assert any(text.startswith(odd) for text in described(tensors)["odd"])


@pytest.mark.parametrize(("down", "up"), [((0, 768), (8, 0)), ((2, 768), (8, 3)), ((2 * 768,), (8, 2))])
def test_matrices_without_a_common_rank_are_named(down: Any, up: Any, described: Any) -> None:
    tensors = kohya({TO_K: (8, 768)})
    tensors |= {f"{TO_K}.lora_down.weight": torch.ones(down), f"{TO_K}.lora_up.weight": torch.ones(up)}
    assert any(
        line.startswith("1 layers have matrices without a common rank, such as") for line in described(tensors)["odd"]
    )


def test_describing_imports_no_torch() -> None:
    code = "import sys, d2f_fast.lora.describe; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
