"""Names of layers in LoRA files, against the converters of diffusers."""

import re

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from d2f_fast.lora.key_names import sgm_name


def test_diffusers_maps_every_sgm_name_back_to_its_layer():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        transformer_layers_per_block=(1, 1, 2),
    )
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    kohya, marks = {}, {}
    for i, (name, layer) in enumerate(layers.items()):
        key = f"lora_unet_{sgm_name(name, unet)}"
        kernel = (1, 1) if layer.weight.ndim == 4 else ()
        kohya[f"{key}.lora_down.weight"] = torch.full((1, *layer.weight.shape[1:]), float(i))
        kohya[f"{key}.lora_up.weight"] = torch.ones(layer.weight.shape[0], 1, *kernel)
        kohya[f"{key}.alpha"] = torch.tensor(1.0)
        marks[name] = float(i)
    mapped, _ = StableDiffusionXLPipeline.lora_state_dict(kohya, unet_config=unet.config)
    found = {re.sub(r"^unet\.|\.lora\.down\.weight|\.lora_A\.weight", "", key): value for key, value in mapped.items()}
    found = {
        name.replace(".processor", "").replace("to_out_lora", "to_out.0_lora").replace("_lora.down.weight", ""): value
        for name, value in found.items()
    }
    missed = [name for name in layers if name not in found or found[name].flatten()[0].item() != marks[name]]
    assert missed == []
