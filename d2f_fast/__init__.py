"""Fused, optimised Diff2Flow: finetune diffusers models as flow-matching models.

Public names are imported when first used, so that `import d2f_fast` loads neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f_fast.config import TrainingConfig
    from d2f_fast.flow.alignment import Alignment
    from d2f_fast.layers.fused_lora import use_fused_lora
    from d2f_fast.miniature import load_miniature
    from d2f_fast.ops import align, aligned_loss
    from d2f_fast.sampling.integrate import sample_flow
    from d2f_fast.sampling.scheduler import Diff2FlowScheduler
    from d2f_fast.training.trainer import AlignedTrainer

    __version__: str

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
    "use_fused_lora",
]

_MODULE_OF = {
    "AlignedTrainer": "d2f_fast.training.trainer",
    "Alignment": "d2f_fast.flow.alignment",
    "Diff2FlowScheduler": "d2f_fast.sampling.scheduler",
    "TrainingConfig": "d2f_fast.config",
    "align": "d2f_fast.ops",
    "aligned_loss": "d2f_fast.ops",
    "load_miniature": "d2f_fast.miniature",
    "sample_flow": "d2f_fast.sampling.integrate",
    "use_fused_lora": "d2f_fast.layers.fused_lora",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use finds it without this call
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    """Version from the installed metadata; "0+checkout" in a checkout that was never installed."""
    from importlib.metadata import PackageNotFoundError, version  # here: it takes longer to import than this package

    try:
        return version("d2f-fast")
    except PackageNotFoundError:
        return "0+checkout"
