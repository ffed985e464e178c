"""Images say how they were generated, in the text that A1111 and the programs after it read."""

import io
import json
import re

import pytest
from PIL import Image

from d2f_fast.sampling.png_text import png_text

# The pattern by which A1111 finds the entries in the last line, and the rule by which it undoes the quotes.
ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_as_a1111_does(text: str) -> tuple[str, str, dict[str, str]]:
    *lines, last = text.strip().split("\n")
    found = ENTRY.findall(last)
    assert len(found) >= 3  # With fewer, the last line is taken for a part of the prompt.
    entries = {name: json.loads(value) if value[:1] == value[-1:] == '"' else value for name, value in found}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    return prompt, negative, entries


@pytest.mark.parametrize("prompt", ["a red fox", "ein Füchslein, 狐", 'two\nlines: "quoted"'])
@pytest.mark.parametrize("negative", ["", "blurry, dark"])
def test_text_of_a_png_file_is_read_back(prompt, negative):
    entries = {"Steps": 4, "CFG scale": 3.0, "Size": "32x24", "Model": "a, b: c", "Lora": 'x"y:0.8'}
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG", pnginfo=png_text(prompt, negative, entries))
    with Image.open(stream) as image:
        text = image.text["parameters"]
    assert read_as_a1111_does(text) == (prompt, negative, {name: str(value) for name, value in entries.items()})
