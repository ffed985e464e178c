"""`Diff2FlowScheduler` inside stock pipelines, against diffusers' own schedulers and `sample_flow`."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from d2f_fast.errors import ModelError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = {"prompt": ["a red cat", "two dogs"], "negative_prompt": ["grey", "grey"]}


def generate(pipe, noise, guidance_scale=7.5, **options):
    return pipe(**PROMPTS, latents=noise.clone(), guidance_scale=guidance_scale, output_type="latent", **options).images


def assert_close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def dummy(sample, timestep):
    return 0.3 * sample + 0.01 * torch.as_tensor(timestep, dtype=torch.float32).sin()


def run(scheduler, sample, network=dummy):
    for timestep in scheduler.timesteps:
        sample = scheduler.step(network(sample, timestep), timestep, sample).prev_sample
    return sample


def sample_with_euler_end(velocity, x_t, times, method):
    """Integrate with a method, and take the last step by Euler, as schedulers of diffusers with `order` 2 do."""
    if method != "euler" and len(times) > 2:
        x_t, times = sample_flow(velocity, x_t, times=times[:-1], method=method), times[-2:]
    return sample_flow(velocity, x_t, times=times)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False)],
)
def test_stock_pipeline_equals_ddim_on_its_trailing_timesteps(pipe, prediction_type, zero_snr, guidance_scale):
    noise = torch.randn(2, 4, 8, 8)
    pipe.scheduler = DDIMScheduler(
        **SD,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    expected = generate(pipe, noise, guidance_scale, num_inference_steps=4)
    assert not torch.allclose(expected, noise, atol=0.1)
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    assert_close(generate(pipe, noise, guidance_scale, timesteps=[999, 749, 499, 249]), expected)
    assert pipe.scheduler.timesteps.tolist() == [999.0, 749.0, 499.0, 249.0]
    if zero_snr:  # the table starts at t = 0, so the scheduler's own trailing nodes are these
        pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config, flow_spacing="trailing")
        assert_close(generate(pipe, noise, guidance_scale, num_inference_steps=4), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stock_pipeline_equals_stock_euler_at_the_same_sigmas(pipe, prediction_type, guidance_scale):
    noise = torch.randn(2, 4, 8, 8)
    # "leading" makes stock Euler start from exactly the noise, with init_noise_sigma = sqrt(sigma_max² + 1).
    pipe.scheduler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type, timestep_spacing="leading")
    abar = pipe.scheduler.alphas_cumprod.double()[[999, 800, 560, 333, 90]]
    sigmas = [*((1 - abar) / abar).sqrt().tolist(), 0.0]
    expected = generate(pipe, noise, guidance_scale, sigmas=sigmas)
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    assert_close(generate(pipe, noise, guidance_scale, sigmas=sigmas), expected)
    np.testing.assert_allclose(pipe.scheduler.sigmas, sigmas, rtol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("method", "evaluations"), [("euler", 4), ("midpoint", 7), ("heun", 7)])
def test_every_method_in_the_stock_pipeline_equals_sample_flow_with_an_euler_end(
    pipe, method, evaluations, prediction_type, guidance_scale
):
    noise = torch.randn(2, 4, 8, 8)
    pipe.scheduler = Diff2FlowScheduler(prediction_type=prediction_type, method=method, shift=1.5)
    flow = pipe.scheduler.flow
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    got = generate(pipe, noise, guidance_scale, num_inference_steps=4)
    hook.remove()
    assert len(calls) == evaluations
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(PROMPTS["prompt"], "cpu", 1, True, PROMPTS["negative_prompt"])
        velocity = unet_velocity(pipe.unet, flow, positive, negative, guidance_scale)
        expected = sample_with_euler_end(velocity, noise, flow.times(4, shift=1.5), method)
    assert_close(got, expected)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_image_to_image_starts_from_the_diffusion_state_at_its_first_node(pipe, method):
    scheduler = Diff2FlowScheduler(**SD, method=method)
    img2img = StableDiffusionImg2ImgPipeline(
        **pipe.components | {"scheduler": scheduler}, requires_safety_checker=False
    )
    img2img.set_progress_bar_config(disable=True)
    starts = []
    add_noise = scheduler.add_noise

    def spy(*arguments):
        starts.append((*arguments, add_noise(*arguments)))
        return starts[-1][-1]

    scheduler.add_noise = spy
    got = img2img(
        **PROMPTS,
        image=torch.rand(2, 3, 16, 16),
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    ((latents, noise, _, start),) = starts
    # Two of four uniform steps are left, from t = 1/2, where both weigh 1/2 before division by n = sqrt(1/2).
    assert_close(start, (0.5 * latents + 0.5 * noise) / 0.5**0.5, 1e-6)
    with torch.no_grad():
        positive, negative = img2img.encode_prompt(PROMPTS["prompt"], "cpu", 1, True, PROMPTS["negative_prompt"])
        velocity = unet_velocity(img2img.unet, scheduler.flow, positive, negative, 3.0)
        expected = sample_with_euler_end(velocity, start * 0.5**0.5, torch.tensor([0.5, 0.75, 1.0]), method)
    assert_close(got, expected)


def test_add_noise_follows_the_run_and_equals_the_stock_one_outside_it():
    scheduler = Diff2FlowScheduler(**SD)
    stock = DDIMScheduler(**SD)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    assert_close(scheduler.add_noise(latents, noise, timesteps), stock.add_noise(latents, noise, timesteps), 1e-6)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    # The first node is t = 0, pure noise, although the network is asked at timestep 999, where the data still shows.
    assert torch.equal(scheduler.add_noise(latents, noise, scheduler.timesteps[:1]), noise)
    scheduler.set_begin_index(2)
    sample = scheduler.add_noise(latents, noise, scheduler.timesteps[2:3])
    scheduler.step(dummy(sample, scheduler.timesteps[2]), scheduler.timesteps[2], sample)
    expected = (0.75 * latents + 0.25 * noise) / (0.75**2 + 0.25**2) ** 0.5
    assert_close(scheduler.add_noise(latents, noise, scheduler.timesteps[3:]), expected, 1e-6)
    scheduler.step(dummy(sample, scheduler.timesteps[3]), scheduler.timesteps[3], sample)
    assert_close(scheduler.add_noise(latents, noise, timesteps), stock.add_noise(latents, noise, timesteps), 1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_prediction_equals_diffusers_flow_matching_euler_at_the_same_sigmas(shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    noise = torch.randn(2, 4, 8, 8)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = run(stock, noise)
    ours = Diff2FlowScheduler(prediction_type="flow_prediction", shift=shift)
    ours.set_timesteps(4)
    np.testing.assert_allclose(ours.sigmas, stock.sigmas, atol=1e-7)
    np.testing.assert_allclose(ours.timesteps, stock.timesteps, rtol=1e-6)
    assert_close(run(ours, noise), expected)
    ours.set_timesteps(sigmas=stock.sigmas.tolist())
    assert_close(run(ours, noise), expected)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    assert_close(run(ours, noise), expected)


@pytest.mark.parametrize(
    "source", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]
)
def test_from_config_keeps_the_noise_table_of_any_diffusion_scheduler(source):
    given = {"beta_schedule": "scaled_linear", "beta_start": 0.0007, "beta_end": 0.013, "num_train_timesteps": 500}
    for options in ({}, {**given, "prediction_type": "v_prediction"}, {"trained_betas": [0.1, 0.2, 0.3, 0.4]}):
        stock = source(**options)
        ours = Diff2FlowScheduler.from_config(stock.config, shift=2.0)
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)
        assert ours.config.prediction_type == stock.config.prediction_type
        assert ours.config.shift == 2.0
        back = source.from_config(ours.config)
        assert torch.equal(back.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("source", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_from_config_keeps_zero_terminal_snr(source):
    stock = source(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ours = Diff2FlowScheduler.from_config(stock.config)
    assert ours.flow.t_min == 0
    with pytest.raises(ModelError, match="zero terminal SNR"):
        Diff2FlowScheduler.from_config(stock.config, prediction_type="epsilon")


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_saved_and_loaded_scheduler_samples_the_same(tmp_path, prediction_type):
    options = {"prediction_type": prediction_type, "beta_end": 0.02, "shift": 1.7, "method": "heun"}
    scheduler = Diff2FlowScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    loaded = Diff2FlowScheduler.from_pretrained(tmp_path)
    assert all(loaded.config[key] == value for key, value in options.items())
    noise = torch.randn(2, 4, 8, 8)
    results = []
    for each in (scheduler, loaded):
        each.set_timesteps(3)
        results.append(run(each, noise))
    assert torch.equal(*results)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["method"] == "heun"


def test_alignment_can_be_read_from_this_scheduler():
    ours = Diff2FlowScheduler(**SD, prediction_type="v_prediction")
    assert Alignment.from_scheduler(ours).t_min == ours.flow.t_min
    assert len(ours) == 1000 and ours.init_noise_sigma == 1.0
    with pytest.raises(ModelError, match="has no alphas_cumprod"):
        Alignment.from_scheduler(Diff2FlowScheduler(prediction_type="flow_prediction"))


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_repeated_run_and_run_after_an_interrupted_one_are_equal(method):
    scheduler = Diff2FlowScheduler(**SD, method=method)
    noise = torch.randn(2, 4, 8, 8)
    scheduler.set_timesteps(3)
    first = run(scheduler, noise)
    assert scheduler.step_index == len(scheduler.timesteps)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(scheduler.order)
    scheduler.step(noise, scheduler.timesteps[0], noise)
    scheduler.set_timesteps(3)
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert torch.equal(run(scheduler, noise), first)
    assert torch.equal(run(set_again(copy.deepcopy(scheduler)), noise), first)


def set_again(scheduler):
    scheduler.set_timesteps(3)
    return scheduler


def test_step_returns_state_and_predicted_latents_in_the_type_of_the_sample():
    scheduler = Diff2FlowScheduler(**SD)
    stock = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    sample, output = torch.randn(2, 2, 4, 8, 8)
    stock.set_timesteps(4)
    expected = stock.step(output, 499, sample)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        results = []
        for return_dict in (True, False):
            scheduler.set_timesteps(timesteps=[499, 249])
            assert scheduler.scale_model_input(sample, 499) is sample
            results.append(scheduler.step(output.to(dtype), 499, sample.to(dtype), return_dict=return_dict))
        assert torch.equal(results[0].prev_sample, results[1][0])
        assert torch.equal(results[0].pred_original_sample, results[1][1])
        assert results[0].prev_sample.dtype == results[0].pred_original_sample.dtype == dtype
        assert_close(results[0].prev_sample.float(), expected.prev_sample, tolerance)
        assert_close(results[0].pred_original_sample.float(), expected.pred_original_sample, tolerance)


def test_nodes_that_share_a_timestep_are_stepped_in_turn():
    # Both are below t_min, where the timestep is 999: a look-up by value would take the first step twice.
    scheduler = Diff2FlowScheduler(**SD)
    scheduler.set_timesteps(sigmas=[100.0, 30.0, 1.0, 0.0])
    assert scheduler.timesteps.tolist()[:2] == [999.0, 999.0]
    noise = torch.randn(2, 4, 8, 8)
    flow = scheduler.flow

    def velocity(x_t, t):
        sample = flow.to_sample(x_t, t)
        return flow.velocity(dummy(sample, flow.timestep(t)), sample, t)

    times = torch.tensor([0.0, 1 / 31, 0.5, 1.0])
    assert_close(run(scheduler, noise), sample_flow(velocity, noise, times=times))


def test_rounded_first_sigma_starts_at_the_end_of_the_table():
    scheduler = Diff2FlowScheduler(**SD)
    abar = scheduler.alphas_cumprod[-1].item()
    largest = ((1 - abar) / abar) ** 0.5
    assert largest < 14.62  # rounded up to four digits, as in a list
    for first in (largest, 14.62):
        scheduler.set_timesteps(sigmas=[first, 1.0, 0.0])
        np.testing.assert_allclose(scheduler.sigmas, [first, 1.0, 0.0], rtol=1e-6)
    scheduler.set_timesteps(sigmas=[1.002 * largest, 1.0, 0.0])
    assert scheduler.sigmas.tolist() == [float("inf"), 1.0, 0.0]


@pytest.mark.parametrize("sequence", [list, tuple, np.array, torch.tensor])
def test_nodes_may_be_given_as_any_sequence(recwarn, sequence):
    scheduler = Diff2FlowScheduler(**SD)
    scheduler.set_timesteps(timesteps=sequence([999.0, 500.25]))
    np.testing.assert_allclose(scheduler.timesteps, [999.0, 500.25], rtol=1e-6)
    scheduler.set_timesteps(sigmas=sequence([3.0, 1.0, 0.0]))
    np.testing.assert_allclose(scheduler.sigmas, [3.0, 1.0, 0.0], rtol=1e-6)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "choice", "sentence"),
    [
        ({}, {}, "give exactly one of num_inference_steps, timesteps and sigmas"),
        ({}, {"num_inference_steps": 4, "sigmas": [1.0, 0.0]}, "give exactly one of"),
        ({}, {"timesteps": [1000.0, 500.0]}, r"timesteps must be in \[0, 999\], got \[1000.0, 500.0\]"),
        ({"prediction_type": "flow_prediction"}, {"timesteps": [1001.0]}, r"timesteps must be in \[0, 1000\], got"),
        ({}, {"sigmas": [3.0, 1.0]}, r"sigmas must end in 0.0 \(steps \+ 1 values\), got \[3.0, 1.0\]"),
        ({}, {"sigmas": []}, r"sigmas must end in 0.0 \(steps \+ 1 values\), got \[\]"),
        ({}, {"sigmas": [0.0]}, r"the nodes must fall from noise to data, got flow times \[1.0\]"),
        ({}, {"sigmas": [1.0, 3.0, 0.0]}, r"the nodes must fall from noise to data, got flow times \[0.5, 0.25, 1.0\]"),
        ({}, {"sigmas": [float("nan"), 1.0, 0.0]}, "the nodes must fall from noise to data"),
        ({}, {"timesteps": [249, 499]}, "the nodes must fall from noise to data"),
        ({}, {"timesteps": []}, "the nodes must fall from noise to data"),
        ({}, {"num_inference_steps": 0}, "steps must be at least 1, got 0"),
        ({"shift": -1.0}, {"num_inference_steps": 4}, "shift must be positive, got -1.0"),
        ({"flow_spacing": "leading"}, {"num_inference_steps": 4}, 'spacing must be "uniform" or "trailing", got'),
        ({}, {"sigmas": [-2.0, 1.0, 0.0]}, "the nodes must fall from noise to data"),
        ({"prediction_type": "flow_prediction"}, {"sigmas": [3.0, 1.0, 0.5, 0.0]}, "the nodes must fall"),
        ({"prediction_type": "flow_prediction"}, {"sigmas": [3.0, 0.5, 0.0]}, r"got flow times \[-2.0, 0.5, 1.0\]"),
    ],
)
def test_unusable_nodes_are_refused(options, choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        Diff2FlowScheduler(**options).set_timesteps(**choice)


def test_steps_before_and_after_a_schedule_are_refused():
    scheduler, sample = Diff2FlowScheduler(**SD), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(sample, 999, sample)
    for method, evaluations in (("euler", 2), ("heun", 3)):
        scheduler = Diff2FlowScheduler(**SD, method=method)
        scheduler.set_timesteps(2)
        run(scheduler, sample)
        with pytest.raises(
            ValueError, match=f"the schedule of {evaluations} evaluations has ended: call set_timesteps"
        ):
            scheduler.step(sample, 0, sample)


def test_flow_matching_schedulers_are_read_and_others_without_a_table_refused():
    for stock in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ):
        ours = Diff2FlowScheduler.from_config(stock.config)
        assert ours.config.prediction_type == "flow_prediction"
        ours.set_timesteps(4)
        torch.testing.assert_close(ours.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    with pytest.raises(ModelError, match="the configuration has no beta_schedule"):
        Diff2FlowScheduler.from_config(EDMEulerScheduler().config)


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_tables_that_only_ddpm_has_are_read(schedule):
    stock = DDPMScheduler(beta_schedule=schedule)
    torch.testing.assert_close(Diff2FlowScheduler.from_config(stock.config).alphas_cumprod, stock.alphas_cumprod)


def test_unusable_configurations_are_refused():
    with pytest.raises(ValueError, match=r"method must be one of \('euler', 'midpoint', 'heun'\), got 'rk4'"):
        Diff2FlowScheduler(method="rk4")
    with pytest.raises(ModelError, match="prediction_type must be one of"):
        Diff2FlowScheduler(prediction_type="velocity")
