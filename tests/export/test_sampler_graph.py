"""Tests of the sampler graph: the Loop, its unrolled form, and their tables."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from d2f_fast import Alignment
from d2f_fast.export.sampler_graph import count_nodes, prefixed_nodes
from d2f_fast.export.step_tables import step_table
from d2f_fast.export.verify import relative_errors
from d2f_fast.flow.naive_flow import NaiveFlow


def _check_steps(folder, feed, unet, scheduler):
    """Assert that the sampler graph takes the steps of a stock scheduler, which has its timesteps."""
    state, text = torch.from_numpy(feed["latents"]), torch.from_numpy(feed["encoder_hidden_states"])
    with torch.no_grad():
        for t in scheduler.timesteps:
            state = scheduler.step(unet(state, t, text).sample, t, state).prev_sample
    got = onnxruntime.InferenceSession(folder / "unet/sampler.onnx").run(None, feed)[0]
    assert relative_errors(got, state.numpy())[0] <= 1e-5


def _feed(table, batch=1, height=8, width=12, guided=True):
    random = np.random.default_rng(0)
    feed = {
        "latents": random.standard_normal((batch, 4, height, width), np.float32),
        "encoder_hidden_states": random.standard_normal((batch, 8, 16), np.float32),
    }
    if guided:
        feed["negative_encoder_hidden_states"] = random.standard_normal((batch, 8, 16), np.float32)
        feed["guidance_scale"] = np.asarray(5, np.float32)
    return feed | table.feed()


def _python_loop(session, feed, table):
    """Take the steps of a table in numpy, with one call of unet/model.onnx each."""
    state = feed["latents"]
    context = np.concatenate([feed["negative_encoder_hidden_states"], feed["encoder_hidden_states"]])
    for t, a, b in zip(*table.feed().values(), strict=True):
        given = {"sample": np.concatenate([state, state]), "timestep": np.asarray(t), "encoder_hidden_states": context}
        uncond, cond = np.split(session.run(None, given)[0], 2)
        state = a * state + b * (uncond + feed["guidance_scale"] * (cond - uncond))
    return state


@pytest.fixture(scope="module")
def alignment(one_level_folder):
    return Alignment.from_scheduler(DDIMScheduler.from_pretrained(one_level_folder, subfolder="scheduler"))


def test_one_session_serves_every_number_of_steps(exported, alignment):
    folder, report = exported
    session = onnxruntime.InferenceSession(folder / "unet/sampler.onnx")
    single = onnxruntime.InferenceSession(folder / "unet/model.onnx")
    for steps in (1, 2, 4, 8):
        table = step_table(alignment, steps)
        feed = _feed(table, batch=1 + steps % 3)
        (got,) = session.run(None, feed)
        assert relative_errors(got, _python_loop(single, feed, table))[0] <= 1e-5
    against_torch = [row["rms"] for row in report["parity"] if row["graph"] == "unet/sampler.onnx"]
    assert len(against_torch) == 4 and max(against_torch) <= 1e-5


def test_unrolled_form_equals_the_loop(exported, alignment):
    folder, _ = exported
    feed = _feed(step_table(alignment, 2), batch=2)
    loop, unrolled = (
        onnxruntime.InferenceSession(folder / f"unet/{name}.onnx").run(None, feed)[0]
        for name in ("sampler", "sampler_2")
    )
    assert relative_errors(unrolled, loop)[0] <= 1e-5


def test_steps_equal_those_of_ddim_between_the_same_nodes(exported, alignment, one_level_folder):
    # The start is a training timestep, which DDIM has too; there, flow Euler and DDIM (eta 0) take the same step.
    folder, _ = exported
    unet = StableDiffusionPipeline.from_pretrained(one_level_folder).unet
    scheduler = DDIMScheduler.from_pretrained(one_level_folder, subfolder="scheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    nodes = torch.cat([alignment.flow_time(scheduler.timesteps.double()), torch.ones(1)]).double()
    a, b = alignment.euler_coefficients(nodes[:-1], nodes[1:])
    table = {"timesteps": alignment.timestep(nodes[:-1]), "coef_x": a, "coef_out": b}
    feed = _feed(step_table(alignment, 4)) | {name: value.float().numpy() for name, value in table.items()}
    feed["guidance_scale"] = np.asarray(1, np.float32)
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    _check_steps(folder, feed, unet, scheduler)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_a_flow_network_are_euler_steps_in_sigma(exported, one_level_folder, shift):
    folder, _ = exported
    table = step_table(NaiveFlow(), 3, shift)
    feed = _feed(table) | {"guidance_scale": np.asarray(1, np.float32)}
    unet = UNet2DConditionModel.from_pretrained(one_level_folder, subfolder="unet")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1, 2 / 3, 1 / 3])
    assert table.sigmas == pytest.approx(scheduler.sigmas.tolist())
    _check_steps(folder, feed, unet, scheduler)


def test_loop_adds_few_nodes_to_the_network_and_a_small_file(exported):
    folder, _ = exported
    unet, sampler = folder / "unet/model.onnx", folder / "unet/sampler.onnx"
    nodes = [count_nodes(onnx.load(path, load_external_data=False).graph.node) for path in (unet, sampler)]
    # Guidance and step are 17 nodes for a network of any size; that of SD1.5 has 1900.
    assert nodes[1] - nodes[0] <= 17
    assert sampler.stat().st_size < 1e6


def test_weights_are_shared_and_the_folder_can_be_moved(exported, alignment, tmp_path):
    folder, _ = exported
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    feed = _feed(step_table(alignment, 2))
    want, got = (onnxruntime.InferenceSession(f / "unet/sampler.onnx").run(None, feed)[0] for f in (folder, moved))
    assert np.array_equal(got, want)
    (moved / "unet/model.onnx.data").unlink()
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        onnxruntime.InferenceSession(moved / "unet/sampler.onnx")


def test_sampler_without_guidance_takes_no_negative(exported_half, alignment):
    folder, report = exported_half
    session = onnxruntime.InferenceSession(folder / "unet/sampler.onnx")
    names = {value.name for value in session.get_inputs()}
    assert names == {"latents", "encoder_hidden_states", "timesteps", "coef_x", "coef_out"}
    assert session.run(None, _feed(step_table(alignment, 3), guided=False))[0].shape == (1, 4, 8, 12)
    assert not report["guidance"]


def test_nodes_with_graphs_of_their_own_are_refused():
    body = onnx.helper.make_graph([], "body", [], [])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(ValueError, match="If  holds a graph of its own, which cannot be copied"):
        prefixed_nodes(onnx.helper.make_graph([node], "g", [], []), {}, "p/")
