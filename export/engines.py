"""Write the commands that build a TensorRT engine of each exported graph. Neither a GPU nor TensorRT is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from d2f_fast.export.exported_files import latent_sides
from d2f_fast.export.source import text_length
from d2f_fast.models.base_model import BaseModel

# Smallest, usual and largest side of an engine's images, as a factor of the model's own.
_SIDE_FACTORS = (0.5, 1, 1.5)


def engine_commands(folder: Path, model: BaseModel, copies: int, step_counts: Sequence[int]) -> list[str]:
    """Return a trtexec command for each graph of an export.

    Its engine takes images whose sides are half to one and a half times those that the model was trained at.

    Args:
        folder: export folder with the graphs.
        model: model that was exported.
        copies: number of conditions on which the sampler evaluates the network at once.
        step_counts: numbers of steps that the sampler has tables for.
    """
    config = model.unet.config
    step = 2 ** (len(config.block_out_channels) - 1)
    lines = []
    for path in sorted(folder.glob("*/*.onnx")):
        name = path.relative_to(folder).as_posix()
        least = copies if name == "unet/model.onnx" else 1
        unit = model.downsampling if path.parent.name == "vae_encoder" else 1
        sizes = {}
        for axis, side in zip(("height", "width"), latent_sides(config), strict=True):
            sides = [unit * max(step, round(side * factor / step) * step) for factor in _SIDE_FACTORS]
            sizes[axis] = sizes[f"latent_{axis}"] = sides
        sizes |= {"batch": [least, least, 4 * least], "sequence": [text_length(model.pipeline)] * 3}
        sizes["steps"] = [1, 4, max(4, *step_counts)]
        lines.append(trtexec_line(name, profiles_of(path, sizes)))
    return lines


def trtexec_line(graph: str, profiles: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Return the command that builds an engine of one graph.

    Args:
        graph: path of the graph, relative to the export folder.
        profiles: smallest, usual and largest shape of each input that varies; empty for a graph of fixed sizes.
    """
    line = f"trtexec --onnx={graph} --stronglyTyped"
    for i, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        if profiles:
            shapes = (f"{name}:{'x'.join(map(str, shape[i]))}" for name, shape in profiles.items())
            line += f" --{option}={','.join(shapes)}"
    return f"{line} --saveEngine={graph.removesuffix('.onnx')}.engine"


def profiles_of(path: Path, sizes: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
    """Return the smallest, usual and largest shape of each input of a graph that has a free dimension.

    Args:
        path: path of the graph.
        sizes: the three sizes of each named dimension.
    """
    profiles = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if any(isinstance(d, str) for d in dims):
            profiles[value.name] = [[sizes[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
    return profiles
