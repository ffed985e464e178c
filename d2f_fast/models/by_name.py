"""Find the model that a command names."""

from typing import Any

MINIATURE = "miniature"


def model_by_name(name: str) -> Any:
    """The embedded miniature by its name, loaded; any other name as it is."""
    if name != MINIATURE:
        return name
    from d2f_fast.miniature import load_miniature

    return load_miniature()
