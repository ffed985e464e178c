"""The static TensorRT check: what passes, what is named, and the minimum version."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from d2f_fast.export import graphs, verify
from d2f_fast.export.folder import ExportJob
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.readiness import check_readiness, profiles_of, trtexec_line
from d2f_fast.export.sampler_graph import write_sampler
from d2f_fast.export.verify import relative_errors
from d2f_fast.export.wrappers import unet_component


def test_every_graph_of_an_export_is_ready(exported):
    _, report = exported
    assert len(report["tensorrt"]) == 6
    for name, found in report["tensorrt"].items():
        assert found["problems"] == [], name
        assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 20, "10.0")
    loops = {name: found["operators"].get("Loop", 0) for name, found in report["tensorrt"].items()}
    assert loops["unet/sampler.onnx"] == 1 and sum(loops.values()) == 1


def test_opset_23_has_one_node_for_each_normalisation_and_attention(exported_unet, tiny_folder):
    _, report = exported_unet(target="tensorrt", components="unet,sampler", steps="2", static="1x16x24")
    found = report["tensorrt"]["unet/model.onnx"]
    unet = StableDiffusionPipeline.from_pretrained(tiny_folder).unet
    attentions = sum(type(module).__name__ == "Attention" for module in unet.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert (found["operators"]["Attention"], found["operators"]["GroupNormalization"]) == (attentions, norms)
    assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 23, "10.14")
    assert report["tensorrt"]["unet/sampler.onnx"]["ready"]
    assert max(row["rms"] for row in report["parity"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "counts"), [(20, (0, 0)), (23, (32, 61))])
def test_layout_of_stable_diffusion_15_is_ready(opset, counts, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=64).eval()
    graphs.save(graphs.convert(unet_component(unet), opset), tmp_path / "model.onnx", external=True)
    found = check_readiness(tmp_path / "model.onnx")
    assert found["problems"] == []
    assert (found["operators"].get("Attention", 0), found["operators"].get("GroupNormalization", 0)) == counts
    rows = verify.compare(tmp_path / "model.onnx", verify.component_cases(unet_component(unet)))
    print(f"\nopset {opset}: {sum(found['operators'].values())} nodes, rms {max(row['rms'] for row in rows):.1e}")
    assert max(row["rms"] for row in rows) <= 5e-6
    # The Loop adds 17 nodes, of 1900 or 1200.
    write_sampler(tmp_path / "sampler.onnx", tmp_path / "model.onnx", guidance=True, scaling={})
    operators = check_readiness(tmp_path / "sampler.onnx")["operators"]
    assert sum(operators.values()) <= 1.05 * sum(found["operators"].values())


_node = helper.make_node


def _save(tmp_path, nodes, initializers=(), **options):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, options.pop("shape", None))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    options = {"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10} | options
    onnx.save(helper.make_model(graph, **options), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def _loop(nodes, trips, collected=()):
    """A Loop of `trips` from x to y whose body is nodes from s to o; `collected` are values that it gathers too."""
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("i", TensorProto.INT64, []),
            ("c", TensorProto.BOOL, []),
            ("s", TensorProto.FLOAT, ["n", 2]),
            ("c2", TensorProto.BOOL, []),
            ("o", TensorProto.FLOAT, ["n", 2]),
        )
    ]
    outputs = [*values[3:], *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in collected)]
    body = helper.make_graph([*nodes, _node("Identity", ["c"], ["c2"])], "body", values[:3], outputs)
    return _node("Loop", [trips, "", "x"], ["y", *(f"all_{name}" for name in collected)], body=body)


THREE = numpy_helper.from_array(np.asarray(3), "three")
SIZES = [numpy_helper.from_array(np.ones(4, np.float32), "scales"), numpy_helper.from_array(np.asarray([0, 1]), "axes")]
TO_4D = _node("Unsqueeze", ["x", "axes"], ["z"])


@pytest.mark.parametrize(
    ("nodes", "initializers", "options", "problem"),
    [
        (
            [_node("NonZero", ["x"], ["i"]), _node("Cast", ["i"], ["y"], to=1)],
            [],
            {},
            "operator NonZero (1 times)",
        ),
        (
            [_node("Foo", ["x"], ["y"], domain="com.microsoft")],
            [],
            {"opset_imports": [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]},
            "operators of the domain com.microsoft",
        ),
        ([_node("Neg", ["x"], ["y"])], [], {"ir_version": 11}, "IR version 11 above 10"),
        (
            [_node("Cast", ["x"], ["d"], to=11), _node("Cast", ["d"], ["y"], to=1)],
            [],
            {},
            "computes in float64",
        ),
        (
            [_node("Neg", ["x"], ["y"])],
            [numpy_helper.from_array(np.ones(2), "w")],
            {},
            "initializer w in float64",
        ),
        (
            [_node("MatMul", ["x", "w"], ["y"])],
            [numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
            {},
            "shape inference fails",
        ),
        ([_node("Cast", ["x"], ["u"], to=4), _node("Cast", ["u"], ["y"], to=1)], [], {}, "computes in uint16"),
        (
            [_loop([_node("Cast", ["s"], ["d"], to=11), _node("Cast", ["d"], ["o"], to=1)], "three")],
            [THREE],
            {},
            "Cast  computes in float64",
        ),
        (
            [_loop([_node("MatMul", ["s", "w"], ["p"]), _node("Add", ["p", "s"], ["o"])], "three")],
            [THREE, numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
            {},
            "shape inference fails",
        ),
        (
            [_node("Size", ["x"], ["count"]), _loop([_node("Neg", ["s"], ["o"])], "count", ["o"])],
            [],
            {},
            "scan output all_o of dynamic length",
        ),
        (
            [TO_4D, _node("Resize", ["z", "", "scales"], ["y"], mode="linear", antialias=1)],
            SIZES,
            {},
            "Resize : antialias 1",
        ),
        (
            [TO_4D, _node("Resize", ["z", "", "scales"], ["y"], mode="cubic")],
            SIZES,
            {},
            "Resize : mode cubic",
        ),
        (
            [
                TO_4D,
                _node(
                    "Resize",
                    ["z", "roi", "scales"],
                    ["y"],
                    mode="linear",
                    coordinate_transformation_mode="tf_crop_and_resize",
                ),
            ],
            [*SIZES, numpy_helper.from_array(np.ones(8, np.float32), "roi")],
            {},
            "Resize : coordinate_transformation_mode tf_crop_and_resize",
        ),
        ([_node("Neg", ["x"], ["y"])], [], {"opset_imports": [helper.make_opsetid("", 25)]}, "opset 25 above 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problem_is_named(nodes, initializers, options, problem, tmp_path):
    found = check_readiness(_save(tmp_path, nodes, initializers, **options))
    assert not found["ready"]
    assert any(problem in line for line in found["problems"]), found["problems"]


@pytest.mark.parametrize(
    ("nodes", "options", "minimum"),
    [
        (
            [
                _node("Shape", ["x"], ["sizes"]),
                _loop([_node("Reshape", ["s", "sizes"], ["r"]), _node("Identity", ["s"], ["o"])], "three"),
            ],
            {},
            "10.0",
        ),
        ([_loop([_node("Neg", ["s"], ["o"])], "three", ["o"])], {}, "10.0"),
        ([_node("Neg", ["x"], ["y"])], {"opset_imports": [helper.make_opsetid("", 24)]}, "10.15"),
    ],
    ids=["body that reads a shape around it", "scan output of known length", "last opset"],
)
def test_what_the_parser_takes_is_ready(nodes, options, minimum, tmp_path):
    found = check_readiness(_save(tmp_path, nodes, [THREE], shape=["n", 2], **options))
    assert (found["problems"], found["ready"], found["minimum_tensorrt"]) == ([], True, minimum)


def test_data_file_must_lie_beside_the_graph(tmp_path):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, location="other.data", length=16)
    weight.ClearField("raw_data")
    found = check_readiness(_save(tmp_path, [_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert "data file other.data is not beside the graph" in found["problems"]


@pytest.mark.parametrize(("rows", "problems"), [(2**28 - 1, []), (2**28, ["initializer w of 2 GiB or more"])])
def test_tensors_must_be_below_2_gib(rows, problems, tmp_path):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, rows], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "m.onnx.data", "length": str(8 * rows)}.items():
        weight.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx.data").touch()
    found = check_readiness(_save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert found["problems"] == problems


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


def test_engine_commands_of_a_wide_picture(exported, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/unet/config.json").read_text())
    (tmp_path / "model/unet/config.json").write_text(json.dumps(config | {"sample_size": [8, 12]}))
    lines = " ".join(ExportJob(ExportOptions(model=str(tmp_path / "model")))._trtexec(exported[0]))
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
def test_engines_give_what_onnx_runtime_gives(target, exported_unet, tiny_folder):
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
