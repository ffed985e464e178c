"""Options of a training run, their checks, and the words that they take.

This module imports no torch, so that `d2f --help` answers at once.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from d2f_fast.errors import RefusedInputError, printable
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
OptionGroup = Literal[
    "model",
    "data",
    "method",
    "optimisation",
    "memory and speed",
    "checkpoints and logs",
    "image",
    "sampling",
]
DEFAULT_SNR_GAMMA = 5.0
# Larger values are typing errors, and would fill the memory or give numbers that are not finite.
MAX_STEPS, MAX_RANK, MAX_BATCH, MAX_SIDE, MAX_GUIDANCE, MAX_SHIFT = 10**9, 4096, 1 << 16, 1 << 14, 1000.0, 1000.0
DEFAULT_RANK = 64
DEFAULT_CAPTION_DROPOUT = 0.1
DEFAULT_GUIDANCE = 3.0
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
        RefusedInputError: The text, or one of several, has bytes that are not UTF-8, or a zero byte.
    """
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


def option(group: OptionGroup | None, default: T, check: Callable[[str, Any], None] | None = None) -> T:
    """Declare an option of a dataclass, together with the title that the command line's help lists it under.

    Args:
        group: title in the help; None lists the option first, under no title of its own.
        default: default value of the option.
        check: function of the option's name and value, which raises RefusedInputError for a value that cannot be used;
            None accepts every value.

    Returns:
        The dataclass field. Its declared type is that of the default, which is how `dataclasses.field` is typed, too.
    """
    return field(default=default, metadata={"group": group, "check": check})


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words of a `Literal` type, alone or in a union with None; () for any other type."""
    return next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())


def choice_of(words: Sequence[str]) -> str:
    """Return the words of a choice as a sentence has them."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def spell_out_flags(arguments: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return arguments in which a flag of three states has its value, which the option parser asks for.

    Args:
        arguments: words of a command line.
        names: options of the type `bool | None`. `--name` becomes `--name True`, and `--no_name` becomes
            `--name False`; a value that follows `--name` stays.
    """
    flags = {f"{prefix}{name}": (name, value) for name in names for prefix, value in (("", "True"), ("no_", "False"))}
    spelled: list[str] = []
    for i, word in enumerate(arguments):
        found = flags.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        if found is None or (found[1] == "True" and arguments[i + 1 : i + 2] in (["True"], ["False"], ["None"])):
            spelled.append(word)
        else:
            spelled += [f"--{found[0]}", found[1]]
    return spelled


def check_options(options: Any) -> None:
    """Refuse a dataclass of options that holds a value which its option does not take.

    Args:
        options: instance of a dataclass. A field of a `Literal` type takes that type's words, and None where the type
            has it; a field that was declared with a check takes what the check accepts.

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
        output_dir: Folder that receives checkpoints, logs and the trained weights; it is created if it is missing. A
            folder with checkpoints is refused unless --resume_from_checkpoint is given, and so is one with the result
            of a finished run and no checkpoint, or with another run in progress; other files are replaced.
        objective: What the network learns. "diff2flow" trains flow matching by converting the base model's own time,
            noisy input and output with formulas; "fm" trains it without them, so that the network learns the flow
            itself; "diffusion" trains the base model's own loss. The default None takes "fm" for a base model that
            predicts the flow already (flow_prediction), which takes no other, and "diff2flow" for all others.
        fm_form: Form of the objective "fm". "diffusers" feeds the network 1000 (1 - t) and teaches it noise - latents;
            "published" feeds it t itself and teaches it latents - noise, as the code of the Diff2Flow paper does. The
            default None takes the form of a base model that predicts the flow, and "diffusers" for all others.
        loss_weighting: Weight of the squared velocity error at each time. "flow" weights all times equally, "native"
            weights them as the loss of the base model does, and "min_snr" weights nearly clean images less. The
            default None means "min_snr" where --snr_gamma is given, else "native" for the objective "diffusion", and
            "flow" for the others. "fm" takes only "flow"; "diffusion" takes "native" and "min_snr", which then is the
            Min-SNR weight of diffusers' scripts.
        snr_gamma: Signal-to-noise ratio α²/σ² above which "min_snr" lowers the weight, a positive number. Giving it
            turns that weighting on. The default None means 5 with --loss_weighting min_snr, and no such weight without.
        timestep_sampling: Distribution of the training times. "uniform" samples the flow time t (0 is noise, 1 is data)
            evenly, "logit_normal" and "mode" (the heavy-tailed one of the SD3 paper, with its scale of 1.29) prefer
            the middle, and "u_shaped" prefers both ends. The objective "diffusion" samples whole timesteps evenly, and
            takes only the default.
        logit_mean: Mean of the logit of 1 - t, which is log((1 - t) / t), for "logit_normal" only. Positive values
            train more on noisy images; the default None means 0, which is centred.
        logit_std: Standard deviation of the same logit, a positive number, for "logit_normal" only. Larger values
            train more on very clean and very noisy images. The default None means 1.
        flow_shift: Factor on the ratio of noise to image, (1 - t) / t, in training, as shift in the SD3 paper. Values
            above 1 train more on noisy images; 1 turns it off. The objective "diffusion" takes only 1.
        sampling_shift: The same factor for sampling, which is saved with the result as a recommendation, and which
            `d2f sample` uses; it does not change the training. The default None takes that of --flow_shift.
        distill: Train the jump from noise to image in one step, and no other time, on the noise and latents of --pairs.
            It is the last stage after reflow, from whose result it starts, and the result is sampled in one step. It
            goes with the objectives "diff2flow" and "fm", and is off by default.
        adapter: Which weights are trained. "lora" trains small LoRA layers and leaves the base model unchanged; "full"
            trains every weight of the UNet and saves a whole pipeline.
        init_lora: LoRA to start from, as PATH or PATH:SCALE, in any format that `d2f sample --lora` takes but DoRA. Its
            layers and ranks are trained further; what it holds of text encoders is merged into them, and saved again.
            Options below that state other layers or ranks are refused. The default None starts a new LoRA.
        rank: Rank of the LoRA layers in attention and feed-forward layers. A larger rank learns more, and makes a
            larger file. The default None means that of --init_lora, or else 64. With --adapter full, this option and
            the four below are refused.
        lora_alpha: Strength of the LoRA layers, whose output is multiplied by lora_alpha / rank. The default None means
            a factor of 1.
        conv_rank: Rank of LoRA layers that are added to the convolutions of residual blocks, shortcuts, down- and
            upsampling: all but the first and the last. 0 adds none, and with --init_lora states that it has none. The
            default None means what --init_lora has, or else 0.
        first_last_layers: Also train the UNet's first and last convolution, with LoRA layers of full rank, which can
            learn any change of their weights. --no_first_last_layers does not train them, and with --init_lora states
            that it has none of them. The default None means what --init_lora has, or else off.
        target_modules: Name endings of the layers that get LoRA layers in place of attention and feed-forward, such as
            to_q to_k. --conv_rank and --first_last_layers still add theirs. The default None takes all attention and
            feed-forward layers.
        resolution: Side of the square training images, in pixels. The shorter side of each image is resized to it, and
            the longer side is cropped. It must be a multiple of the model's downsampling, which is 8 for Stable
            Diffusion. The default None means the model's own size, such as 512 for SD1.5 and 1024 for SDXL.
        center_crop: Crop the middle of each image, which is the default. --no_center_crop crops a random position, and
            needs --no_cache_latents.
        random_flip: Mirror each image left to right with a probability of one half. The cache then keeps both
            versions. It is off by default.
        cache_dir: Folder that keeps encoded images and captions; several runs may share it. Captions are always kept.
            The default None means the folder "cache" inside output_dir.
        cache_latents: Keep encoded images on disk, and reuse them in each epoch; this needs --center_crop. It is on by
            default, and --no_cache_latents encodes every image again each time.
        caption_dropout: Fraction of captions, in [0, 1), that are replaced by the empty caption, so that guidance works
            when sampling. 0 keeps every caption. The default None means 0.1, and 0 with `d2f train --pairs`, whose
            guidance is built in.
        train_batch_size: Number of images in each forward and backward pass of each process.
        gradient_accumulation_steps: Number of forward and backward passes whose gradients are averaged into one
            optimizer step. The default 1 turns accumulation off.
        max_train_steps: Number of optimizer steps of the whole run, including the steps before a resumed checkpoint.
        learning_rate: Learning rate of the AdamW optimizer, after warm-up and before any decay.
        lr_scheduler: Schedule of the learning rate, as diffusers' get_scheduler with its defaults: "cosine" falls to 0
            along half a wave, "cosine_with_restarts" has one cycle, "polynomial" has power 1 and ends at 1e-7. The
            default "constant" keeps the rate, and "constant_with_warmup" keeps it after a warm-up.
        lr_warmup_steps: Number of optimizer steps in which the learning rate rises linearly from 0. The default 0 turns
            warm-up off. "constant" takes no warm-up, and "constant_with_warmup" needs one.
        adam_beta1: Decay of AdamW's running mean of the gradient, in [0, 1).
        adam_beta2: Decay of AdamW's running mean of the squared gradient, in [0, 1).
        adam_epsilon: Small number that AdamW adds to its denominator, so that it never divides by zero.
        adam_weight_decay: Strength of AdamW's weight decay. 0 turns it off.
        max_grad_norm: Gradients are scaled down when the norm of all of them together is larger than this. A very large
            value, such as 1e9, turns clipping off.
        ema_decay: Decay per step, in [0, 1), of the moving average of the trained weights, which is used for sampling
            and saving. 0 turns the average off, so that the last weights are used.
        mixed_precision: Precision of the forward and backward pass. "no" is float32, and "bf16" is bfloat16 autocast,
            which is faster on recent GPUs. The default None takes what `accelerate launch` was set to, or else "no".
        gradient_checkpointing: Compute activations again in the backward pass, which takes less memory and more time.
            It is off by default.
        compile: Compile the training step with torch.compile. The first step takes minutes, later ones are faster (see
            docs/results.md; measured on a CPU only), and the compiled code is kept for the next run. It is off by
            default.
        cuda_graph: Record the whole training step as one CUDA graph, which removes the CPU's overhead. It needs an
            NVIDIA GPU and a single process. Four batch shapes are recorded; further ones run without a graph. It has
            not been run on a GPU yet, and is off by default.
        checkpointing_steps: Number of optimizer steps between two checkpoints. 0 saves a checkpoint only when the run
            is stopped by SIGTERM or Ctrl-C.
        checkpoints_total_limit: Number of checkpoints that are kept; older ones are deleted. None keeps all of them.
            The checkpoint before the newest one stays until a finite step has followed the newest.
        validation_steps: Number of optimizer steps between two validations, of which the first is made before the first
            step. It needs --validation_data_dir or --validation_pairs, whose loss is measured, or
            --validation_prompts. The default 0 turns it off.
        validation_prompts: Prompts of which every validation generates one image each, always from the same noise, in
            the steps and with the guidance that are recommended for the result. They are written to
            output_dir/validation, and the first one of the last step is the thumbnail in the LoRA files. The default
            None generates none.
        lora_format: Which LoRA files are written at the end. "diffusers" writes pytorch_lora_weights.safetensors for
            diffusers, "kohya" writes a file for ComfyUI, A1111, Forge and kohya's scripts, named after output_dir
            (my_run_kohya.safetensors), and "both" writes the two. The default None means "both". With --adapter full
            the option is refused.
        resume_from_checkpoint: Checkpoint to continue from, given as "latest", as a name such as checkpoint-500, or as
            a path. The default None starts a new run.
        logging_steps: Number of optimizer steps between two entries of the log, at least 1. The last step is always
            logged.
        report_to: Where metrics are sent, besides the file log.jsonl, which is always written. "tensorboard" writes
            its files into output_dir/logs, and the other names are the trackers that accelerate knows. The tracker
            must be installed. The default "none" sends metrics nowhere else.
        dataloader_num_workers: Number of threads that read and decode images while the model trains. 0 reads each batch
            only when it is needed. With 2 or more, a data set of your own must be safe to read from several threads.
        seed: Seed of everything that is random in training, from 0 to 2**63 - 1: initial LoRA weights, order of the
            data, crops, noise and times. The same seed and options repeat a run.

    Raises:
        RefusedInputError: An option has a value that it does not take, or two options contradict each other.
    """

    output_dir: str = option("checkpoints and logs", "d2f-output")
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
    adapter: Literal["lora", "full"] = option("model", "lora")
    init_lora: str | None = option("model", None)
    rank: int | None = option("model", None, at_least(1, MAX_RANK))
    lora_alpha: float | None = option("model", None, positive(1e6))
    conv_rank: int | None = option("model", None, at_least(0, MAX_RANK))
    first_last_layers: bool | None = option("model", None)
    target_modules: tuple[str, ...] | None = option("model", None)
    resolution: int | None = option("data", None, at_least(8, MAX_SIDE))
    center_crop: bool = option("data", True)
    random_flip: bool = option("data", False)
    cache_dir: str | None = option("data", None)
    cache_latents: bool = option("data", True)
    caption_dropout: float | None = option("data", None, check_fraction)
    train_batch_size: int = option("optimisation", 4, at_least(1, MAX_BATCH))
    gradient_accumulation_steps: int = option("optimisation", 1, at_least(1, MAX_BATCH))
    max_train_steps: int = option("optimisation", 1000, at_least(1, MAX_STEPS))
    learning_rate: float = option("optimisation", 1e-4, positive(1000.0))
    lr_scheduler: LearningRateSchedule = option("optimisation", "constant")
    lr_warmup_steps: int = option("optimisation", 0, at_least(0, MAX_STEPS))
    adam_beta1: float = option("optimisation", 0.9, check_fraction)
    adam_beta2: float = option("optimisation", 0.999, check_fraction)
    adam_epsilon: float = option("optimisation", 1e-8, check_positive)
    adam_weight_decay: float = option("optimisation", 1e-2, at_least(0, 1000.0))
    max_grad_norm: float = option("optimisation", 1.0, check_positive)
    ema_decay: float = option("optimisation", 0.999, check_fraction)
    mixed_precision: Literal["no", "bf16"] | None = option("memory and speed", None)
    gradient_checkpointing: bool = option("memory and speed", False)
    compile: bool = option("memory and speed", False)
    cuda_graph: bool = option("memory and speed", False)
    checkpointing_steps: int = option("checkpoints and logs", 500, at_least(0, MAX_STEPS))
    checkpoints_total_limit: int | None = option("checkpoints and logs", 2, at_least(1, MAX_STEPS))
    validation_steps: int = option("checkpoints and logs", 0, at_least(0, MAX_STEPS))
    validation_prompts: tuple[str, ...] | None = option("checkpoints and logs", None)
    lora_format: LoraFormat | None = option("checkpoints and logs", None)
    resume_from_checkpoint: str | None = option("checkpoints and logs", None)
    logging_steps: int = option("checkpoints and logs", 10, at_least(1, MAX_STEPS))
    report_to: Tracker = option("checkpoints and logs", "none")
    dataloader_num_workers: int = option("memory and speed", 1, at_least(0, 256))
    seed: int = option("optimisation", 0, check_seed)

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and options that contradict each other."""
        check_options(self)
        check_pairs(self)

    @property
    def recommended_shift(self) -> float:
        """Return the shift that is saved for sampling: `sampling_shift`, or else `flow_shift`."""
        return self.flow_shift if self.sampling_shift is None else self.sampling_shift
