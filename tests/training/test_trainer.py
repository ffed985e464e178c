"""The trainer: one step against closed forms, steps that are not finite, and refused inputs."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.training.checkpoint import find_checkpoint, verify_checkpoint
from d2f_fast.training.inputs import StepInputs
from d2f_fast.training.trainer import AlignedTrainer, NonFiniteRunError


def tensors_of(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise, time and text condition."""
    return inputs.latents, inputs.noise, inputs.t, inputs.condition["encoder_hidden_states"]


def closed_form(
    objective: str, unet: Any, ddim: Any, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    """Return the float64 loss of an ε-predicting network, from the paper's equations and diffusers' table alone."""
    if objective == "fm":
        state = t[:, None, None, None] * latents + (1 - t)[:, None, None, None] * noise
        return (unet(state, 1000 * (1 - t), text).sample - (noise - latents)).square().mean()
    table = ddim.alphas_cumprod.double().sqrt() / (
        ddim.alphas_cumprod.double().sqrt() + (1 - ddim.alphas_cumprod.double()).sqrt()
    )
    timestep = np.interp(t.numpy(), table.numpy()[::-1], np.arange(1000)[::-1])
    if objective == "diffusion":
        steps = torch.from_numpy(timestep).round().long()
        sample = ddim.add_noise(latents, noise, steps)
        return (unet(sample, steps, text).sample - noise).square().mean()
    assert table[-1] < t.min() and t.max() < table[0]  # the paper's formulas hold inside the table
    t = t[:, None, None, None].double()
    alpha, sigma = t / (t**2 + (1 - t) ** 2).sqrt(), (1 - t) / (t**2 + (1 - t) ** 2).sqrt()
    sample = (alpha * latents + sigma * noise).float()
    output = unet(sample, torch.from_numpy(timestep).float(), text).sample
    velocity = (sample - (alpha + sigma) * output) / alpha
    return (velocity - (latents - noise)).square().mean()


@pytest.mark.parametrize("objective", ["diff2flow", "fm", "diffusion"])
def test_loss_of_a_step_is_the_closed_form(
    next_inputs: Any, make_batch: Any, make_trainer: Any, tiny_folder: Path, objective: str
) -> None:
    trainer = make_trainer(objective=objective, caption_dropout=0.0, seed=4)
    given = make_batch()
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    ddim = DDIMScheduler.from_pretrained(tiny_folder / "scheduler")
    with torch.no_grad():
        expected = closed_form(objective, unet, ddim, *tensors_of(next_inputs(trainer, given)))
    assert trainer.step(given).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_loss_on_a_flow_checkpoint_is_the_mean_square_of_its_error(
    next_inputs: Any, make_config: Any, flow_xl: Any, tmp_path: Path, adapter: str
) -> None:
    unet = copy.deepcopy(flow_xl.unet)
    options = {"adapter": adapter, "flow_shift": 2.5, "caption_dropout": 0.0, "seed": 4}
    trainer = AlignedTrainer.from_pretrained(flow_xl, make_config(tmp_path, **options))
    assert (trainer.config.objective, trainer.config.fm_form) == ("fm", "diffusers")
    with pytest.raises(ModelError, match="predicts the flow itself"):
        _ = trainer.alignment
    added = {"text_embeds": torch.randn(4, 12), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(4, -1)}
    given: Any = {
        "latents": torch.randn(4, 4, 8, 8),
        "encoder_hidden_states": torch.randn(4, 8, 32),
        "added_cond_kwargs": added,
    }
    latents, noise, t, text = tensors_of(next_inputs(trainer, given))
    s = (1 - t)[:, None, None, None]
    with torch.no_grad():
        output = unet((1 - s) * latents + s * noise, 1000 * (1 - t), text, added_cond_kwargs=added).sample
    expected = (output - (noise - latents)).square().mean()
    assert trainer.step(given).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("options", "weight"), [
    ({"loss_weighting": "native"}, lambda t: t**2),  # 1 / Q² of an ε-prediction
    ({"loss_weighting": "min_snr", "snr_gamma": 0.3}, lambda t: (0.3 * ((1 - t) / t) ** 2).clamp(max=1)),
], ids=["native", "min_snr"])  # fmt: skip
def test_loss_of_a_step_has_the_chosen_weighting(
    next_inputs: Any,
    make_batch: Any,
    make_trainer: Any,
    tiny_folder: Path,
    options: dict[str, Any],
    weight: Callable[[Tensor], Tensor],
) -> None:
    trainer = make_trainer(caption_dropout=0.0, seed=4, **options)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    ddim = DDIMScheduler.from_pretrained(tiny_folder / "scheduler")
    given = tensors_of(next_inputs(trainer, make_batch()))
    with torch.no_grad():
        each = [closed_form("diff2flow", unet, ddim, *(x[i : i + 1] for x in given)) for i in range(4)]
    weights = weight(given[2].double())
    assert 0.01 < weights.min() < 0.9
    expected = (weights * torch.stack(each)).mean()
    assert trainer.step(make_batch()).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4), (3, 2)])
def test_split_into_backward_passes_changes_nothing(
    make_batch: Any, gradients_of: Any, distance: Any, make_trainer: Any, size: int, accumulation: int
) -> None:
    whole = make_trainer(train_batch_size=4, max_grad_norm=1e9)
    parts = make_trainer(train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=1e9)
    given = make_batch(mask=torch.rand(4, 1, 8, 8))
    assert parts.step(given).item() == pytest.approx(whole.step(given).item(), rel=1e-6)
    assert distance(gradients_of(parts), gradients_of(whole)) <= 1e-5


@pytest.mark.parametrize("slices", [(2, 2), (3, 1), (4, 0)])
def test_gradients_of_slices_sum_to_those_of_the_global_batch(
    make_batch: Any, gradients_of: Any, distance: Any, make_trainer: Any, slices: tuple[int, ...]
) -> None:
    whole = make_trainer(max_grad_norm=1e9)
    loss = whole.step(make_batch()).item()
    total, summed, offset = 0.0, {name: torch.zeros_like(g) for name, g in gradients_of(whole).items()}, 0
    for size in slices:
        one = make_trainer(max_grad_norm=1e9)
        part = {name: tensor[offset : offset + size] for name, tensor in make_batch().items()}
        total += one.step({**part, "offset": offset, "global_batch_size": 4}).item() * size / 4
        summed = {name: summed[name] + g for name, g in gradients_of(one).items()}
        offset += size
    assert total == pytest.approx(loss, rel=1e-6)
    assert distance(summed, gradients_of(whole)) <= 1e-5


def test_every_weight_trains_in_full_finetuning(make_batch: Any, make_trainer: Any) -> None:
    trainer = make_trainer(adapter="full")
    before = {name: parameter.detach().clone() for name, parameter in trainer.unet.named_parameters()}
    first = trainer.step(make_batch()).item()
    assert before.keys() == trainer.trainable.keys()
    assert [name for name, old in before.items() if torch.equal(old, trainer.trainable[name])] == []
    trainer.global_step = 0  # the same random numbers again
    assert trainer.step(make_batch()).item() < first


def test_bfloat16_step_has_nearly_the_same_loss(make_batch: Any, make_trainer: Any) -> None:
    loss = make_trainer(mixed_precision="bf16").step(make_batch())
    assert loss.dtype == torch.float32
    exact = make_trainer(mixed_precision="no").step(make_batch()).item()
    assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.03)


# Steps that are not finite


@pytest.mark.parametrize("where", ["latents", "encoder_hidden_states", "loss alone"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_step_changes_nothing_and_is_counted(
    make_batch: Any, state_of: Any, assert_equal: Any, make_trainer: Any, where: str, value: float
) -> None:
    trainer = make_trainer(caption_dropout=0.0)
    trainer.step(make_batch())
    before = state_of(trainer)
    bad, compute = make_batch(), trainer._training_step.loss
    if where == "loss alone":  # its gradient is finite
        trainer._training_step.loss = lambda *arguments: (compute(*arguments)[0] + value, None)
    else:
        bad[where][1] = value
    loss = trainer.step(bad)
    trainer._training_step.loss = compute
    assert not loss.isfinite()
    assert_equal(state_of(trainer), before)
    assert (int(trainer._training_step.skipped), trainer.global_step) == (1, 2)
    assert trainer.step(make_batch()).isfinite()
    assert int(trainer._training_step.skipped_in_a_row) == 0
    after = state_of(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in before if name.startswith("trainable."))


def test_ten_non_finite_steps_in_a_row_stop_the_run_and_lose_nothing(
    images: Any, state_of: Any, assert_equal: Any, make_non_finite: Any, make_trainer: Any
) -> None:
    trainer = make_trainer(cache_latents=False, max_train_steps=20, checkpointing_steps=4)
    make_non_finite(trainer, 6, 20)
    sentence = (
        r"loss or gradient was not finite in 10 steps in a row, the last at step 15: lower learning_rate, or check the"
        r" data; the weights are those before these steps"
    )
    with pytest.raises(NonFiniteRunError, match=sentence):
        trainer.fit(images())
    reference = make_trainer("reference", cache_latents=False, max_train_steps=5)
    reference.fit(images())
    assert_equal(state_of(trainer), state_of(reference))
    folder = find_checkpoint(trainer.config.output_dir, "latest")
    assert folder is not None and verify_checkpoint(folder) == 4  # those of steps 8 and 12 would be no newer state
    lines = (folder.parent / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["loss"] is None for row in rows] == [False] * 5 + [True] * 9
    assert rows[-1]["skipped_steps"] == 9


def test_nine_non_finite_steps_in_a_row_do_not_stop_the_run(
    images: Any, make_non_finite: Any, make_trainer: Any
) -> None:
    trainer = make_trainer(cache_latents=False, max_train_steps=12)
    make_non_finite(trainer, 2, 10)
    assert trainer.fit(images())["skipped_steps"] == 9


# Refused inputs


def test_malformed_batch_is_refused(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer()
    with pytest.raises(RefusedInputError, match="encoder_hidden_states has 5 samples and latents 4"):
        trainer.step(make_batch(encoder_hidden_states=torch.zeros(5, 8, 16)))
    assert trainer.global_step == 0


def test_folder_of_a_run_in_progress_is_refused(images: Any, make_trainer: Any, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom d2f_fast.files.lock import locked_folder\n"
        "with locked_folder(sys.argv[1]):\n    print(flush=True)\n    input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline()
        with pytest.raises(RefusedInputError, match=rf"run is in use by process {owner.pid}: wait until it ends, or"):
            make_trainer().fit(images())
