"""What is saved beside the weights so that others sample them as they were trained: the scheduler, and the tags."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from d2f_fast.config import TrainingConfig
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.objective import Objective

_SCHEDULE_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


def stock_scheduler(config: TrainingConfig, model: BaseModel) -> Any:
    """The scheduler of diffusers that samples what a run trained, in any pipeline of Stable Diffusion.

    Args:
        config: of the run.
        model: its base.
    """
    if config.objective == "fm":
        # Of first order it is Euler in flow time. diffusers' own flow scheduler fits none of these pipelines.
        return DPMSolverMultistepScheduler(
            model.alignment.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.flow_shift,
            solver_order=1,
            steps_offset=1,  # unused; what the pipelines ask for
            final_sigmas_type="zero",
        )
    base = model.pipeline.scheduler.config
    # Named, or diffusers would take the other class' defaults for what the base left at its own.
    table = {name: base[name] for name in _SCHEDULE_KEYS if name in base}
    return EulerDiscreteScheduler.from_config(base, **table, timestep_spacing="trailing", final_sigmas_type="zero")


def tags_of(config: TrainingConfig, objective: Objective) -> dict[str, str]:
    """Entries of a file's header that say what it is and how to sample it.

    Args:
        config: of the run.
        objective: it was trained on.
    """
    flow, alignment = objective.flow, objective.alignment
    recommended = alignment.sigmas(4, config.flow_shift)
    if config.objective == "fm":  # whose sigma, in diffusers, is 1 - t
        recommended = (1 - flow.times(4, shift=config.flow_shift)).tolist()
    return {
        "d2f.objective": config.objective,
        "d2f.prediction_type": flow.prediction_type,
        "d2f.zero_snr": str(alignment.schedule.zero_terminal_snr).lower(),
        "d2f.loss_weighting": config.loss_weighting,
        "d2f.shift": str(config.flow_shift),
        "d2f.recommended_sigmas": ", ".join(f"{sigma:.4g}" for sigma in recommended),
    }
