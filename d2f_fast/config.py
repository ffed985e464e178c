"""Options of a run, and the words they take. Imports no torch, so that `d2f --help` is instant."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from d2f_fast.errors import RefusedInputError

ObjectiveName = Literal["diff2flow", "fm", "diffusion"]
LossWeighting = Literal["flow", "native", "min_snr"]
TimestepSampling = Literal["uniform", "logit_normal", "mode", "u_shaped"]
LearningRateSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
Method = Literal["euler", "midpoint", "heun"]
Spacing = Literal["uniform", "trailing"]
# The trackers of accelerate, by its names.
Tracker = Literal[
    "none", "tensorboard", "wandb", "comet_ml", "aim", "clearml", "dvclive", "mlflow", "swanlab", "trackio"
]
SNR_GAMMA = 5.0
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True)
class TrainingConfig:
    """Options of a run, spelled as in the diffusers training scripts.

    Args:
        output_dir: of checkpoints, logs and the result.
        objective: diff2flow aligned flow matching; fm naive flow matching; diffusion the base model's own loss.
        loss_weighting: flow, native (1 / Q²) or min_snr; a factor on the velocity error.
        snr_gamma: of min_snr.
        timestep_sampling: density of 1 - t.
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        flow_shift: factor on the sampling sigmas, in training and sampling.
        adapter: lora trains LoRA layers, full every weight of the UNet.
        rank: of the linear LoRA layers.
        lora_alpha: scale is alpha / rank; None for a scale of 1.
        conv_rank: of the convolutional LoRA layers; 0 for none.
        first_last_layers: adapt the first and last convolution too, as expressively as full weights.
        target_modules: name endings of the linear layers to adapt; None for attention and feed-forward.
        resolution: pixels.
        center_crop: crop the middle instead of a random position.
        random_flip: mirror half of the pictures.
        cache_dir: latents and text embeddings are kept here; None for output_dir/cache.
        cache_latents: needs center_crop.
        caption_dropout: share of captions replaced by the empty one, for guidance.
        train_batch_size: pictures per process and backward pass.
        gradient_accumulation_steps: backward passes per step.
        max_train_steps: steps in all.
        learning_rate: of AdamW.
        lr_scheduler: of diffusers.
        lr_warmup_steps: steps of linear rise.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_epsilon: of AdamW.
        adam_weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it.
        ema_decay: of the trained weights, which sampling and saving use; 0 turns the average off.
        mixed_precision: no, or bf16 autocast; None for what `accelerate launch` was told.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: compile the training step; the compiled code is kept between runs.
        cuda_graph: replay the whole step as one CUDA graph, for up to four shapes of a batch; needs a CUDA GPU.
        checkpointing_steps: steps between checkpoints; 0 for none but the one on a signal.
        checkpoints_total_limit: checkpoints kept; None for all.
        resume_from_checkpoint: "latest", or a checkpoint's name or path.
        logging_steps: steps between log lines.
        report_to: accelerate's tracker that gets the logged steps, or none; log.jsonl always gets them.
        dataloader_num_workers: threads that read and decode, a batch each, while the step runs; with more than one the
            data set is read from several at once; 0 reads when asked.
        seed: of everything.
    """

    output_dir: str = "d2f-output"
    objective: ObjectiveName = "diff2flow"
    loss_weighting: LossWeighting = "flow"
    snr_gamma: float = SNR_GAMMA
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float = 1.0
    adapter: Literal["lora", "full"] = "lora"
    rank: int = 64
    lora_alpha: float | None = None
    conv_rank: int = 0
    first_last_layers: bool = False
    target_modules: tuple[str, ...] | None = None
    resolution: int = 512
    center_crop: bool = True
    random_flip: bool = False
    cache_dir: str | None = None
    cache_latents: bool = True
    caption_dropout: float = 0.1
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    learning_rate: float = 1e-4
    lr_scheduler: LearningRateSchedule = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    logging_steps: int = 10
    report_to: Tracker = "none"
    dataloader_num_workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        for name, words in _WORDS.items():
            check_word(name, getattr(self, name), words)
        for name, least in _AT_LEAST.items():
            check_number(name, getattr(self, name), least)
        check_seed(self.seed)
        for name in ("caption_dropout", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RefusedInputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        if not math.isfinite(self.logit_mean):
            raise RefusedInputError(f"logit_mean must be finite, got {self.logit_mean}")
        if self.objective == "fm" and self.loss_weighting != "flow":
            raise RefusedInputError(f"objective fm has no loss_weighting but flow, got {self.loss_weighting}")
        if self.snr_gamma != SNR_GAMMA and self.loss_weighting != "min_snr":  # diffusers' scripts switch it on by this
            raise RefusedInputError(f"snr_gamma is of loss_weighting min_snr, got {self.loss_weighting}")
        if self.cache_latents and not self.center_crop:
            raise RefusedInputError("cache_latents needs center_crop: a random crop has no one latent")


_WORDS = {
    **{"objective": get_args(ObjectiveName), "loss_weighting": get_args(LossWeighting), "adapter": ("lora", "full")},
    **{"timestep_sampling": get_args(TimestepSampling), "lr_scheduler": get_args(LearningRateSchedule)},
    **{"mixed_precision": ("no", "bf16"), "report_to": get_args(Tracker)},
}
_AT_LEAST = {
    **{"resolution": 8, "rank": 1, "conv_rank": 0, "train_batch_size": 1, "gradient_accumulation_steps": 1},
    **{"max_train_steps": 1, "lr_warmup_steps": 0, "checkpointing_steps": 0, "checkpoints_total_limit": 1},
    **{"logging_steps": 1, "dataloader_num_workers": 0, "adam_weight_decay": 0},
}
_POSITIVE = ("learning_rate", "lora_alpha", "snr_gamma", "logit_std", "flow_shift", "adam_epsilon", "max_grad_norm")


def check_word(name: str, value: str | None, words: Sequence[str]) -> None:
    """Refuse a value that is none of the words of an option; None stands for its default.

    Raises:
        RefusedInputError: with the words.
    """
    if value is not None and value not in words:
        raise RefusedInputError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value}")


def check_number(name: str, value: float | None, least: float) -> None:
    """Refuse a value below the least that an option takes.

    Raises:
        RefusedInputError: with the least.
    """
    if value is not None and not value >= least:
        raise RefusedInputError(f"{name} must be at least {least}, got {value}")


def check_seed(seed: int) -> None:
    """Refuse what torch's generators do not take.

    Raises:
        RefusedInputError: negative, or of more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise RefusedInputError(f"seed must be in [0, 2**63), got {seed}")


def check_positive(name: str, value: float | None) -> None:
    """Refuse a value that is zero, negative, infinite or no number.

    Raises:
        RefusedInputError: with the value.
    """
    if value is not None and not 0 < value < math.inf:
        raise RefusedInputError(f"{name} must be positive and finite, got {value}")
