"""Options of a training run, their checks, and the words that they take.

This module imports no torch, so that `d2f --help` answers at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.image_sizes import LARGEST_SIDE, Resolution, check_resolution, simplest
from d2f_fast.option_pairs import check_pairs

ObjectiveName = Literal["diff2flow", "fm", "diffusion"]
LossWeighting = Literal["flow", "native", "min_snr"]
FlowForm = Literal["diffusers", "published"]
TimestepSampling = Literal["uniform", "logit_normal", "mode", "u_shaped"]
LearningRateSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
Method = Literal["euler", "midpoint", "heun"]
FixedStepMethod = Literal["euler", "midpoint", "heun", "rk4"]
StochasticMethod = Literal["euler_maruyama", "stochastic_heun"]
SamplingMethod = Literal["euler", "midpoint", "heun", "rk4", "dopri5", "euler_maruyama", "stochastic_heun"]
Spacing = Literal["uniform", "trailing"]
# The trackers that accelerate can log to, by its names.
Tracker = Literal[
    "none", "tensorboard", "wandb", "comet_ml", "aim", "clearml", "dvclive", "mlflow", "swanlab", "trackio"
]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
LoraFormat = Literal["diffusers", "kohya", "both"]
CompiledPart = Literal["off", "full", "regional"]
OptionGroup = Literal[
    "essential",
    "data",
    "model",
    "LoRA",
    "ONNX",
    "depth",
    "image to image",
    "method",
    "teacher",
    "image",
    "sampling",
    "straightness",
    "optimisation",
    "memory and speed",
    "checkpoints and logs",
    "other",
]
DEFAULT_SNR_GAMMA = 5.0
# Larger values are typing errors, and would fill the memory or give numbers that are not finite.
MAX_STEPS, MAX_RANK, MAX_BATCH, MAX_SIDE, MAX_GUIDANCE, MAX_SHIFT = 10**9, 4096, 1 << 16, LARGEST_SIDE, 1000.0, 1000.0
DEFAULT_RANK = 64
DEFAULT_CAPTION_DROPOUT = 0.1
DEFAULT_GUIDANCE = 3.0
DEFAULT_STEPS, MAX_SAMPLING_STEPS = 4, 10_000
DEFAULT_LORA_FORMAT: LoraFormat = "both"

T = TypeVar("T")


def check_number(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse a value outside a range; None is accepted.

    Raises:
        RefusedInputError: The value is smaller than `least`, larger than `most`, or not a number.
    """
    if value is not None and not value >= least:
        raise RefusedInputError(f"{name} must be at least {least}, got {value}")
    if value is not None and value > most:
        raise RefusedInputError(f"{name} must be at most {most:,}, got {value}")


def check_positive(name: str, value: float | None, most: float = math.inf) -> None:
    """Refuse a value that is not a positive and finite number; None is accepted.

    Raises:
        RefusedInputError: The value is zero, negative, infinite, not a number, or larger than `most`.
    """
    if value is not None and not 0 < value < math.inf:
        raise RefusedInputError(f"{name} must be positive and finite, got {value}")
    check_number(name, value, 0, most)


def check_finite(name: str, value: float | None, most: float = math.inf) -> None:
    """Refuse a value that is infinite or not a number; None is accepted.

    Raises:
        RefusedInputError: The value is infinite, not a number, or larger than `most` in its amount.
    """
    if value is not None and not math.isfinite(value):
        raise RefusedInputError(f"{name} must be finite, got {value}")
    check_number(name, value, -most, most)


def check_text(name: str, value: object) -> None:
    """Refuse text that cannot be written to a file as UTF-8, or that no path can hold; other values are accepted.

    Raises:
        RefusedInputError: The text, or one of several, is not UTF-8 or has a zero byte; or the output is empty.
    """
    if value == "" and name in ("output", "output_dir"):
        raise RefusedInputError(f"{name} is empty: give a file or a folder")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and ("\0" in text or text != text.encode(errors="ignore").decode()):
            raise RefusedInputError(f"{name} must be UTF-8 text without zero bytes, got {printable(text)}: write it so")


def check_guidance(name: str, value: float | None) -> None:
    """Refuse a guidance scale that means something else in other programs than in diffusers; None is accepted.

    Raises:
        RefusedInputError: The value is below 0, between 0 and 1, infinite or not a number.
    """
    check_finite(name, value, MAX_GUIDANCE)
    if value is not None and value < 1 and value != 0:
        raise RefusedInputError(
            f"{name} must be 1 or 0, which use the prompt alone in half of the evaluations, or above 1, got {value}"
        )


def check_fraction(name: str, value: float | None) -> None:
    """Refuse a value outside [0, 1); None is accepted.

    Raises:
        RefusedInputError: The value is negative, 1 or larger, or not a number.
    """
    if value is not None and not 0 <= value < 1:
        raise RefusedInputError(f"{name} must be in [0, 1), got {value}")


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that torch's random generators do not accept.

    Raises:
        RefusedInputError: The seed is negative, or has more than 63 bits.
    """
    if not 0 <= value < 2**63:
        raise RefusedInputError(f"{name} must be in [0, 2**63), got {value}")


def at_least(least: float, most: float = math.inf) -> Callable[[str, float | None], None]:
    """Return the check that refuses numbers smaller than `least` or larger than `most`."""
    return partial(check_number, least=least, most=most)


def positive(most: float) -> Callable[[str, float | None], None]:
    """Return the check that refuses numbers that are not positive or larger than `most`."""
    return partial(check_positive, most=most)


def finite(most: float) -> Callable[[str, float | None], None]:
    """Return the check that refuses numbers whose amount is larger than `most`."""
    return partial(check_finite, most=most)


def option(
    group: OptionGroup | None, default: T, check: Callable[[str, Any], None] | None = None, metavar: str | None = None
) -> T:
    """Declare an option of a dataclass, together with what the command line's help says of it.

    Args:
        group: title of the options in the help that it is listed with; None for none.
        default: default value of the option.
        check: function of the option's name and value, which raises RefusedInputError for a value that cannot be used;
            None accepts every value. The help names the limits of the checks of this module.
        metavar: word that stands for the value in the help; None takes one of the type.

    Returns:
        The dataclass field. Its declared type is that of the default, which is how `dataclasses.field` is typed, too.
    """
    return field(default=default, metadata={"group": group, "check": check, "metavar": metavar})


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words of a `Literal` type, alone or in a union with None; () for any other type."""
    return next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())


def choice_of(words: Sequence[str]) -> str:
    """Return the words of a choice as a sentence has them."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def check_options(options: Any) -> None:
    """Refuse a dataclass of options that holds a value which its option does not take.

    Args:
        options: instance of a dataclass. A `Literal` field takes its words, and one with a check what that accepts.

    Raises:
        RefusedInputError: A value cannot be used; the message names the option and what it takes.
    """
    hints = get_type_hints(type(options))
    for declared in fields(options):
        value, words = getattr(options, declared.name), words_of(hints[declared.name])
        check_text(declared.name, value)
        if words and value not in words and not (value is None and type(None) in get_args(hints[declared.name])):
            raise RefusedInputError(f"{declared.name} must be {choice_of(words)}, got {value}")
        if check := declared.metadata.get("check"):
            check(declared.name, value)


@dataclass(frozen=True)
class TrainingConfig:
    """Hold the options of a training run. An option of the diffusers training scripts has the same name here.

    Args:
        output_dir: Folder for checkpoints, logs and the result; it is created if needed. Give each run a new one. A
            folder with checkpoints is accepted only with --resume_from_checkpoint; one that holds a finished result
            without checkpoints, or into which another run is writing, is an error.
        adapter: Which weights are trained. "lora" trains small added layers and leaves the model unchanged. "full"
            trains the whole UNet and saves a pipeline, which takes far more memory (README.md has a table). Text
            encoders are never trained.
        rank: Rank of the LoRA in attention and feed-forward layers. A larger rank can learn more, and makes a larger
            file. Not with --adapter full. Default: that of --init_lora, or 64.
        resolution: Size of the training images in pixels, multiples of 8: one number for squares, or height and width.
            Each image is scaled, up or down, until it covers the size, and cropped to it. Several folders may have
            sizes of their own: give the height and width of each, one after the other; a step then takes images of one
            folder alone. The first size is that of validation and, as saved with the result, of `d2f sample`. Default:
            the model's own size, such as 512 for SD1.5 and 1024 for SDXL, that of its training with this package, or
            that of --pairs.
        max_train_steps: Number of optimizer steps of the whole run, including those before a resumed checkpoint. The
            run says how many epochs they are.
        train_batch_size: Number of images in each forward and backward pass of each process. There is one process for
            each GPU.
        gradient_accumulation_steps: Number of passes whose gradients are averaged into one optimizer step. 1 turns this
            off.
        learning_rate: Learning rate of the AdamW optimizer, after warm-up. For --adapter full, docs/recipes/full.yaml
            takes 3e-5.
        mixed_precision: Precision of the computation. "bf16" (bfloat16) takes less memory and is faster on recent GPUs;
            "no" is float32. fp16 is not offered. Default: what `accelerate launch` was set to, or "no".
        gradient_checkpointing: Save memory by computing activations again in the backward pass, which takes more time.
        init_lora: LoRA to train further, as PATH or PATH:SCALE, in any format of `d2f sample --lora` except DoRA. Its
            layers and ranks are kept: other options may repeat but not contradict them. What it holds of the text
            encoders acts during the run, stays as it is, and is saved again with the result. Default: a new LoRA.
        lora_alpha: Strength of the LoRA, whose output is multiplied by lora_alpha / rank. Default: the rank, which is a
            factor of 1.
        conv_rank: Rank of further LoRA layers in the UNet's convolutions, except its first and last one. 0 adds none.
            Default: that of --init_lora, or 0.
        first_last_layers: Also train the UNet's first and last convolution, as the Diff2Flow paper does, with LoRA
            layers of the largest useful rank. --no_first_last_layers leaves them out. Default: as in --init_lora; for a
            new LoRA off, and on with --task depth.
        target_modules: Layers that get a LoRA, by the ends of their names, such as to_q to_k. --conv_rank and
            --first_last_layers add theirs. Default: all attention and feed-forward layers.
        lora_format: LoRA files to write at the end: "diffusers" (pytorch_lora_weights.safetensors), "kohya" (for
            ComfyUI, A1111, Forge and kohya's scripts, named after --output_dir, as run_kohya.safetensors), or "both".
            Default: "both"; "diffusers" with another --task, the only one for image_to_image and depth with --distill.
        center_crop: Crop the middle of each image. --no_center_crop crops at a random position, and needs
            --no_cache_latents.
        random_flip: Mirror each image left to right half of the time.
        cache_dir: Folder that keeps encoded images and captions; several runs may share it. A changed image is encoded
            again. Default: the folder cache in --output_dir.
        cache_latents: Keep encoded images on disk and reuse them in each epoch. --no_cache_latents encodes every image
            again each time. Captions are kept in any case.
        caption_dropout: Fraction of captions that are replaced by the empty one, which classifier-free guidance needs.
            0 replaces none. Not with --task depth. Default: 0.1; 0 with --pairs or a --teacher_guidance_scale above 1,
            whose guidance is built in.
        objective: Loss of the training. "diff2flow" is flow matching: formulas convert what the model predicts, so that
            it stays a noise or v prediction model that other programs sample. "fm" is flow matching without the
            formulas: the network changes until it predicts the velocity itself. "diffusion" is the model's ordinary
            loss, for comparison. Default: "fm" for a model with flow_prediction, which takes no other; "diff2flow" for
            all others.
        fm_form: Convention of the objective "fm", and an error with the others. "diffusers" feeds the network 1000 (1 -
            t) and teaches it the noise minus the latents, as diffusers' flow models do. "published" feeds it t and
            teaches it the latents minus the noise, as the code of the Diff2Flow paper does; only this package samples
            such a model. Default: that of a model with flow_prediction, else "diffusers".
        loss_weighting: Weight of the squared error of the velocity at each time. "flow" weights all times equally,
            "native" as the model's own loss does, and "min_snr" weights nearly clean images less. "fm" takes only
            "flow"; "diffusion" takes "native" and "min_snr", which is then the weight of diffusers' scripts. Default:
            "min_snr" with --snr_gamma, else "native" for "diffusion" and "flow" for the others.
        snr_gamma: Gamma of the Min-SNR weighting, which this option turns on. Times with a signal-to-noise ratio above
            gamma get less weight. Not with --objective fm. Default: no such weighting; 5 with --loss_weighting min_snr.
        timestep_sampling: How often each time is trained. "uniform" trains all equally, "logit_normal" mostly the
            middle, "mode" the middle more but also the ends (as in the SD3 paper, with its scale of 1.29), and
            "u_shaped" mostly both ends. Not with --objective diffusion, which samples whole timesteps evenly.
        logit_mean: Centre of "logit_normal", and an error with other distributions: the mean of log((1 - t) / t). Above
            0, noisy images are trained more. Default: 0.
        logit_std: Width of "logit_normal", and an error with other distributions: the standard deviation of log((1 - t)
            / t). Larger values train very clean and very noisy images more. Default: 1.
        flow_shift: Factor on the ratio of noise to image, (1 - t) / t, of the training times that --timestep_sampling
            gives (the shift of the SD3 paper). Above 1, noisy images are trained more; 1 changes nothing. Not with
            --objective diffusion.
        sampling_shift: The same factor for sampling, which does not change the training. It is saved with the result,
            and `d2f sample` uses it. Default: that of --flow_shift.
        distill: Train only the jump to the image in one step. On --pairs it starts from their noise, as the last stage
            after reflow (give its result, with --init_lora for a LoRA); with --task depth it starts from zeros. Not
            with --objective diffusion, --teacher, or options that choose or weight times.
        lpips_weight: Factor of LPIPS, the distance of decoded images in the features of a network, which is added to
            the loss of --distill on pairs (docs/reflow.md). It needs the package lpips and more memory. 0 turns it off.
        lpips_net: Network of LPIPS: "vgg", which its authors advise for training, or the smaller "alex" or "squeeze".
        lr_scheduler: Learning rate over the run, as diffusers' schedule of that name. "constant" keeps it, and
            "constant_with_warmup" keeps it after --lr_warmup_steps. The others fall to about 0: "linear" and
            "polynomial" in a straight line, "cosine" along half a wave; "cosine_with_restarts" has one cycle.
        lr_warmup_steps: Number of optimizer steps in which the learning rate rises from 0. "constant_with_warmup" needs
            one or more, and "constant" takes none.
        adam_beta1: Decay of AdamW's running mean of the gradient.
        adam_beta2: Decay of AdamW's running mean of the squared gradient.
        adam_epsilon: Small number that AdamW adds to its denominator, so that it never divides by zero.
        adam_weight_decay: Strength of AdamW's weight decay. 0 turns it off.
        max_grad_norm: Largest norm of all gradients together; larger gradients are scaled down to it. A very large
            value, such as 1e9, turns this off.
        ema_decay: Decay per step of the moving average of the trained weights, which is what is saved and sampled. It
            rises to this value over the first steps, so that short runs are averaged over less. It takes 4 bytes of
            memory for each trained weight. 0 turns it off, and the last weights are saved.
        compile: Compile the whole step with torch.compile ("full", or no word), which takes minutes at the start, or
            each kind of block that the UNet repeats ("regional"). Neither was measured on a GPU.
        cuda_graph: Record the training step once and replay it (a CUDA graph), so that the GPU does not wait for the
            CPU. It needs an NVIDIA GPU and a single process, and has not been run on a GPU yet.
        checkpointing_steps: Number of optimizer steps between two checkpoints; 0 makes none. A run that is stopped by
            Ctrl-C or SIGTERM always saves one.
        checkpoints_total_limit: Number of checkpoints to keep; older ones are deleted. The word None keeps all. The two
            newest stay until a step after the newest has succeeded.
        validation_steps: Number of optimizer steps between two validations; the first one is made before the training.
            It needs --validation_data_dir, --validation_pairs or --validation_prompts, and they need it. 0 turns it
            off.
        validation_prompts: Prompts of which every validation generates one image each, always from the same noise, with
            the steps and the guidance that are saved with the result. The images are written to output_dir/validation,
            and the first of the last step is the thumbnail in the LoRA file. Only with --task text. Default: none.
        resume_from_checkpoint: Checkpoint to continue from: "latest", a name such as checkpoint-500, or a path. Give
            the other options again; one that would change the result must be the same, except a larger
            --max_train_steps with a constant schedule. Default: a new run.
        logging_steps: Number of optimizer steps between two lines of log.jsonl. The last step is always logged.
        report_to: Where metrics are sent, besides the file log.jsonl, which is always written: "tensorboard" (files in
            output_dir/logs) or another tracker of accelerate, which must be installed. "none" sends them nowhere.
        dataloader_num_workers: Number of threads that read and decode images while the model trains. 0 reads each batch
            when it is needed. A data set given in Python must allow as many readers at once.
        seed: Seed of everything that is random in training: weights of a new LoRA, order of the data, crops, noise and
            times. On a CPU, the same seed and options repeat a run exactly.

    Raises:
        RefusedInputError: An option has a value that it does not take, or two options contradict each other.
    """

    output_dir: str = option("essential", "d2f-output", metavar="FOLDER")
    adapter: Literal["lora", "full"] = option("essential", "lora")
    rank: int | None = option("essential", None, at_least(1, MAX_RANK))
    resolution: Resolution | None = option("essential", None, partial(check_resolution, least=8, most=MAX_SIDE))
    max_train_steps: int = option("essential", 1000, at_least(1, MAX_STEPS))
    train_batch_size: int = option("essential", 4, at_least(1, MAX_BATCH))
    gradient_accumulation_steps: int = option("essential", 1, at_least(1, MAX_BATCH))
    learning_rate: float = option("essential", 1e-4, positive(1000.0))
    mixed_precision: Literal["no", "bf16"] | None = option("essential", None)
    gradient_checkpointing: bool = option("essential", False)
    init_lora: str | None = option("LoRA", None, metavar="PATH[:SCALE]")
    lora_alpha: float | None = option("LoRA", None, positive(1e6))
    conv_rank: int | None = option("LoRA", None, at_least(0, MAX_RANK))
    first_last_layers: bool | None = option("LoRA", None)
    target_modules: tuple[str, ...] | None = option("LoRA", None, metavar="NAME")
    lora_format: LoraFormat | None = option("LoRA", None)
    center_crop: bool = option("data", True)
    random_flip: bool = option("data", False)
    cache_dir: str | None = option("data", None, metavar="FOLDER")
    cache_latents: bool = option("data", True)
    caption_dropout: float | None = option("data", None, check_fraction)
    objective: ObjectiveName | None = option("method", None)
    fm_form: FlowForm | None = option("method", None)
    loss_weighting: LossWeighting | None = option("method", None)
    snr_gamma: float | None = option("method", None, check_positive)
    timestep_sampling: TimestepSampling = option("method", "uniform")
    logit_mean: float | None = option("method", None, finite(100.0))
    logit_std: float | None = option("method", None, positive(100.0))
    flow_shift: float = option("method", 1.0, positive(MAX_SHIFT))
    sampling_shift: float | None = option("method", None, positive(MAX_SHIFT))
    distill: bool = option("method", False)
    lpips_weight: float = option("method", 0.0, at_least(0, 1e6))
    lpips_net: Literal["vgg", "alex", "squeeze"] = option("method", "vgg")
    lr_scheduler: LearningRateSchedule = option("optimisation", "constant")
    lr_warmup_steps: int = option("optimisation", 0, at_least(0, MAX_STEPS))
    adam_beta1: float = option("optimisation", 0.9, check_fraction)
    adam_beta2: float = option("optimisation", 0.999, check_fraction)
    adam_epsilon: float = option("optimisation", 1e-8, check_positive)
    adam_weight_decay: float = option("optimisation", 1e-2, at_least(0, 1000.0))
    max_grad_norm: float = option("optimisation", 1.0, check_positive)
    ema_decay: float = option("optimisation", 0.999, check_fraction)
    compile: CompiledPart = option("memory and speed", "off")
    cuda_graph: bool = option("memory and speed", False)
    checkpointing_steps: int = option("checkpoints and logs", 500, at_least(0, MAX_STEPS))
    checkpoints_total_limit: int | None = option("checkpoints and logs", 2, at_least(1, MAX_STEPS))
    validation_steps: int = option("checkpoints and logs", 0, at_least(0, MAX_STEPS))
    validation_prompts: tuple[str, ...] | None = option("checkpoints and logs", None)
    resume_from_checkpoint: str | None = option("checkpoints and logs", None)
    logging_steps: int = option("checkpoints and logs", 10, at_least(1, MAX_STEPS))
    report_to: Tracker = option("checkpoints and logs", "none")
    dataloader_num_workers: int = option("memory and speed", 1, at_least(0, 256))
    seed: int = option("optimisation", 0, check_seed)

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and options that contradict each other."""
        check_options(self)
        object.__setattr__(self, "resolution", simplest(self.resolution))
        check_pairs(self)

    @property
    def recommended_shift(self) -> float:
        """Return the shift that is saved for sampling: `sampling_shift`, or else `flow_shift`."""
        return self.flow_shift if self.sampling_shift is None else self.sampling_shift
