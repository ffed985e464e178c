"""Images of a trained network, against the stock pipeline with the saved LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.sampling.solver_options import SolverOptions
from d2f_fast.training.trainer import AlignedTrainer


@pytest.fixture(scope="module")
def trained(
    make_config: Any, images: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AlignedTrainer:
    options = {"conv_rank": 2, "first_last_layers": True, "lora_alpha": 3.0, "ema_decay": 0.9, "flow_shift": 2.0}
    torch.manual_seed(0)
    trainer = AlignedTrainer.from_pretrained(tiny_folder, make_config(tmp_path_factory.mktemp("trained"), **options))
    trainer.fit(images())
    return trainer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sample_is_that_of_the_stock_pipeline_with_the_saved_lora(
    trained: AlignedTrainer,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance_scale: float,
    method: Any,
) -> None:
    latents: list[Tensor] = []
    decode = trained.model.vae.decode

    def noting(scaled: Tensor, **options: Any) -> Any:
        latents.append(scaled * trained.model.vae.config.scaling_factor)
        return decode(scaled, **options)

    monkeypatch.setattr(trained.model.vae, "decode", noting)
    negative_prompt = "d" if guidance_scale > 1 else ""
    trained.sample(["ab", "c"], 4, guidance_scale, negative_prompt, generator=seeded(), method=method)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config, shift=2.0, method=method)
    pipeline.load_lora_weights(trained.save_lora(tmp_path).parent)
    expected = pipeline(
        ["ab", "c"],
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt=["d", "d"],
        height=16,
        width=16,
        generator=seeded(),
        output_type="latent",
    ).images
    assert expected.std() > 0.1
    torch.testing.assert_close(latents[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sampling_uses_the_average_and_leaves_training_unchanged(
    state_of: Any, assert_equal: Any, trained: AlignedTrainer
) -> None:
    before = state_of(trained)
    first, second = (trained.sample("ab", generator=seeded()) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert_equal(state_of(trained), before)
    assert trained.unet.training
    ema, trained.ema = trained.ema, None
    try:
        assert trained.sample("ab", generator=seeded())[0].tobytes() != first[0].tobytes()
    finally:
        trained.ema = ema


def test_images_have_the_requested_size(trained: AlignedTrainer) -> None:
    pictures = trained.sample(["a", "b", "c"], num_inference_steps=1, height=24, width=32)
    assert [(picture.size, picture.mode) for picture in pictures] == [((32, 24), "RGB")] * 3
    assert trained.sample("a", num_inference_steps=1)[0].size == (16, 16)
    with pytest.raises(RefusedInputError, match="height must be a positive multiple of 8, got 17"):
        trained.sample("a", height=17)


def test_solvers_and_inversion_use_the_average_and_the_options_of_the_run(trained: AlignedTrainer) -> None:
    states: list[float] = []
    options = {"guidance_scale": 2.0, "method": "rk4", "solver": SolverOptions((0.2, 0.9))}
    images = trained.sample("ab", 2, generator=seeded(), on_state=lambda number, t, _: states.append(t), **options)
    assert states == pytest.approx(trained.alignment.times(2, shift=2.0).tolist()) and images[0].size == (16, 16)
    noise = trained.invert(images, ["ab"], 2)
    assert noise.shape == (1, 4, 8, 8) and trained.unet.training
    other = trained.sample("ab", 2, generator=seeded(), method="euler_maruyama")
    assert other[0].tobytes() != images[0].tobytes()
