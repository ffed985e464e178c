"""Tests of the commands that build TensorRT engines, and of the engines where TensorRT is installed."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from d2f_fast.export.engines import engine_commands, profiles_of, trtexec_line
from d2f_fast.export.verify import relative_errors
from d2f_fast.models.base_model import BaseModel


def test_trtexec_line_has_the_three_shapes_of_each_input():
    line = trtexec_line("unet/model.onnx", {"sample": [(2, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96)]})
    assert line == (
        "trtexec --onnx=unet/model.onnx --stronglyTyped --minShapes=sample:2x4x32x32 --optShapes=sample:2x4x64x64"
        " --maxShapes=sample:8x4x96x96 --saveEngine=unet/model.engine"
    )
    assert "Shapes" not in trtexec_line("a.onnx", {})


def test_report_has_an_engine_command_for_every_graph(exported):
    _, report = exported
    lines = {line.split()[1].removeprefix("--onnx="): line for line in report["trtexec"]}
    assert lines.keys() == report["tensorrt"].keys()
    # Guidance puts two halves into the network's batch; the sampler makes them itself.
    assert "--optShapes=sample:2x4x8x8,encoder_hidden_states:2x8x16 " in lines["unet/model.onnx"]
    assert "--minShapes=latents:1x4x4x4,encoder_hidden_states:1x8x16," in lines["unet/sampler.onnx"]
    assert "timesteps:4,coef_x:4,coef_out:4 --maxShapes=latents:4x4x12x12" in lines["unet/sampler.onnx"]
    assert "timesteps" not in lines["unet/sampler_2.onnx"]
    assert "--maxShapes=sample:4x3x24x24 " in lines["vae_encoder/model.onnx"]


def test_engine_commands_of_a_model_of_wide_images_are_wide(exported, one_level_folder, tmp_path):
    shutil.copytree(one_level_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/unet/config.json").read_text())
    (tmp_path / "model/unet/config.json").write_text(json.dumps(config | {"sample_size": [8, 12]}))
    lines = " ".join(engine_commands(exported[0], BaseModel.load(tmp_path / "model"), 2, (1, 2, 4, 8)))
    for shapes in ("optShapes=sample:2x4x8x12,", "maxShapes=latent_sample:4x4x12x18 ", "minShapes=sample:1x3x8x12 "):
        assert shapes in lines


def _run_engine(path, profiles, feed, output_shape):
    """Build an engine of a graph, run it once, and return what it gives."""
    tensorrt = pytest.importorskip("tensorrt")
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    strongly_typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # later the only kind
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    for name, shapes in profiles.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    held = {name: torch.from_numpy(np.asarray(value)).cuda().contiguous() for name, value in feed.items()}
    for name in profiles:
        context.set_input_shape(name, tuple(held[name].shape))
    output = torch.empty(output_shape, device="cuda")
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        context.set_tensor_address(name, held.get(name, output).data_ptr())
    stream = torch.cuda.Stream()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return output.cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_engines_return_what_onnx_runtime_returns(target, exported_unet, one_level_folder):
    folder, report = exported_unet(target=target, components="unet,sampler", steps="2", unroll=2)
    sizes = {"height": [4, 8, 12], "width": [4, 8, 12], "batch": [1, 2, 4], "sequence": [8] * 3, "steps": [1, 2, 4]}
    random = np.random.default_rng(0)
    for graph in report["tensorrt"]:
        session = onnxruntime.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
        feed = {}
        for value in session.get_inputs():
            shape = [sizes[size][1] if isinstance(size, str) else size for size in value.shape]
            feed[value.name] = np.asarray(random.uniform(0.1, 1, shape), np.float32)
        (want,) = session.run(None, feed)
        got = _run_engine(folder / graph, profiles_of(folder / graph, sizes), feed, want.shape)
        assert relative_errors(got, want)[0] <= 1e-4, graph
