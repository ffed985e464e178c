"""Names of models that are refused before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from d2f_fast.errors import ModelError
from d2f_fast.models.names import check_model_name, is_single_file


def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model.bin"):
        with pytest.raises(
            ModelError, match="is a pickle, which can run code: convert it to safetensors first"
        ) as caught:
            check_model_name(tmp_path / name)
        command = f"--checkpoint_path {tmp_path / name} --dump_path {tmp_path / 'model'} --to_safetensors"
        assert command in str(caught.value) and "\n" not in str(caught.value)


def test_missing_paths_and_void_options_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    for model, options, sentence in (
        ("./nowhere", {}, "nowhere does not exist: give a hub id, a pipeline folder or a .safetensors file"),
        (tmp_path / "none.safetensors", {}, "none.safetensors: no such file"),
        ("x.safetensors:0.8", {}, "x.safetensors:0.8: no such file; a strength after the colon is only for a LoRA"),
        (file, {"variant": "fp16"}, "variant is fp16, and .* has no variants: leave variant out"),
        ("miniature", {"variant": "fp16"}, "variant is fp16, and miniature has no variants"),
        (tmp_path, {"revision": "main"}, "revision is main, and .* is not a hub id: leave revision out"),
        (file, {"revision": "main"}, "revision is main"),
    ):
        with pytest.raises(ModelError, match=sentence):
            check_model_name(model, **options)  # type: ignore[arg-type]


def test_usable_names_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for model in ("miniature", "owner/name", tmp_path, tmp_path / "folder.safetensors"):
        check_model_name(model)
        assert not is_single_file(model)
    check_model_name(tmp_path, variant="fp16")
    check_model_name("owner/name", "fp16", "main")


def test_names_are_checked_without_a_library() -> None:
    code = "import d2f_fast.models.names, sys; print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
