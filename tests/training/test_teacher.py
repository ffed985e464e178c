"""A teacher's velocity as the target, against the same computation in float64 and diffusers' own samplers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.files.tensor_file import read_metadata
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.training.teacher import Teacher
from d2f_fast.training.teacher_options import TeacherOptions
from d2f_fast.training.trainer import AlignedTrainer

Batch = dict[str, Any]


@pytest.fixture
def taught(
    tiny_pipeline: Callable[[], StableDiffusionPipeline], make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> Callable[..., AlignedTrainer]:
    """Return a function that makes a trainer of the tiny model with a teacher, by default for `--objective fm`."""

    def make(output: str = "run", teacher: str = "base", pipeline: Any = None, **options: Any) -> AlignedTrainer:
        names = [name for name in options if name.startswith("teacher_")]
        teacher_options = TeacherOptions(teacher, **{name: options.pop(name) for name in names})
        stated = ModelOptions(prediction_type=options.pop("prediction_type", None))
        config = make_config(tmp_path / output, **{"objective": "fm", **options})
        used = tiny_pipeline() if pipeline is None else copy.deepcopy(pipeline)
        return AlignedTrainer.from_pretrained(used, config, stated, teacher_options)

    return make


def perturb(trainer: AlignedTrainer) -> None:
    """Move the trained weights away from where they start."""
    with torch.no_grad():
        for parameter in trainer.trainable.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))


def velocity(unet: Any, flow: Flow, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Return the velocity of a network in float64."""
    sample = flow.to_sample(x_t, t)
    with torch.no_grad():
        output = copy.deepcopy(unet).double()(sample, flow.timestep(t), text.double()).sample
    return flow.velocity(output, sample, t)


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
@pytest.mark.parametrize("options", [{}, {"adapter": "full"}, {"fm_form": "published"}], ids=str)
def test_loss_is_the_squared_distance_of_the_velocities_in_float64(
    taught: Any, tiny_pipeline: Any, make_batch: Any, next_inputs: Any, options: dict[str, Any], guidance_scale: Any
) -> None:
    trainer = taught(teacher_guidance_scale=guidance_scale, **options)
    assert trainer.config.caption_dropout == (0.1 if guidance_scale is None else 0.0)
    perturb(trainer)
    batch = make_batch(4)
    given = next_inputs(trainer, batch)
    t, text = given.t.double(), given.condition["encoder_hidden_states"]
    x_t = trainer.alignment.interpolate(given.latents.double(), given.noise.double(), t)
    base = tiny_pipeline().unet
    target = velocity(base, trainer.alignment, x_t, t, text)
    if guidance_scale is not None:
        empty = trainer.model.empty_condition(4)["encoder_hidden_states"]
        target = torch.lerp(velocity(base, trainer.alignment, x_t, t, empty), target, guidance_scale)
    student = velocity(trainer.unet, NaiveFlow(1000, options.get("fm_form", "diffusers")), x_t, t, text)
    expected = (student - target).square().mean()
    assert trainer.step(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 0.01


@pytest.fixture
def flow_folder(taught: Any, tmp_path: Path) -> Path:
    """Return the saved pipeline of a network that predicts the flow, with other weights than the tiny model."""
    trainer = taught("flow")
    perturb(trainer)
    trainer.ema = None
    saved: Path = trainer.save_pipeline(tmp_path / "flow-checkpoint")
    return saved


def test_diffusion_model_learns_from_a_flow_checkpoint(
    taught: Any, flow_folder: Path, make_batch: Any, next_inputs: Any, tmp_path: Path
) -> None:
    loaded = StableDiffusionPipeline.from_pretrained(flow_folder)
    assert type(loaded.scheduler) is DPMSolverMultistepScheduler
    options = {"objective": "diffusion", "prediction_type": "v_prediction"}
    trainer = taught(teacher=str(flow_folder), pipeline=loaded, **options)
    assert str(trainer.teacher).startswith("target: velocity of the teacher flow-checkpoint (flow_prediction, no guid")
    assert trainer.model.flow.prediction_type == "v_prediction"
    given = next_inputs(trainer, make_batch(4))
    t, text = given.t.double(), given.condition["encoder_hidden_states"]
    x_t = trainer.alignment.interpolate(given.latents.double(), given.noise.double(), t)
    target = velocity(loaded.unet, NaiveFlow(), x_t, t, text)
    student = velocity(trainer.unet, trainer.alignment, x_t, t, text)
    part = t[:, None, None, None]
    scale = 1 / (part**2 + (1 - part) ** 2)  # 1 / Q², by which the loss of v differs from that of the velocity
    expected = ((student - target).square() / scale).mean()
    assert trainer.step(make_batch(4)).item() == pytest.approx(expected.item(), rel=1e-5)
    scheduler = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "v")).scheduler
    assert type(scheduler) is EulerDiscreteScheduler and scheduler.config.prediction_type == "v_prediction"
    assert (scheduler.config.beta_start, scheduler.config.beta_schedule) == (0.00085, "scaled_linear")
    # The base model's own weights, read as a flow, are the same teacher.
    shared = taught("shared", pipeline=loaded, teacher_prediction_type="flow_prediction", **options)
    assert shared.teacher.unet is None
    assert shared.step(make_batch(4)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_adapter_is_switched_off_for_the_teacher_alone(taught: Any, make_batch: Any) -> None:
    trainer = taught()
    assert trainer.teacher.unet is None
    assert str(trainer.teacher) == (
        "target: velocity of the teacher base (epsilon, no guidance); the base's weights serve both"
    )
    losses = [trainer.step(make_batch(4)).item() for _ in range(3)]
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in trainer.trainable.values())
    with pytest.MonkeyPatch.context() as patch:  # After an error the adapter is on again.
        patch.setattr(trainer._training_step._teacher, "_velocity", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.step(make_batch(4))
    copied = taught("copied")
    teacher = copied._training_step._teacher
    teacher._unet, teacher._layers = copy.deepcopy(copied.model.unet), []
    assert [copied.step(make_batch(4)).item() for _ in range(3)] == losses


def test_teacher_of_sdxl_is_guided_with_zeros_for_the_empty_prompt(taught: Any, tiny_xl: Any) -> None:
    trainer = taught(pipeline=tiny_xl, teacher_guidance_scale=3.0)
    text, pooled, ids = torch.randn(3, 8, 32), torch.randn(3, 12), torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3)
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    condition = {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids}
    latents, noise = trainer._training_step._teacher.line(x_t, x_t, t, condition)

    def plain(text: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}
        flow = trainer.alignment
        sample = flow.to_sample(x_t, t)
        output = tiny_xl.unet(sample, flow.timestep(t), text, added_cond_kwargs=added).sample
        return flow.velocity(output, sample, t)

    with torch.no_grad():
        expected = torch.lerp(plain(text * 0, pooled * 0), plain(text, pooled), 3.0)
    torch.testing.assert_close(latents - noise, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trainer.alignment.interpolate(latents, noise, t), x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["full", "regional"])
def test_compiled_teacher_equals_the_eager_one(
    taught: Any, tiny_pipeline: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, fullgraph, options: compile(part, fullgraph=fullgraph, backend="eager")
    )
    pipeline = tiny_pipeline()
    pipeline.unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    trainer = taught(pipeline=pipeline, teacher_guidance_scale=2.0)
    eager = trainer._training_step._teacher
    compiled = Teacher(trainer.teacher, trainer.model, "no", compile=part)
    for number in range(4):
        size = (4, 3)[number % 2]
        given = torch.randn(size, 4, 8, 8), torch.randn(size, 4, 8, 8), torch.rand(size)
        text = {"encoder_hidden_states": torch.randn(size, 8, 16)}
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            for got, wanted in zip(compiled.line(*given, text), eager.line(*given, text), strict=True):
                torch.testing.assert_close(got, wanted)
    # Its context lies inside that of the network, whose blocks it shares.
    losses = [taught(each, pipeline=pipeline, teacher_guidance_scale=2.0, compile=each) for each in ("off", part)]
    plain, own = (trainer.step(make_batch(4)).item() for trainer in losses)
    assert own == pytest.approx(plain, rel=1e-5)


def test_half_precision_teacher_is_that_of_autocast(taught: Any, make_batch: Any) -> None:
    losses = [
        taught(name, mixed_precision="bf16", **options).step(make_batch(4)).item()
        for name, options in (("lora", {}), ("full", {"adapter": "full"}))
    ]
    assert losses[0] == losses[1]  # Before the first update the student is the base in both.
    exact = taught("exact").step(make_batch(4)).item()
    assert losses[0] != exact and losses[0] == pytest.approx(exact, rel=0.02)


def test_resumed_run_is_equal_bit_for_bit_and_needs_the_same_teacher(
    taught: Any, images: Any, state_of: Any, assert_equal: Any
) -> None:
    options = {"teacher_guidance_scale": 2.0, "train_batch_size": 4}
    whole = taught("whole", **options)
    whole.fit(images())
    taught("divided", max_train_steps=4, **options).fit(images())
    resumed = taught("divided", resume_from_checkpoint="latest", **options)
    resumed.fit(images())
    assert_equal(state_of(resumed), state_of(whole))
    other = taught("divided", resume_from_checkpoint="latest", train_batch_size=4, teacher_guidance_scale=3.0)
    with pytest.raises(RefusedInputError, match=r"state\.json: .* was .* and is now"):
        other.fit(images())


def test_flow_checkpoint_made_of_pairs_is_sampled_by_stock_flow_matching(
    taught: Any, write_pairs: Any, tmp_path: Path
) -> None:
    trainer = taught(max_train_steps=2, checkpointing_steps=0, teacher_guidance_scale=3.0)
    trainer.fit(PairDataset([write_pairs(tmp_path / "0.tar", 6)]))
    header = read_metadata(trainer.save_lora(tmp_path / "lora"))
    expected = {"prediction_type": "flow_prediction", "fm_form": "diffusers", "data": "pairs", "teacher": "base"}
    expected |= {"teacher_guidance": "3", "recommended_guidance": "1.0", "recommended_steps": "4"}
    assert {name: header[f"d2f.{name}"] for name in expected} == expected
    assert (
        "d2f.pairs_guidance" not in header and "guidance 1, sampler Euler with flow" in header["modelspec.usage_hint"]
    )
    stock = StableDiffusionPipeline.from_pretrained(trainer.save_pipeline(tmp_path / "pipeline"))
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = FlowMatchEulerDiscreteScheduler()
    stock.scheduler.init_noise_sigma = 1.0
    stock.scheduler.scale_model_input = lambda sample, timestep: sample
    noise = torch.randn(2, 4, 8, 8)
    options = {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "latent"}
    got = stock(["ab", "c"], latents=noise.clone(), sigmas=[1.0, 0.75, 0.5, 0.25], **options).images
    with trainer.averaged(), torch.no_grad():
        flow = prompt_velocity(trainer.model, NaiveFlow(), ["ab", "c"], 16, 16)
        wanted = sample_flow(flow, noise, 4)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_lora_is_merged_into_the_teacher_and_says_what_it_predicts(
    taught: Any, make_batch: Any, tmp_path: Path
) -> None:
    source = taught("source")
    perturb(source)
    source.ema = None
    file = source.save_lora(tmp_path / "lora")
    trainer = taught(objective="diffusion", teacher_lora=(f"{file}:0.5",))
    assert isinstance(trainer.teacher.flow, NaiveFlow)
    assert trainer.teacher.name == "base with pytorch_lora_weights.safetensors"
    base, own = trainer.model.unet.state_dict(), trainer.teacher.unet.state_dict()
    changed = [name for name in own if not torch.equal(own[name], base.get(name, base.get(_adapted(name))))]
    assert changed and all(name.endswith(("to_q.weight", "to_out.0.weight", "ff.net.2.weight")) for name in changed)
    assert trainer.step(make_batch(4)).isfinite()
    strengths = {taught(f"{s}", teacher_lora=(f"{file}:{s}",)).teacher.identity for s in (0.5, 1)}
    assert len(strengths) == 2


def _adapted(name: str) -> str:
    """Return the key of a weight that a LoRA adapts."""
    return ".base_layer.".join(name.rsplit(".", 1))


def test_teacher_that_cannot_teach_is_refused(taught: Any, tiny_xl: Any, flow_folder: Path, tmp_path: Path) -> None:
    for objective in ("diff2flow", "diffusion"):
        with pytest.raises(RefusedInputError, match=r"teacher base has nothing to teach .*: give --objective fm"):
            taught(objective=objective)
    taught("guided", objective="diff2flow", teacher_guidance_scale=2.0)
    tiny_xl.save_pretrained(tmp_path / "xl")
    with pytest.raises(ModelError, match=r"teacher xl is a UNet other than SD1.* \(text width 32\), and the"):
        taught(teacher=str(tmp_path / "xl"))
    other = StableDiffusionPipeline.from_pretrained(flow_folder)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight.normal_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"teacher other has other text encoders .*: start from the teacher"):
        taught(teacher=str(tmp_path / "other"), objective="diffusion")
    (tmp_path / "other/d2f.json").write_text('{"d2f.task": "image_to_image"}')
    with pytest.raises(ModelError, match=r"teacher .*other was trained with --task image_to_image, and a run with a"):
        taught(teacher=str(tmp_path / "other"), objective="diffusion")
    config = TrainingConfig(output_dir=str(tmp_path / "run"), objective="fm", resolution=16)
    with pytest.raises(ModelError, match=r"other was trained with --task image_to_image, and a run with a teacher"):
        AlignedTrainer.from_pretrained(tmp_path / "other", config, teacher_options=TeacherOptions("base"))


def test_base_reading_states_another_prediction_type(taught: Any) -> None:
    trainer = taught(teacher_prediction_type="v_prediction")
    assert trainer.teacher.flow.prediction_type == "v_prediction"
    assert BaseModel(trainer.model.pipeline).flow.prediction_type == "epsilon"
