"""Tests of the scheduler and the tokenizers beside the graphs, loaded by their own libraries."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from transformers import AutoTokenizer

from d2f_fast.export.pipeline_files import write_pipeline_files
from d2f_fast.export.source import load_model
from d2f_fast.flow.naive_flow import NaiveFlow


def test_scheduler_and_tokenizer_load_in_their_own_libraries(exported, one_level_folder):
    folder, _ = exported
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    source = StableDiffusionPipeline.from_pretrained(one_level_folder)
    assert torch.equal(scheduler.alphas_cumprod, source.scheduler.alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"
    assert AutoTokenizer.from_pretrained(folder / "tokenizer")("ab c").input_ids == source.tokenizer("ab c").input_ids


def test_network_that_predicts_the_flow_gets_a_stock_flow_scheduler(one_level_folder, tmp_path):
    write_pipeline_files(tmp_path, load_model(str(one_level_folder), None).pipeline, NaiveFlow(), 3.0)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    assert (scheduler.config.prediction_type, scheduler.config.flow_shift) == ("flow_prediction", 3.0)
    assert scheduler.config.use_flow_sigmas and scheduler.config.solver_order == 1


@pytest.mark.parametrize("sampling", ["use_karras_sigmas", "use_exponential_sigmas", "interpolation_type"])
def test_scheduler_steps_through_trained_times_whatever_the_models_settings(sampling, one_level_folder, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(one_level_folder, model)
    source = DDIMScheduler.from_pretrained(one_level_folder / "scheduler")
    own = {sampling: "log_linear" if sampling == "interpolation_type" else True, "final_sigmas_type": "sigma_min"}
    EulerDiscreteScheduler.from_config(source.config, **own).save_pretrained(model / "scheduler")
    folder.mkdir()
    loaded = load_model(str(model))
    write_pipeline_files(folder, loaded.pipeline, loaded.flow, 1.0)
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    want = [float((1 / source.alphas_cumprod[t] - 1) ** 0.5) for t in (999, 749, 499, 249)]
    assert scheduler.sigmas.tolist() == pytest.approx([*want, 0], rel=1e-5)
