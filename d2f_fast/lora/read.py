"""Read LoRA files into the update of each adapted layer. No pipeline is needed.

`header` says what is in a file. The scale comes from the alpha of each layer, from peft's configuration in the header,
or from the `adapter_config.json` beside the file. `key_names` maps the names of the layers to the modules of a
pipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.header import LayerHeader, LoraHeader, read_lora_header
from d2f_fast.lora.layer_weights import LayerWeights, loha_weights, lokr_weights, lora_weights
from d2f_fast.lora.scales import checked_alpha


@dataclass(frozen=True)
class LoraFile:
    """Content of a LoRA file.

    Attributes:
        about: What its header says.
        layers: Update of each adapted layer, by the name that `file_keys` gives the layer.
    """

    about: LoraHeader
    layers: dict[str, LayerWeights]

    @property
    def path(self) -> Path:
        """Return the path of the file."""
        return self.about.path

    @property
    def header(self) -> dict[str, str]:
        """Return the text entries of the file's header."""
        return self.about.entries

    @property
    def stems(self) -> dict[str, str]:
        """Return the file's own name of each layer, for messages."""
        return {name: layer.stem for name, layer in self.about.layers.items()}


def read_lora(source: StrPath) -> LoraFile:
    """Read a LoRA file.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        ModelError: The file holds another kind of adapter, lacks a matrix, or gives no usable scale.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    about = read_lora_header(source)
    tensors, _ = read_tensors(about.path)
    layers = {name: _layer_weights(about.path, layer, tensors) for name, layer in about.layers.items()}
    return LoraFile(about, layers)


def _layer_weights(path: Path, layer: LayerHeader, tensors: Mapping[str, Tensor]) -> LayerWeights:
    """Return the update of one layer, or refuse numbers that cannot be used."""
    parts: dict[str, Tensor] = {}
    for part, key in layer.keys.items():
        parts[part] = tensors[key].float()
        if not parts[part].isfinite().all():
            raise ModelError(f"LoRA {path}: {printable(key)} holds NaN or infinity: take an earlier save of the LoRA")
    alpha = checked_alpha(path, layer.stem, parts["alpha"].item()) if "alpha" in parts else layer.alpha
    if layer.kind == "hada":
        return loha_weights(parts, alpha)
    if layer.kind == "lokr":
        return lokr_weights(parts, alpha, layer.divisor)
    weights = lora_weights(parts, 1.0)
    return replace(weights, alpha=alpha or float(weights.rank))
