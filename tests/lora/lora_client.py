"""Load LoRA files with diffusers alone, in an environment of its own with other versions of the libraries.

lora_client.py FOLDER

For each folder in FOLDER it loads the network in unet/ and each LoRA file, and writes the change of the output that the
file makes to <name of the file>.npy, or the error to <name of the file>.txt. inputs.npz holds the inputs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin


class OneNetwork(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Pipeline of a UNet alone."""

    def __init__(self, unet, text_encoder=None):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


class OneXLNetwork(DiffusionPipeline, StableDiffusionXLLoraLoaderMixin):
    """Pipeline of SDXL's UNet alone."""

    def __init__(self, unet, text_encoder=None, text_encoder_2=None):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


@torch.no_grad()
def output(unet, folder):
    given = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}
    pooled = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    return unet(**given, added_cond_kwargs=pooled or None).sample.numpy()


def main() -> None:
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        for file in sorted(folder.glob("*.safetensors")):
            unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
            base = output(unet, folder)
            pipeline = (OneXLNetwork if unet.config.addition_embed_type == "text_time" else OneNetwork)(unet)
            try:
                pipeline.load_lora_weights(str(folder), weight_name=file.name)
                np.save(file.with_suffix(".npy"), output(unet, folder) - base)
            except Exception as error:  # The version's own refusal is a result, too.
                file.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
