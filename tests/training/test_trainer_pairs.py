"""Training on pairs: what is learned, exact continuation, and what the result says of itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.data.batch import check_batch
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError, RefusedInputError
from d2f_fast.files.tensor_file import read_metadata
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.training.recipe import recipe
from d2f_fast.training.teacher import TeacherModel, start_teacher

META = {"guidance_scale_range": [2.0, 5.0], "steps": 25, "solver": "heun"}


@pytest.fixture
def pairs(write_pairs: Callable[..., Path], tmp_path: Path) -> PairDataset:
    """Return ten pairs in two shards."""
    for i in range(2):
        write_pairs(tmp_path / "pairs" / f"{i}.tar", 5, meta=META)
    return PairDataset([tmp_path / "pairs"])


def test_step_learns_the_line_from_the_noise_of_the_pair(next_inputs: Any, make_batch: Any, make_trainer: Any) -> None:
    trainer, noise = make_trainer(caption_dropout=0.0), torch.randn(4, 4, 8, 8)
    given = make_batch(noise=noise)
    check_batch(given)
    inputs, sampled = next_inputs(trainer, given), next_inputs(trainer, make_batch())
    assert torch.equal(inputs.noise, noise) and not torch.equal(sampled.noise, noise)
    assert torch.equal(inputs.t, sampled.t)  # The other random numbers of the step are the same.
    alignment = trainer.alignment
    with torch.no_grad():
        sample = alignment.to_sample(alignment.interpolate(inputs.latents, noise, inputs.t), inputs.t)
        output = trainer.unet(sample, alignment.timestep(inputs.t), given["encoder_hidden_states"]).sample
        velocity = alignment.velocity(output, sample, inputs.t)
    expected = (velocity - (inputs.latents - noise)).square().mean()
    assert trainer.step(given).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"objective": "fm"}, {"objective": "diffusion"}, {"adapter": "full"}], ids=str)
def test_every_objective_and_adapter_trains_on_pairs(
    options: dict[str, Any], pairs: PairDataset, make_trainer: Any, logged_losses: Any
) -> None:
    trainer = make_trainer(max_train_steps=3, checkpointing_steps=0, **options)
    assert trainer.fit(pairs)["steps"] == 3
    assert len(logged_losses(trainer)) == 3 and all(loss > 0 for loss in logged_losses(trainer))


def test_resumed_training_is_equal_bit_for_bit(
    pairs: PairDataset, make_trainer: Any, state_of: Any, assert_equal: Any
) -> None:
    whole = make_trainer("whole", train_batch_size=3)
    whole.fit(pairs)
    first = make_trainer("divided", train_batch_size=3, max_train_steps=4)
    first.fit(pairs)
    second = make_trainer("divided", train_batch_size=3, resume_from_checkpoint="latest")
    assert second.fit(pairs)["steps"] == 7
    assert_equal(state_of(second), state_of(whole))


def test_threads_that_load_change_nothing(
    pairs: PairDataset, make_trainer: Any, state_of: Any, assert_equal: Any
) -> None:
    trainers = [make_trainer(str(workers), dataloader_num_workers=workers, max_train_steps=4) for workers in (0, 2)]
    for trainer in trainers:
        trainer.fit(pairs)
    assert_equal(state_of(trainers[0]), state_of(trainers[1]))


def test_result_says_that_guidance_is_built_in(pairs: PairDataset, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_train_steps=1, checkpointing_steps=1)
    trainer.fit(pairs)
    sigmas = ", ".join(f"{round(sigma, 4):g}" for sigma in trainer.alignment.sigmas(2))
    expected = {
        "d2f.data": "pairs",
        "d2f.pairs": "10",
        "d2f.pairs_guidance": "2 to 5",
        "d2f.pairs_solver": "heun, 25 steps",
        "d2f.recommended_steps": "2",
        "d2f.recommended_guidance": "1.0",
        "d2f.recommended_sigmas": sigmas,
        "modelspec.usage_hint": f"2 steps, guidance 1, sampler Euler with the sigmas {sigmas}",
    }
    saved = trainer.save_lora(tmp_path / "out")
    checkpoint = Path(trainer.config.output_dir) / "checkpoint-1" / saved.name
    for path in (saved, tmp_path / "out" / "out_kohya.safetensors", checkpoint):
        header = read_metadata(path)
        assert {name: header[name] for name in expected} == expected
    folder = trainer.save_pipeline(tmp_path / "pipeline")
    tags = json.loads((folder / "d2f.json").read_text())
    assert {name: tags[name] for name in expected if name.startswith("d2f.")} == {
        name: value for name, value in expected.items() if name.startswith("d2f.")
    }


def test_result_states_the_size_of_the_pairs_and_generates_at_it(
    write_pairs: Callable[..., Path], make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(max_train_steps=1, checkpointing_steps=0)
    assert trainer.config.resolution == 16 and trainer.tags["d2f.resolution"] == "16"
    trainer.fit(PairDataset([write_pairs(tmp_path / "0.tar", shape=(4, 8, 12))]))
    assert read_metadata(trainer.save_lora(tmp_path / "out"))["d2f.resolution"] == "16x24"
    assert trainer.sample("a", 1)[0].size == (24, 16)


def test_pairs_that_do_not_fit_end_the_run_before_its_first_step(
    write_pairs: Callable[..., Path], make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer()
    with pytest.raises(DatasetError, match="has latents of 8 channels, and the model takes 4"):
        trainer.fit(PairDataset([write_pairs(tmp_path / "0.tar", shape=(8, 8, 8))]))
    assert trainer.global_step == 0


@pytest.mark.parametrize("options", [{}, {"objective": "fm"}, {"adapter": "full"}], ids=str)
def test_distillation_learns_the_jump_from_noise_to_latents(
    next_inputs: Any, make_batch: Any, make_trainer: Any, options: dict[str, Any]
) -> None:
    trainer, noise = make_trainer(distill=True, caption_dropout=0.0, **options), torch.randn(4, 4, 8, 8)
    given = make_batch(noise=noise)
    inputs = next_inputs(trainer, given)
    assert torch.equal(inputs.t, torch.zeros(4))
    with torch.no_grad():  # One step of the sampler from the noise of each pair.
        velocity = unet_velocity(trainer.unet, trainer.objective.flow, given["encoder_hidden_states"])
        latents = sample_flow(velocity, noise, 1)
    expected = (latents - inputs.latents).square().mean()
    assert trainer.step(given).item() == pytest.approx(expected.item(), rel=1e-4)


def test_distilled_lora_is_sampled_in_one_step(
    pairs: PairDataset, make_trainer: Any, images: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(max_train_steps=1, checkpointing_steps=0, distill=True, validation_steps=1)
    assert len(trainer.fit(pairs, pairs)["validation_losses"]) == 1
    header = read_metadata(trainer.save_lora(tmp_path / "out"))
    assert header["d2f.recommended_steps"] == "1" and header["d2f.distilled"] == "true"
    assert header["modelspec.usage_hint"] == "1 step, guidance 1, sampler Euler with the sigmas 14.6146, 0"
    assert recipe(tmp_path / "out", trainer.tags, None)[0].line.endswith("--num_inference_steps 1 --guidance_scale 1`")
    with pytest.raises(RefusedInputError, match=r"distill learns the jump from the noise of pairs, .*: give pairs or"):
        make_trainer("other", distill=True).fit(images())
    with pytest.raises(RefusedInputError, match=r"distill learns the jump .* leave one of the two out"):
        start_teacher(TeacherModel("base", "", trainer.model.flow, None, 2.0), trainer.objective, trainer.model, "no")
