"""Tests of the export folder: its layout, its graphs, and failures that leave nothing behind."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast.export import folder as folder_module
from d2f_fast.export import verify
from d2f_fast.export.exported_files import latent_sides
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.lora.source import LORA_FILE


def test_folder_has_the_layout_that_optimum_loads(exported):
    folder, _ = exported
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    components = ("unet", "text_encoder", "vae_encoder", "vae_decoder")
    expected = {f"{name}/{file}" for name in components for file in ("model.onnx", "config.json")}
    expected |= {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "export.json"}
    expected |= {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    expected |= {"tokenizer/tokenizer_config.json", "unet/model.onnx.data", "unet/sampler.onnx", "unet/sampler_2.onnx"}
    assert files == expected | {"unet/steps.json"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["safety_checker"] == [None, None]


def test_autoencoders_name_their_output_sizes_by_their_input_sizes(exported):
    sides = {}
    for name in ("vae_encoder", "vae_decoder"):
        graph = onnx.load(exported[0] / name / "model.onnx").graph
        sides[name] = [d.dim_param for d in graph.output[0].type.tensor_type.shape.dim][2:]
    assert sides == {
        "vae_encoder": ["height / 2", "width / 2"],
        "vae_decoder": ["latent_height * 2", "latent_width * 2"],
    }


def test_every_component_is_equal_to_torch_at_sizes_that_were_not_traced(exported):
    _, report = exported
    rows = report["parity"]
    graphs = {row["graph"] for row in rows}
    assert graphs == {f"{name}/model.onnx" for name in ("unet", "text_encoder", "vae_encoder", "vae_decoder")} | {
        "unet/sampler.onnx",
        "unet/sampler_2.onnx",
    }
    single = [row for row in rows if "sampler" not in row["graph"]]
    assert max(row["rms"] for row in single) <= 5e-6
    assert max(row["max"] for row in single) <= 1e-5
    sizes = [tuple(row["sizes"]["sample"]) for row in single if row["graph"].startswith("unet")]
    assert len(set(sizes)) == 3 and 1 in {size[0] for size in sizes} and all(size[2] != size[3] for size in sizes)
    assert 154 in {row["sizes"]["encoder_hidden_states"][1] for row in single if row["graph"].startswith("unet")}


def test_fractional_timestep_changes_the_output(exported, one_level_folder):
    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "unet/model.onnx")
    (timestep,) = [value for value in session.get_inputs() if value.name == "timestep"]
    assert (timestep.type, timestep.shape) == ("tensor(float)", [])
    unet = StableDiffusionPipeline.from_pretrained(one_level_folder).unet
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 16)

    def at(t):
        feed = {
            "sample": sample.numpy(),
            "encoder_hidden_states": context.numpy(),
            "timestep": np.asarray(t, np.float32),
        }
        return session.run(None, feed)[0]

    with torch.no_grad():
        want = unet(sample, torch.tensor(673.16), context).sample.numpy()
    assert _rms(at(673.16), want) <= 5e-6
    assert _rms(at(673.16), at(672)) > _rms(at(673.16), at(673)) > 1e-3


def test_half_precision_halves_the_file_and_keeps_times_in_float32(exported, exported_half):
    full, (folder, report) = exported[0], exported_half
    assert max(row["rms"] for row in report["parity"]) <= 3e-3
    data = "unet/model.onnx.data"
    assert (folder / data).stat().st_size <= 0.55 * (full / data).stat().st_size
    for name in ("model", "sampler"):
        for value in onnx.load(folder / f"unet/{name}.onnx", load_external_data=False).graph.input:
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("force_upcast", [True, False])
def test_half_precision_leaves_an_autoencoder_that_overflows_in_float32(
    force_upcast, one_level_folder, tmp_path, monkeypatch
):
    model = tmp_path / "model"
    shutil.copytree(one_level_folder, model)
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"force_upcast": force_upcast}))
    converted = {}

    def convert(component, *_):
        converted[component.name] = {parameter.dtype for parameter in component.module.parameters()}

    monkeypatch.setattr(folder_module.graphs, "convert", convert)
    monkeypatch.setattr(folder_module.graphs, "save", lambda *_, **__: None)
    names = ("text_encoder", "vae_encoder", "vae_decoder")
    options = {"model": str(model), "output": str(tmp_path / "out"), "components": ",".join(names)}
    report = export_folder(ExportOptions(**options, precision="fp16", skip_verify=True))
    kept = ("vae_encoder", "vae_decoder") if force_upcast else ()
    assert report["precision"] == {name: "fp32" if name in kept else "fp16" for name in names}
    assert converted == {name: {torch.float32 if name in kept else torch.float16} for name in names}


@pytest.mark.slow
def test_bfloat16_is_a_valid_graph_of_opset_23(exported_unet, one_level_folder):
    options = {"precision": "bf16", "skip_verify": True, "static": "1x16x16"}
    folder, report = exported_unet(model=str(one_level_folder), **options)
    assert (report["opset"], report["verified"], report["parity"]) == (23, False, [])
    graph = onnx.load(folder / "unet/model.onnx", load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer if tensor.dims and tensor.name.startswith("unet.")}
    assert types == {onnx.TensorProto.BFLOAT16}


@pytest.mark.usefixtures("text_encoder_of_exported")
def test_invalid_graph_is_refused_even_where_graphs_are_not_run(one_level_folder, tmp_path, monkeypatch):
    save = folder_module.graphs.save

    def save_wrong(model, path, external):
        next(node for node in model.graph if node.op_type == "MatMul").op_type = "Sin"
        save(model, path, external)

    monkeypatch.setattr(folder_module.graphs, "save", save_wrong)
    options = ExportOptions(model=str(one_level_folder), output=str(tmp_path / "out"), components="text_encoder")
    with pytest.raises(verify.VerificationError, match=r"text_encoder/model\.onnx is not a valid ONNX model"):
        export_folder(replace(options, skip_verify=True))
    assert list(tmp_path.iterdir()) == []


def test_static_export_has_numbers_for_sizes(exported_static):
    _, report = exported_static
    assert max(row["rms"] for row in report["parity"]) <= 1e-5
    shapes = {row["graph"]: row["sizes"] for row in report["parity"]}
    assert shapes["unet/model.onnx"]["sample"] == [4, 4, 16, 8]
    assert shapes["unet/sampler.onnx"]["latents"] == [2, 4, 16, 8]
    assert report["trtexec"][0].count("Shapes") == 0


def test_graphs_of_another_model_fail_the_verification(exported, one_level_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(one_level_folder)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    pipeline.save_pretrained(tmp_path / "other")
    options = ExportOptions(model=str(tmp_path / "other"), output=str(exported[0]), unroll=2, verify_only=True)
    with pytest.raises(verify.VerificationError, match=r"unet/.*onnx differs from torch by"):
        export_folder(options)


@pytest.mark.usefixtures("text_encoder_of_exported")
def test_failed_export_is_kept_where_asked(one_level_folder, tmp_path, monkeypatch):
    _broken_graphs(monkeypatch)
    options = ExportOptions(
        model=str(one_level_folder), output=str(tmp_path / "out"), components="text_encoder", keep_failed=True
    )
    with pytest.raises(verify.VerificationError, match="the graphs are in"):
        export_folder(options)
    assert [path.name for path in tmp_path.iterdir()] == ["out-failed"]
    assert (tmp_path / "out-failed/text_encoder/model.onnx").is_file()


def _rms(got, want):
    return verify.relative_errors(got, want)[0]


def _broken_graphs(monkeypatch):
    """Set the first parameter of every converted graph to zero."""
    convert = folder_module.graphs.convert

    def broken(component, *rest):
        name, parameter = next(component.module.named_parameters())
        model = convert(component, *rest)
        model.graph.initializers[name].const_value = onnx_ir.tensor(np.zeros(parameter.shape, np.float32))
        return model

    monkeypatch.setattr(folder_module.graphs, "convert", broken)


def test_export_generates_at_the_size_that_its_lora_was_trained_at(adapt, one_level_folder, tmp_path):
    _, files = adapt(one_level_folder)
    tensors, header = read_tensors(files["peft"] / LORA_FILE)
    write_tensors(tmp_path / "lora.safetensors", tensors, header | {"d2f.resolution": "24x16"})
    options = ExportOptions(model=str(one_level_folder), lora=(str(tmp_path / "lora.safetensors"),))
    config = folder_module.ExportJob(options).model.unet.config
    assert latent_sides(config) == (12, 8)
