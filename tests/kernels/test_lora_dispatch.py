"""The dispatch table of LoRA linears: which path it chooses, and how a measured table replaces its entries."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.kernels import lora_dispatch
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE, TABLE, Tile, choose_path


def path_of(rows: int, n: int, k: int, rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> str:
    return choose_path(rows, n, k, rank, dtype, torch.device("cuda:0"))


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.delenv(PATH_VARIABLE, raising=False)


@pytest.mark.usefixtures("_hopper")
def test_table_chooses_the_path_and_unknown_cases_take_addmm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_of(65536, 320, 320) == path_of(4096, 640, 640, rank=128, dtype=torch.float16) == "split"
    cases = {
        "few rows": (4095, 320, 320),
        "wide": (4096, 1280, 1280),
        "text": (65536, 320, 768),
        "unknown shape": (65536, 336, 336),
        "unaligned": (65536, 320, 324),
        "rank": (65536, 320, 320, 129),
        "float32": (65536, 320, 320, 16, torch.float32),
    }
    assert {name: path_of(*case) for name, case in cases.items()} == dict.fromkeys(cases, "addmm")
    assert choose_path(65536, 320, 320, 16, torch.bfloat16, torch.device("cpu")) == "addmm"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert path_of(65536, 320, 320) == "addmm"


@pytest.mark.usefixtures("_hopper")
def test_environment_variable_forces_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    assert path_of(65536, 320, 320) == "addmm"
    monkeypatch.setenv(PATH_VARIABLE, "split")
    assert path_of(1, 1280, 336) == "split"
    assert path_of(65536, 320, 324) == path_of(65536, 320, 320, 129) == "addmm"  # no kernel serves these
    monkeypatch.setenv(PATH_VARIABLE, "fused")
    with pytest.raises(ValueError, match=r"D2F_FAST_LORA_PATH must be one of \('split', 'addmm'\), got 'fused'"):
        path_of(1, 320, 320)


def test_table_holds_every_lora_layer_of_stable_diffusion() -> None:
    widths = {"SD1.5": ((320, 640, 1280), 768), "SD2.1": ((320, 640, 1280), 1024), "SDXL": ((640, 1280), 2048)}
    for sizes, text in widths.values():
        for c in sizes:
            for shape in ((c, c), (3 * c, c), (8 * c, c), (c, 4 * c), (c, text)):
                assert {(cc, *shape, r) for cc in (80, 86, 89, 90, 120) for r in (16, 32, 64, 128)} <= TABLE.keys()
    # These are the conv_shortcut of down blocks, then of up blocks, whose input includes the skip connection.
    shortcuts = [(640, 320), (1280, 640), (1280, 2560), (1280, 1920), (640, 1920), (640, 1280), (640, 960)]
    for shape in (*shortcuts, (320, 960), (320, 640)):
        assert {(cc, *shape, r) for cc in (80, 86, 89, 90, 120) for r in (16, 32, 64, 128)} <= TABLE.keys()
    assert len(TABLE) == len(lora_dispatch.CAPABILITIES) * 4 * len({key[1:3] for key in TABLE})


WIDE_ROW = {
    "n": 320,
    "k": 336,
    "rank": 32,
    "path": "split",
    "forward": [64, 64, 32, 4, 3],
    "grad_x": [32, 16, 16, 4, 1],
}
NARROW_ROW = {"rank": 64, "shrink": [64, 64, 64, 4, 4], "rows_sum": [128, 64, 64, 4, 3], "grad_b": None}


def test_measured_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    assert lora_dispatch.read_measured(path) == ({}, {})
    path.write_text(json.dumps({"90": {"device": "H100", "wide": [{**WIDE_ROW, "us": 3}], "narrow": [NARROW_ROW]}}))
    wide, narrow = lora_dispatch.read_measured(path)
    assert wide == {(90, 320, 336, 32): ("split", Tile(64, 64, 32, 4, 3), Tile(32, 16, 16, 4, 1))}
    assert narrow == {(90, 64): (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), None)}


@pytest.mark.usefixtures("_hopper")
def test_measured_entries_replace_the_entries_of_the_module(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "dispatch", shutil.copy(lora_dispatch.__file__, tmp_path / "dispatch.py")
    )
    assert spec is not None and spec.loader is not None
    own, measured = (importlib.util.module_from_spec(spec) for _ in range(2))
    spec.loader.exec_module(own)
    wide = [{**WIDE_ROW, "n": 1280, "k": 1280}, {**WIDE_ROW, "n": 320, "k": 320, "path": "addmm"}]
    (tmp_path / "lora_measured.json").write_text(json.dumps({"90": {"wide": wide, "narrow": [NARROW_ROW]}}))
    spec.loader.exec_module(measured)
    kind = (torch.bfloat16, torch.device("cuda:0"))
    for module, paths in ((own, ["addmm", "split", "split"]), (measured, ["split", "addmm", "split"])):
        shapes = ((1280, 1280, 32), (320, 320, 32), (320, 320, 16))
        assert [module.choose_path(65536, *shape, *kind) for shape in shapes] == paths
    assert measured.entry_of(1280, 1280, 32, *kind)[1:] == (Tile(64, 64, 32, 4, 3), Tile(32, 16, 16, 4, 1))
    narrow = (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), None)
    assert measured.narrow_entry_of(64, *kind) == narrow != own.narrow_entry_of(64, *kind)


CORRUPT: dict[str, tuple[Any, str]] = {
    "cut": ('{"90": {"wide": [', "measured.json is not an entry of the LoRA kernels"),
    "list": ("[]", "measured.json is not an entry"),
    "capability": ({"wide": [WIDE_ROW], "narrow": []}, "measured.json is not an entry"),
    "no rows": ({"90": {"wide": []}}, r"measured.json is not an entry of the LoRA kernels \('narrow'\)"),
    "path": ({"90": {"wide": [{**WIDE_ROW, "path": "fused"}]}}, "sm_90, .*'fused'.*path must be split or addmm"),
    "features": ({"90": {"wide": [{**WIDE_ROW, "k": 24}]}}, "n, k multiples of 16"),
    "boolean": ({"90": {"wide": [{**WIDE_ROW, "n": True}]}}, "n must be a positive integer, got True"),
    "bucket": (
        {"90": {"wide": [], "narrow": [{**NARROW_ROW, "rank": 48}]}},
        r"sm_90, .*'rank': 48.*rank must be one of \(16, 32, 64, 128\)",
    ),
    "tile": ({"90": {"wide": [{**WIDE_ROW, "forward": [64, 64]}]}}, "benchmarks/tune_lora.py, or remove it"),
    "block": (
        {"90": {"wide": [{**WIDE_ROW, "grad_x": [64, 48, 32, 4, 3]}]}},
        r"grad_x must be \[m, n, k, warps, stages\], powers of two, m, n, k >= 16, got \[64, 48, 32, 4, 3\]",
    ),
    "stages": ({"90": {"wide": [{**WIDE_ROW, "forward": [64, 64, 32, 4, 9]}]}}, "1 to 8 stages, got"),
    "missing": ({"90": {"wide": [{"n": 320}]}}, r"\('k'\): write the file again with benchmarks/tune_lora.py"),
}


@pytest.mark.parametrize(("content", "sentence"), CORRUPT.values(), ids=CORRUPT)
def test_corrupt_measured_table_is_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        lora_dispatch.read_measured(path)
