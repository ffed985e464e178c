"""Tests of the options of the export; test_to_onnx.py tests their refusals."""

from pathlib import Path

import pytest

from d2f_fast.export.options import ExportOptions, parse
from d2f_fast.models.options import ModelOptions


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.7", ("a.safetensors", 0.7)),
        ("run:-1", ("run", -1.0)),
        ("run:.5", ("run", 0.5)),
        ("C:/run", ("C:/run", 1.0)),
        ("5", ("5", 1.0)),
    ],
)
def test_scale_follows_the_last_colon(entry, want):
    assert ExportOptions(lora=(entry,)).adapters == ((Path(want[0]), want[1]),)


def test_step_counts_rise_and_include_the_unrolled_one():
    assert ExportOptions(steps="8, 1,4,4", unroll=3).step_counts == (1, 3, 4, 8)


def test_opset_and_tolerance_follow_target_and_precision():
    assert (ExportOptions().opset_version, ExportOptions(target="tensorrt").opset_version) == (20, 23)
    assert ExportOptions(target="tensorrt", opset=20).opset_version == 20
    assert ExportOptions(precision="bf16").opset_version == 23
    assert ExportOptions(precision="fp16").largest_error == 3e-3
    assert ExportOptions(precision="fp16", tolerance=1e-2).largest_error == 1e-2


def test_static_sizes_are_batch_height_width():
    assert ExportOptions(static="2x512x768").static_sizes == (2, 512, 768)


def test_model_options_are_those_of_training():
    typed = ["--prediction_type", "v_prediction", "--no_rescale_betas_zero_snr"]
    assert parse(typed, "x").model_options == ModelOptions("v_prediction", False)
    assert parse([], "x").model_options == ModelOptions()
