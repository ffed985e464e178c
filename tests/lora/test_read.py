"""LoRA files merged into the weights, against peft's own adapters."""

import json
import re
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.verify import relative_errors
from d2f_fast.lora.inject import inject_lora, lora_layers
from d2f_fast.lora.key_names import sgm_name
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import LORA_FILE
from d2f_fast.lora.write import save_lora

SCALE = 0.7


@pytest.fixture(scope="module")
def adapted(tiny_folder, tmp_path_factory):
    """A UNet with peft's LoRA on every kind of layer, alpha = 2 r; and its peft and kohya files."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    torch.manual_seed(5)
    inject_lora(pipeline.unet, 3, alpha=6, conv_rank=2, first_last_layers=True)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    peft = save_lora(pipeline.unet, folder)
    kohya = {}
    for name, layer in lora_layers(pipeline.unet).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        kohya[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight.detach().clone()
        kohya[f"{key}.lora_up.weight"] = layer.lora_B["default"].weight.detach().clone()
        kohya[f"{key}.alpha"] = torch.tensor(layer.scaling["default"] * layer.r["default"])
    save_file(kohya, folder / "kohya.safetensors")
    for layer in lora_layers(pipeline.unet).values():
        layer.scale_layer(SCALE)
    return pipeline.unet.eval(), {"peft": peft.parent, "kohya": folder / "kohya.safetensors"}


def _inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor(673.16), torch.randn(2, 8, 16)


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_merged_weights_equal_the_active_adapter(kind, adapted, tiny_folder):
    unet, files = adapted
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    given = _inputs()
    with torch.no_grad():
        base = pipeline.unet(*given).sample
        done = fuse_adapter(pipeline, files[kind], SCALE)
        got, want = pipeline.unet(*given).sample, unet(*given).sample
    assert relative_errors(got.numpy(), want.numpy())[0] <= 5e-6
    assert relative_errors(base.numpy(), want.numpy())[0] > 0.05
    assert done["layers"] == len(lora_layers(unet)) and done["scale"] == SCALE
    assert done["change"] > 0 and done["relative_change"] > 0


def test_export_with_lora_equals_the_active_adapter(adapted, exported, exported_unet, tiny_folder):
    unet, files = adapted
    folder, report = exported_unet(
        lora=(f"{files['kohya']}:0.3", f"{files['peft']}:0.4")
    )  # SCALE in all, of either kind
    sample, timestep, context = _inputs()
    feed = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy()}
    (got,) = onnxruntime.InferenceSession(folder / "unet/model.onnx").run(None, feed)
    with torch.no_grad():
        want = unet(sample, timestep, context).sample.numpy()
    assert relative_errors(got, want)[0] <= 5e-6
    models = [onnx.load(f / "unet/model.onnx", load_external_data=False).graph for f in (folder, exported[0])]
    assert len(models[0].node) == len(models[1].node)
    assert not [tensor.name for tensor in models[0].initializer if "lora" in tensor.name]
    adapters = [(entry["file"], entry["scale"]) for entry in report["adapters"]]
    assert adapters == [("kohya.safetensors", 0.3), (LORA_FILE, 0.4)]
    again = ExportOptions(model=str(tiny_folder), output=str(folder), verify_only=True)
    asked = rf"exported with --lora kohya\.safetensors:0\.3 --lora {re.escape(LORA_FILE)}:0\.4: give it again"
    with pytest.raises(RefusedInputError, match=asked):
        export_folder(again)
    given = (f"{files['kohya']}:0.3", f"{files['peft']}:0.4")
    assert export_folder(replace(again, lora=given))["parity"] == report["parity"]


@pytest.mark.parametrize("spelling", ["text_encoder.text_model.", "text_encoder.", "lora_te_text_model_", "lora_te1_"])
def test_text_encoder_layers_are_merged_by_each_name(spelling, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    weights = {name: module.weight for name, module in pipeline.text_encoder.named_modules() if "q_proj" in name}
    ((name, weight),) = weights.items()
    before = weight.clone()
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    bare = name.removeprefix("text_model.")
    if spelling.startswith("lora_"):
        key = spelling + bare.replace(".", "_")
        tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
    else:
        tensors = {f"{spelling}{bare}.lora_A.weight": a, f"{spelling}{bare}.lora_B.weight": b / 2}
    save_file(tensors, tmp_path / "te.safetensors")
    fuse_adapter(pipeline, tmp_path / "te.safetensors", 2.0)
    torch.testing.assert_close(weight, before + b @ a)


@pytest.mark.parametrize(("header", "factor"), [
    ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attentions.0.proj_in": 8}}, 4),
    ({"unet.lora_alpha": 6}, 3),
    ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 2**0.5),
    ({}, 1),
], ids=["pattern", "alpha", "rslora", "none"])  # fmt: skip
def test_header_of_a_peft_file_gives_the_scale_that_diffusers_reads(header, factor, tiny_folder, tmp_path):
    name = "mid_block.attentions.0.proj_in"
    a, b = torch.randn(2, 16, 1, 1), torch.randn(16, 2, 1, 1)
    metadata = {"unet.r": 2, "unet.target_modules": [name], **header}
    save_file(
        {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b},
        tmp_path / "peft.safetensors",
        {"lora_adapter_metadata": json.dumps(metadata)} if header else {},
    )
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tiny_folder) for _ in range(2))
    before = ours.unet.get_submodule(name).weight.clone()
    fuse_adapter(ours, tmp_path / "peft.safetensors", 1.0)
    merged = ours.unet.get_submodule(name).weight
    torch.testing.assert_close(merged, before + (factor * b.flatten(1) @ a.flatten(1)).reshape(merged.shape))
    theirs.load_lora_weights(tmp_path, weight_name="peft.safetensors")
    theirs.fuse_lora()
    torch.testing.assert_close(merged, theirs.unet.get_submodule(name).base_layer.weight)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "alpha_pattern": {"attn2.to_q": 3}},
        {"alpha_pattern": {r"attn1\.to_k": 5}},
        {"alpha_pattern": {r"down_blocks.*to_k": 5}},
        {"alpha_pattern": {"^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": 32}},
        {"alpha_pattern": {"attn1.to_q": 3, "to_q": 30}, "rank_pattern": {"attn2.*": 2}},
    ],
    ids=["rslora", "escaped", "wildcard", "anchored", "first match"],
)
def test_patterns_of_a_peft_file_scale_as_in_peft(config, tiny_folder, tmp_path):
    adapted, pipeline = (StableDiffusionPipeline.from_pretrained(tiny_folder) for _ in range(2))
    given = _inputs()
    with torch.no_grad():
        base = adapted.unet(*given).sample
    modules = ["to_q", "to_k"]
    adapted.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules, **config))
    adapted.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(adapted.unet),
        unet_lora_adapter_metadata=adapted.unet.peft_config["default"].to_dict() | {"target_modules": modules},
    )
    fuse_adapter(pipeline, tmp_path, 1.0)
    with torch.no_grad():
        got, want = pipeline.unet(*given).sample, adapted.unet(*given).sample
    assert relative_errors(got.numpy(), want.numpy())[0] <= 5e-6
    assert relative_errors(base.numpy(), want.numpy())[0] > 1e-3


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("[1]", "lora_adapter_metadata in its header is no JSON object: save the LoRA again"),
        ('{"unet', "lora_adapter_metadata in its header is no JSON object"),
        ('{"unet.lora_alpha": "a"}', "lora_alpha or alpha_pattern of unet in its header is no number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "lora_alpha or alpha_pattern of unet"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"conv_in": [2]}}', "lora_alpha or alpha_pattern of unet"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "lora_alpha or alpha_pattern of unet"),
    ],
)
def test_header_that_tells_no_scale_is_refused(header, sentence, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    shape = pipeline.unet.conv_in.weight.shape
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(1, *shape[1:]), "unet.conv_in.lora_B.weight": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(ModelError, match=rf"peft\.safetensors: {sentence}"):
        fuse_adapter(pipeline, tmp_path / "peft.safetensors", 1.0)


def test_sgm_names_are_those_that_diffusers_maps_back():
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


def _file(tmp_path, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_refusals_name_the_file_and_change_nothing(adapted, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    good = load_file(adapted[1]["kohya"])
    up = next(key for key in good if key.endswith("lora_up.weight"))
    down = up.replace("lora_up", "lora_down")
    cases = {
        "is no LoRA weight: only peft and kohya LoRA files merge": good
        | {"lora_unet_conv_in.hada_w1_a": torch.ones(2)},
        "layers match this model, not lora_unet_nowhere": good | {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)},
        "lacks one of its two matrices": {key: value for key, value in good.items() if key != up},
        "which does not fit this model's": good | {up: torch.ones(7, good[down].shape[0])},
        "changes nothing": {key: value * 0 for key, value in good.items()},
        "holds NaN or infinity": good | {up: good[up] * float("nan")},
    }
    for sentence, tensors in cases.items():
        with pytest.raises(ModelError, match=f"x.safetensors.*{sentence}"):
            fuse_adapter(pipeline, _file(tmp_path, tensors), 1.0)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02 pickled")
    with pytest.raises(RefusedInputError, match="a pickle, which can run code"):
        fuse_adapter(pipeline, tmp_path / "x.safetensors", 1.0)
    assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
