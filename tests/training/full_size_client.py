"""Load what a run on a full-size model wrote, with diffusers alone, and compare its weights with the LoRA's.

full_size_client.py MODEL RUN SINGLE_FILE

prints "layers peft, layers kohya, largest difference between the two, relative error of the single file". The
difference is that of the updates in float32; the error is that of the merged weight, relative to the update.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer

LAYERS = 8  # whose updates are compared


def main() -> None:
    model, run, single_file = map(Path, sys.argv[1:])
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float16)
    found: list[dict[str, Any]] = []
    for file in (run / "pytorch_lora_weights.safetensors", run / f"{run.name}_kohya.safetensors"):
        pipeline.load_lora_weights(run, weight_name=file.name, adapter_name="only")
        layers = {name: layer for name, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}
        names = sorted(layers)[:: len(layers) // LAYERS]
        update = {name: layers[name].float().get_delta_weight("only") for name in names}
        found.append({"count": len(layers), "update": update})
        pipeline.delete_adapters("only")
        pipeline.unload_lora_weights()
    peft, kohya = found
    difference = max(float((update - kohya["update"][name]).abs().max()) for name, update in peft["update"].items())
    base = {name: pipeline.unet.get_parameter(f"{name}.weight").float() for name in peft["update"]}
    index = json.loads((model / "model_index.json").read_text())
    kind = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
    del pipeline
    merged: Any = kind.from_single_file(single_file, config=str(model), dtype=torch.float16).unet
    errors = []
    for name, update in peft["update"].items():
        expected = base[name] + update
        errors.append(float((merged.get_parameter(f"{name}.weight").float() - expected).norm() / expected.norm()))
    moved = min(float(update.norm()) for update in peft["update"].values())
    print(json.dumps([peft["count"], kohya["count"], difference, max(errors), moved]))


if __name__ == "__main__":
    main()
