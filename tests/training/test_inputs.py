"""Inputs of a step: their densities and dropped captions, and every form in which a batch may be given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.inputs import step_seed

TIMES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "timestep_sampling": (
        {"timestep_sampling": "mode"},
        lambda u, z: 1 - u - 1.29 * ((torch.pi / 2 * u).cos() ** 2 - 1 + u),
    ),
    "logit_mean": ({"timestep_sampling": "logit_normal", "logit_mean": -0.7}, lambda u, z: (z - 0.7).sigmoid()),
    "logit_std": ({"timestep_sampling": "logit_normal", "logit_std": 0.4}, lambda u, z: (0.4 * z).sigmoid()),
    "flow_shift": ({"flow_shift": 3.0}, lambda u, z: 3 * u / (1 + 2 * u)),
}


@pytest.mark.parametrize("option", TIMES)
def test_flow_times_follow_the_chosen_density(
    next_inputs: Any, make_batch: Any, make_trainer: Any, option: str
) -> None:
    options, sigma = TIMES[option]
    trainer = make_trainer(**options)
    t = next_inputs(trainer, make_batch()).t
    generator = torch.Generator().manual_seed(step_seed(trainer.config.seed, 0))
    torch.randn(2, *make_batch()["latents"].shape, generator=generator)  # for the posterior, and the noise
    state = generator.get_state()
    u = torch.rand(4, generator=generator).double()
    z = torch.randn(4, generator=generator.set_state(state)).double()
    torch.testing.assert_close(1 - t.double(), sigma(u, z), rtol=0, atol=1e-6)


def test_dropped_captions_become_the_empty_prompt(next_inputs: Any, make_batch: Any, make_trainer: Any) -> None:
    trainer = make_trainer(caption_dropout=0.5)
    given = make_batch(64)
    text = next_inputs(trainer, given).condition["encoder_hidden_states"]
    null = trainer.model.encode_prompts([""])["encoder_hidden_states"][0]
    dropped = (text == null).flatten(1).all(1)
    assert 20 <= dropped.sum() <= 44
    assert torch.equal(text[~dropped], given["encoder_hidden_states"][~dropped])


def test_every_form_of_images_texts_and_mask_gives_the_same_loss(make_trainer: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    prompts = ["a b", "c"]
    model: BaseModel = make_trainer().model
    posterior = model.encode_images(pixels)
    tokenizer = model.pipeline.tokenizer
    ids = tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt").input_ids
    text = model.encode_prompts(prompts)

    def loss(**given: Any) -> float:
        return make_trainer().step(given).item()

    whole = loss(pixel_values=pixels, **text)
    assert loss(**posterior, **text) == whole
    assert loss(pixel_values=pixels, input_ids=ids) == whole
    ones = torch.ones(2, 1, 8, 8)
    assert loss(pixel_values=pixels, **text, mask=ones) == pytest.approx(whole, rel=1e-6)
    assert loss(pixel_values=pixels, **text, mask=0 * ones) == 0
    certain = posterior | {"std": torch.zeros_like(posterior["std"])}
    assert loss(latents=posterior["mean"] * 0.5, **text) == pytest.approx(loss(**certain, **text), rel=1e-6)


def test_texts_are_cast_to_the_type_of_the_network(make_batch: Any, make_trainer: Any) -> None:
    given = make_batch()
    text = given["encoder_hidden_states"].half()
    first = make_trainer("first").step({**given, "encoder_hidden_states": text})
    assert torch.equal(first, make_trainer("second").step({**given, "encoder_hidden_states": text.float()}))


def test_values_of_the_first_batch_are_checked(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer()
    pixels = {"pixel_values": torch.full((2, 3, 16, 16), 255.0)}
    given = {name: value for name, value in make_batch(2).items() if name == "encoder_hidden_states"}
    with pytest.raises(RefusedInputError, match=r"pixel_values must be in \[-1, 1\], got 255 to 255: divide"):
        trainer.step(given | pixels)
    assert trainer.global_step == 0
