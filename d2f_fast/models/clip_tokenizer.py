"""Make CLIP's tokenizer for a model whose file has none, from an installed package or from a folder."""

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_fast.errors import ModelError, printable

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Packages that carry the file of CLIP's byte pairs; open_clip is the extra "single-file" of this package.
_PACKAGES = ("open_clip", "clip")
_BYTE_PAIRS_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # The file lists more pairs than CLIP was trained with.
_MAX_BYTES = 64 * 2**20
_HUB_ID = "openai/clip-vit-large-patch14"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_CURE = (
    "pip install open_clip_torch, or give --tokenizer_name_or_path a folder with vocab.json and merges.txt,"
    " such as the tokenizer folder of any diffusers pipeline of Stable Diffusion"
)


def clip_tokenizer(source: str | None, pad_token: str, length: int, rows: int) -> "CLIPTokenizer":
    """Return CLIP's tokenizer.

    Args:
        source: Folder with vocab.json and merges.txt, folder of a diffusers pipeline, or hub id. None takes the
            vocabulary from an installed package, or else from the hub's cache.
        pad_token: Token that fills prompts up to `length`.
        length: Number of tokens of a prompt, its start and end included.
        rows: Number of tokens that the text encoder knows.

    Raises:
        ModelError: There is no vocabulary, it cannot be read, or it has more tokens than the text encoder.
    """
    if source is not None:
        tokenizer = _from_folder(_tokenizer_folder(source), pad_token, length)
    elif (byte_pairs := find_byte_pairs()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(byte_pairs, Path(folder))
            tokenizer = _from_folder(folder, pad_token, length)
    else:
        try:
            tokenizer = _from_folder(_hub_folder(_HUB_ID), pad_token, length)
        except OSError as error:
            raise ModelError(f"the file holds no tokenizer, and no installed package has CLIP's: {_CURE}") from error
    if len(tokenizer) > rows:
        where = "the vocabulary of CLIP" if source is None else f"tokenizer_name_or_path {printable(source)}"
        raise ModelError(
            f"{where} has {len(tokenizer)} tokens, and the model's text encoder knows {rows}: give the tokenizer of"
            " this model with --tokenizer_name_or_path"
        )
    return tokenizer


def find_byte_pairs() -> Path | None:
    """Return the file of CLIP's byte pairs in an installed package, which is not imported; None where there is none."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / _BYTE_PAIRS_FILE
            if path.is_file():
                return path
    return None


def write_vocabulary(byte_pairs: Path, folder: Path) -> None:
    """Write vocab.json and merges.txt of CLIP from the file of its byte pairs.

    Args:
        byte_pairs: bpe_simple_vocab_16e6.txt.gz as OpenAI published it.
        folder: Folder that receives the two files.

    Raises:
        ModelError: The file is not that of CLIP.
    """
    try:
        with gzip.open(byte_pairs) as file:
            lines = file.read(_MAX_BYTES).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"{printable(byte_pairs)} cannot be read ({error}): install the package again") from error
    merges = [line for line in lines[1 : _MERGES + 1] if line]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += [_START, _END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte, in CLIP's order: printable bytes first, and then all others."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(plain))
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in others]


def _tokenizer_folder(source: str) -> str:
    """Return the folder that holds the tokenizer's files: the one that is named, or tokenizer/ inside it."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            if folder.is_absolute() or source.startswith("."):
                raise FileNotFoundError("there is no such folder")
            return _hub_folder(source)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"tokenizer_name_or_path {printable(folder)} is not a folder ({reason}): {_CURE}"
            ) from error
    for candidate in (folder, folder / "tokenizer"):
        names = {path.name for path in candidate.glob("*") if path.is_file()}
        if {"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names:
            return str(candidate)
    raise ModelError(f"tokenizer_name_or_path {printable(folder)} holds no vocab.json and merges.txt: {_CURE}")


def _hub_folder(model: str) -> str:
    """Return the folder of the hub's cache that holds a repository's vocab.json and merges.txt."""
    from huggingface_hub import hf_hub_download

    # transformers makes an empty tokenizer where a repository lacks the files, so that they are asked for by name.
    return str(Path([hf_hub_download(model, name) for name in ("vocab.json", "merges.txt")][-1]).parent)


def _from_folder(folder: str, pad_token: str, length: int) -> "CLIPTokenizer":
    """Load the tokenizer of a folder or hub id."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END, model_max_length=length
        )
    except Exception as error:  # The tokenizers library raises plain exceptions for damaged files.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"tokenizer_name_or_path {printable(folder)} cannot be loaded ({reason}): {_CURE}") from error
    if pad_token in tokenizer.get_vocab():  # Any other token would be added to the vocabulary.
        tokenizer.pad_token = pad_token
    return tokenizer
