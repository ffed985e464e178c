"""Write into a PNG file how its image was generated, in the text that A1111, Forge and ComfyUI read from images."""

import json
from collections.abc import Mapping

from PIL.PngImagePlugin import PngInfo

KEY = "parameters"


def png_text(prompt: str, negative_prompt: str, entries: Mapping[str, object]) -> PngInfo:
    """Return the text chunk of an image for Pillow's `save(..., pnginfo=...)`.

    Args:
        prompt: prompt of the image; it is the first line.
        negative_prompt: prompt to steer away from; where it is not empty, it is the second line.
        entries: settings by name, such as {"Steps": 4, "CFG scale": 3.0}; they are the last line.
    """
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items()))
    info = PngInfo()
    info.add_text(KEY, "\n".join(lines))
    return info


def _quoted(value: str) -> str:
    """Return a value in quotes where it holds a character that separates entries."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
