"""Export with LoRA files merged into the weights."""

import re
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.verify import relative_errors
from d2f_fast.lora.source import LORA_FILE


def test_export_with_lora_equals_the_active_adapter(adapt, exported_static, exported_unet, one_level_folder):
    unet, files = adapt(one_level_folder)
    lora = (f"{files['kohya']}:0.3", f"{files['peft']}:0.4")  # 0.7 in all, the scale of the active adapter
    folder, report = exported_unet(lora=lora, static="1x16x16")
    sample, timestep, context = torch.randn(2, 4, 8, 8), torch.tensor(673.16), torch.randn(2, 8, 16)
    feed = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy()}
    (got,) = onnxruntime.InferenceSession(folder / "unet/model.onnx").run(None, feed)
    with torch.no_grad():
        want = unet(sample, timestep, context).sample.numpy()
    assert relative_errors(got, want)[0] <= 5e-6
    models = [onnx.load(f / "unet/model.onnx", load_external_data=False).graph for f in (folder, exported_static[0])]
    assert len(models[0].node) == len(models[1].node)
    assert not [tensor.name for tensor in models[0].initializer if "lora" in tensor.name]
    adapters = [(entry["file"], entry["scale"]) for entry in report["adapters"]]
    assert adapters == [("kohya.safetensors", 0.3), (LORA_FILE, 0.4)]
    again = ExportOptions(model=str(one_level_folder), output=str(folder), static="1x16x16", verify_only=True)
    asked = rf"exported with --lora kohya\.safetensors:0\.3 --lora {re.escape(LORA_FILE)}:0\.4: give it again"
    with pytest.raises(RefusedInputError, match=asked):
        export_folder(again)
    assert export_folder(replace(again, lora=lora))["parity"] == report["parity"]
