"""Tests of `export.json`: what it holds, and the verification of an earlier export by it."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import verify
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.report import options_of_export


def test_report_lists_every_file_and_its_hash(exported):
    folder, report = exported
    assert report == json.loads((folder / "export.json").read_text())
    for name, entry in report["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    listed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"export.json"}
    assert listed == set(report["files"])


@pytest.mark.parametrize(
    ("made", "model"),
    [("exported", "one_level_folder"), ("exported_half", "one_level_folder"), ("exported_static", "one_level_folder")],
)
def test_export_is_verified_again_with_its_own_options(made, model, request):
    folder, report = request.getfixturevalue(made)
    options = ExportOptions(model=str(request.getfixturevalue(model)), output=str(folder), verify_only=True)
    assert export_folder(options)["parity"] == report["parity"]
    # A tolerance that is asked for is kept.
    with pytest.raises(verify.VerificationError, match=r"allowed is \d\.\de-0?9: do not use this export"):
        export_folder(replace(options, tolerance=1e-9))


def test_report_without_options_is_refused(exported, one_level_folder, tmp_path):
    shutil.copytree(exported[0], tmp_path / "copy")
    (tmp_path / "copy/export.json").write_text('{"files": {}}')
    options = ExportOptions(model=str(one_level_folder), output=str(tmp_path / "copy"), verify_only=True)
    with pytest.raises(RefusedInputError, match=r"export\.json is not the report of an export: export again"):
        export_folder(options)


def test_verification_without_the_autoencoder_of_the_export_is_refused(exported, one_level_folder, tmp_path):
    shutil.copytree(exported[0], tmp_path / "copy")
    (tmp_path / "copy/export.json").write_text(json.dumps(exported[1] | {"vae": "taesd"}))
    options = ExportOptions(model=str(one_level_folder), output=str(tmp_path / "copy"), verify_only=True)
    with pytest.raises(
        RefusedInputError, match="copy was exported with --vae taesd: give it again to verify the export"
    ):
        export_folder(options)


def test_verification_of_changed_files_is_refused(exported, one_level_folder, tmp_path):
    copy = tmp_path / "graphs"
    shutil.copytree(exported[0], copy)
    with (copy / "unet/model.onnx.data").open("r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(
        RefusedInputError, match=r"model.onnx.data is missing or differs from what was exported: export again"
    ):
        export_folder(ExportOptions(model=str(one_level_folder), output=str(copy), verify_only=True))


def test_report_has_no_path_of_the_machine(exported, one_level_folder: Path):
    text = (exported[0] / "export.json").read_text()
    assert str(one_level_folder.parent) not in text
    assert str(one_level_folder.parent).encode() not in (exported[0] / "unet/model.onnx").read_bytes()


def test_verification_takes_the_options_of_the_model_from_the_report(tmp_path):
    made = {"adapters": [], "vae": None, "precision": {"vae_encoder": "fp32"}, "files": {}, "shift": 1.0}
    made |= {"guidance": True, "with_vae": False, "static": None, "unroll": 0, "tolerance": 1e-5}
    for stated in ({}, {"model_options": {"prediction_type": "v_prediction", "vae_custom_scale": 0.5}}):
        (tmp_path / "export.json").write_text(json.dumps(made | stated))
        found = options_of_export(ExportOptions(vae_custom_scale=0.25, verify_only=True), tmp_path)
        assert found.vae_custom_scale == 0.25  # What is given comes first.
        assert found.prediction_type == ((stated and "v_prediction") or None)
        assert options_of_export(ExportOptions(), tmp_path).vae_custom_scale == (0.5 if stated else None)
