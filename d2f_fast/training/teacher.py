"""Learn a teacher's velocity in place of the straight line between noise and latents.

    x_t = t latents + (1 - t) noise,   v = velocity of the teacher at x_t and t
    latents' = x_t + (1 - t) v,        noise' = x_t - t v

The line from noise' to latents' passes through x_t at the time t, and its velocity is v. So every objective, with every
weighting and mask, learns the teacher's velocity where it is given this line in place of the data's.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from d2f_fast.config import CompiledPart, TrainingConfig
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import over_latents
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.lora.match import match_layers
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import LoraFile, read_lora
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import common_tags
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import ModelConfigs
from d2f_fast.models.facts import same_schedule
from d2f_fast.models.load import local_source
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.integrate import unet_velocity
from d2f_fast.training.compiled import compile_part
from d2f_fast.training.objective import Objective
from d2f_fast.training.teacher_options import (
    BASE,
    TeacherOptions,
    check_fits_base,
    check_no_distillation,
    check_teacher_lora,
    check_teacher_task,
    check_text_of_start,
)

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_PROBE = "red fox"
# Text encoders whose weights were rounded to half precision differ by a thousandth.
_SAME_TEXT = 0.01


@dataclass(frozen=True)
class TeacherModel:
    """A teacher as it is loaded, before the base model is adapted.

    Attributes:
        name: Name of the teacher, without the path of a file or folder.
        identity: Short text that differs for other weights, another reading or another guidance.
        flow: Map between flow time and its own time and output.
        unet: Its network; None where it is that of the base model, with the adapter switched off.
        guidance_scale: Scale of its guidance; 1 for none.
    """

    name: str
    identity: str
    flow: Flow
    unet: "UNet2DConditionModel | None"
    guidance_scale: float

    def tags(self) -> dict[str, str]:
        """Return the entries of a file's header that name the teacher, and the guidance that is then built in."""
        tags = {"d2f.teacher": self.name, "d2f.teacher_guidance": f"{self.guidance_scale:g}"}
        return tags | ({"d2f.recommended_guidance": "1.0"} if self.guidance_scale > 1 else {})

    def __str__(self) -> str:
        """Return the line that a run prints."""
        memory = "the base's weights serve both" if self.unet is None else "a frozen network beside the trained one"
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else "no guidance"
        return f"target: velocity of the teacher {self.name} ({self.flow.prediction_type}, {guidance}); {memory}"


class Teacher:
    """Replace the line of each sample by the teacher's.

    Args:
        teacher: The teacher as it was loaded.
        model: Base model on its device, with the adapter in its UNet.
        precision: "bf16" for a step under bfloat16 autocast, "no" for none.
        compile: Part of the teacher's network that is compiled.
    """

    def __init__(
        self, teacher: TeacherModel, model: BaseModel, precision: str, *, compile: CompiledPart = "off"
    ) -> None:
        shared = teacher.unet is None
        self._unet = model.unet if teacher.unet is None else _frozen(teacher.unet, model.device, precision)
        self._layers = [m for m in self._unet.modules() if isinstance(m, LoraLayer)] if shared else []
        self._flow = teacher.flow.to(model.device)
        self._guidance_scale = teacher.guidance_scale
        self._empty = model.empty_condition() if teacher.guidance_scale > 1 else {}
        self._velocity, self._compiled = compile_part(compile, self._velocity_at, self._unet, model.device)

    @torch.no_grad()
    def line(self, latents: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return latents and noise between which the straight line is the teacher's.

        Args:
            latents, noise: [b, C, h, w] float32.
            t: Flow times, [b] float32.
            condition: Inputs of the network; see `StepInputs`.
        """
        x_t = self._flow.interpolate(latents, noise, t)
        with _switched_off(self._layers), self._compiled:
            velocity = self._velocity(x_t, t, dict(condition))
        part = over_latents(t, x_t)
        return x_t + (1 - part) * velocity, x_t - part * velocity

    def _velocity_at(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Return the teacher's velocity at flow states and times."""
        added = {name: value for name, value in condition.items() if name != "encoder_hidden_states"}
        hidden, negative = condition["encoder_hidden_states"], None
        if self._guidance_scale > 1:
            empty = {name: value.to(hidden).expand(len(x_t), *value.shape[1:]) for name, value in self._empty.items()}
            negative = empty["encoder_hidden_states"]
            # The sizes, which no prompt has, are those of the images for both.
            added = {name: torch.cat([empty.get(name, value), value]) for name, value in added.items()}
        return unet_velocity(self._unet, self._flow, hidden, negative, self._guidance_scale, added)(x_t, t)


def load_teacher(options: TeacherOptions, model: BaseModel, config: TrainingConfig) -> TeacherModel | None:
    """Load the teacher of a run, or take it from the base model.

    Args:
        options: Options of the teacher.
        model: Base model, before it is rounded, moved or adapted. It is not changed.
        config: Options of the run.

    Returns:
        The teacher; None where the options name none.

    Raises:
        ModelError: The teacher or a LoRA cannot be loaded, or does not fit the base model.
        CheckpointError: A LoRA is missing, damaged, or a pickle.
    """
    if options.teacher is None:
        return None
    if model.unet.config.in_channels != model.unet.config.out_channels:
        raise ModelError("a teacher does not go with a network that also sees an image: leave teacher out")
    teacher = "" if options.teacher == BASE else local_source(options.teacher)
    check_teacher_task(teacher, options.teacher_lora or ())
    loras = [(read_lora(path), scale) for path, scale in map(parse_lora, options.teacher_lora or ())]
    unet: UNet2DConditionModel | None
    if options.teacher == BASE:
        source, unet = model, None
        # With dropout it would be random in training mode.
        random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.unet.modules())
        if loras or config.adapter == "full" or random:
            unet = copy.deepcopy(model.unet).float()
    else:
        source = _loaded(options, model)
        unet = source.unet
    # A LoRA may not show in the few elements of each weight that are hashed.
    parts = [source.fingerprint("unet", most=4096)[:16], *(_merge(lora, scale, source, unet) for lora, scale in loras)]
    flow = _flow_of(options, source)
    parts += [flow.prediction_type, f"{options.guidance_scale:g}"]
    name = printable(Path(options.teacher).name)
    if loras:
        name += " with " + " and ".join(printable(lora.path.name) for lora, _ in loras)
    return TeacherModel(name, " ".join(parts), flow, unet, options.guidance_scale)


def start_teacher(
    teacher: TeacherModel | None,
    objective: Objective,
    model: BaseModel,
    precision: str,
    *,
    compile: CompiledPart = "off",
) -> Teacher | None:
    """Return the teacher of a training step, or None where the run has none.

    Args:
        teacher: The teacher as it was loaded.
        objective: Objective of the run.
        model: Base model on its device, with the adapter in its UNet.
        precision: "bf16" for a step under bfloat16 autocast, "no" for none.
        compile: Part of the teacher's network that is compiled.

    Raises:
        RefusedInputError: The teacher is the network itself, read in the same way and without guidance, `init_lora`
            adapts text encoders, or the run distills.
    """
    if teacher is None:
        return None
    check_no_distillation(distills=objective.distill)
    if teacher.name == BASE and teacher.guidance_scale <= 1 and _reading(teacher.flow) == _reading(objective.flow):
        raise RefusedInputError(
            f"teacher base has nothing to teach with the objective {objective.name}, which reads the network in the"
            " same way: give --objective fm, a teacher_guidance_scale above 1, a teacher_lora or another teacher"
        )
    check_text_of_start(adapts_text=model.starting_lora is not None and bool(model.starting_lora.text_layers))
    return Teacher(teacher, model, precision, compile=compile)


def _reading(flow: Flow) -> tuple[object, ...]:
    """Return what makes two flows read one network alike."""
    form = flow.form if isinstance(flow, NaiveFlow) else None
    return type(flow), flow.prediction_type, form, flow.t_min


def _loaded(options: TeacherOptions, model: BaseModel) -> BaseModel:
    """Load a teacher that is not the base model, and refuse one that does not fit."""
    name = str(options.teacher)
    own = ModelOptions(prediction_type=options.teacher_prediction_type)
    try:
        teacher = BaseModel.load(name, options=own)
    except ModelError as error:
        raise ModelError(f"teacher: {error}") from error
    its, ours = (ModelConfigs(each.unet.config, each.vae.config) for each in (teacher, model))
    check_fits_base(name, its, ours, model.options)
    texts = [each.encode_prompts([_PROBE])["encoder_hidden_states"].float().cpu() for each in (teacher, model)]
    if texts[0].shape != texts[1].shape or (texts[0] - texts[1]).norm() > _SAME_TEXT * texts[1].norm():
        raise ModelError(
            f"teacher {printable(Path(name).name)} has other text encoders than the base model, and both networks are"
            " given the same text: start from the teacher (--pretrained_model_name_or_path), with --teacher base"
        )
    return teacher


def _flow_of(options: TeacherOptions, source: BaseModel) -> Flow:
    """Return the flow by which the teacher's network is read."""
    paths = [parse_lora(entry).path for entry in options.teacher_lora or ()]
    tags = common_tags(paths, shift=1.0) if paths else {}  # Its shift is not used.
    wanted, steps = options.teacher_prediction_type, source.flow.num_train_timesteps
    if wanted in (None, "flow_prediction") and tags.get("d2f.prediction_type") == "flow_prediction":
        return NaiveFlow(steps, "published" if tags.get("d2f.fm_form") == "published" else "diffusers")
    if wanted is None or wanted == source.flow.prediction_type:
        return source.flow
    if wanted == "flow_prediction":
        return NaiveFlow(steps)
    scheduler = source.pipeline.scheduler
    return Alignment.from_scheduler(same_schedule(scheduler, type(scheduler), prediction_type=wanted))


def _merge(lora: LoraFile, scale: float, source: BaseModel, unet: "UNet2DConditionModel | None") -> str:
    """Merge a LoRA of the UNet alone into the teacher's network, and return a short text that identifies it."""
    assert unet is not None
    pipeline = source.pipeline
    if source.unet is not unet:
        pipeline = type(pipeline)(**{**pipeline.components, "unet": unet})
    match_layers(lora, pipeline)
    check_teacher_lora(lora.about)
    return f"{fuse_adapter(pipeline, lora, scale)['sha256'][:16]}:{scale:g}"


def _frozen(unet: "UNet2DConditionModel", device: torch.device, precision: str) -> "UNet2DConditionModel":
    """Return a network that is never trained, on its device, in the types that autocast gives its products."""
    unet = unet.requires_grad_(False).eval()
    if precision == "bf16":  # Before the move, so that the device never holds the float32 weights.
        for module in unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
    unet = unet.to(device)
    return unet.to(memory_format=torch.channels_last) if device.type == "cuda" else unet


@contextmanager
def _switched_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Return a context in which LoRA layers compute what they adapt alone.

    peft's own switch also freezes their parameters.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
