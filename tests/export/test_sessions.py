"""Tests of the providers of ONNX Runtime."""

import json
import shutil

import onnxruntime
import pytest

from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.export import sessions
from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.export.sessions import PROVIDERS


def _cuda_loads(folder):
    session = onnxruntime.InferenceSession(folder / "unet/model.onnx", providers=PROVIDERS["cuda"])
    return session.get_providers()[0] != "CPUExecutionProvider"


def test_named_provider_that_does_not_load_is_refused(exported, tmp_path, capsys):
    if _cuda_loads(exported[0]):
        pytest.skip("CUDA loads here")
    for name, provider in (("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")):
        command = ["sample", "--prompts", "ab", "--onnx", str(exported[0]), "--output_dir", str(tmp_path / "a")]
        assert main([*command, "--onnx_provider", name]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert (
            f"{provider} does not load here (ONNX Runtime's log says why): install what it needs, or choose cpu" in line
        )
    assert list(tmp_path.iterdir()) == []


def test_default_provider_that_does_not_load_warns_once(exported, monkeypatch):
    if _cuda_loads(exported[0]):
        pytest.skip("CUDA loads here")
    assert OnnxPipeline(exported[0], providers=[("CPUExecutionProvider", {})])(["ab"], steps=2)[0].size == (16, 16)
    monkeypatch.setattr(sessions, "default_providers", lambda: PROVIDERS["cuda"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider does not load here") as warned:
        assert OnnxPipeline(exported[0])(["ab"], steps=2)[0].size == (16, 16)
    assert len(warned) == 1


def test_wrong_graph_file_is_named(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    shutil.copy(copy / "vae_encoder/model.onnx", copy / "vae_decoder/model.onnx")
    with pytest.raises(RefusedInputError, match=r"vae_decoder/model\.onnx has \d+ bytes of the") as raised:
        OnnxPipeline(copy)(["ab"], steps=1)
    report = json.loads((copy / "export.json").read_text())
    (copy / "export.json").write_text(json.dumps(report | {"files": {}}))
    with pytest.raises(RefusedInputError, match=r"vae_decoder/model\.onnx does not run \(.*latent_sample") as raised:
        OnnxPipeline(copy)(["ab"], steps=1)
    assert "\n" not in str(raised.value)
