"""Fused, optimised Diff2Flow: finetune diffusers models as flow-matching models.

Public names are imported when first used, so that `import d2f_fast` loads neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2f_fast.config import TrainingConfig
    from d2f_fast.flow.alignment import Alignment
    from d2f_fast.layers.fused_lora import use_fused_lora
    from d2f_fast.miniature import load_miniature
    from d2f_fast.ops import align, aligned_loss
    from d2f_fast.sampling.adaptive import sample_flow_adaptive
    from d2f_fast.sampling.integrate import sample_flow
    from d2f_fast.sampling.scheduler import Diff2FlowScheduler
    from d2f_fast.sampling.stochastic import sample_flow_stochastic
    from d2f_fast.training.trainer import AlignedTrainer

__version__ = "0.1.0"

__all__ = [
    "AlignedTrainer",
    "Alignment",
    "Diff2FlowScheduler",
    "TrainingConfig",
    "__version__",
    "align",
    "aligned_loss",
    "load_miniature",
    "sample_flow",
    "sample_flow_adaptive",
    "sample_flow_stochastic",
    "use_fused_lora",
]

# The module of each public name; the imports above, which only type checkers read, must agree with it.
_MODULE_OF = {
    "AlignedTrainer": "d2f_fast.training.trainer",
    "Alignment": "d2f_fast.flow.alignment",
    "Diff2FlowScheduler": "d2f_fast.sampling.scheduler",
    "TrainingConfig": "d2f_fast.config",
    "align": "d2f_fast.ops",
    "aligned_loss": "d2f_fast.ops",
    "load_miniature": "d2f_fast.miniature",
    "sample_flow": "d2f_fast.sampling.integrate",
    "sample_flow_adaptive": "d2f_fast.sampling.adaptive",
    "sample_flow_stochastic": "d2f_fast.sampling.stochastic",
    "use_fused_lora": "d2f_fast.layers.fused_lora",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # The next use finds it without this call.
    return value


def __dir__() -> list[str]:
    """Return all names of the package, including those that were not imported yet."""
    return sorted({*globals(), *__all__})
