"""Define the options of the export, and refuse wrong ones before a model is loaded. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from d2f_fast.config import (
    MAX_SHIFT,
    MAX_SIDE,
    PredictionType,
    check_number,
    check_options,
    finite,
    option,
    positive,
)
from d2f_fast.errors import RefusedInputError
from d2f_fast.lora.source import LoraSource, check_lora_file, parse_lora
from d2f_fast.lora.tags import common_tags
from d2f_fast.models.configs import read_configs
from d2f_fast.models.layers import check_lora_fits
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import check_sampling_tags
from d2f_fast.option_help import options_of, parse_groups
from d2f_fast.unknown_options import refuse_unknown_options

COMPONENTS = ("unet", "text_encoder", "vae_encoder", "vae_decoder", "sampler")
# Options of optimum's exporter and of diffusers' conversion scripts, each with what to do in its place.
_FOREIGN_OPTIONS = {
    "model_path": "give --model",
    "model_name_or_path": "give --model",
    "pretrained_model_name_or_path": "give --model",
    "output_path": "give --output",
    "output_dir": "give --output",
    "lora_scale": "give the scale with the file, as --lora FILE:0.8",
    "fp16": "give --precision fp16",
    "dtype": "give --precision",
    "atol": "give --tolerance",
    "task": "a pipeline is read from its folder: leave it out",
    "device": "the export runs on the CPU: leave it out",
    "batch_size": "give --static BATCHxHEIGHTxWIDTH to fix the sizes",
    "no_dynamic_axes": "give --static BATCHxHEIGHTxWIDTH to fix the sizes",
}
# Options of the base model that export.json keeps: those that are no path.
MODEL_OPTIONS = (
    *("prediction_type", "rescale_betas_zero_snr", "vae_custom_scale", "vae_custom_shift", "vae_reflection_padding"),
    *("variant", "revision"),
)
TOLERANCES = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class SourceOptions:
    """Choose what is exported.

    Args:
        model: Model to export: a Hugging Face id, a diffusers pipeline folder, or one .safetensors file. "miniature" is
            the tiny model of 32-pixel emoji inside this package.
        lora: LoRA to merge into the model first, as PATH or PATH:SCALE, where 1 is the usual scale. PATH is the folder
            of a run or of its checkpoint-N, or a .safetensors file in the format of diffusers, peft, kohya or LyCORIS.
            Repeat the option for several. Default: none.
        vae: Autoencoder (VAE) to export in place of the model's own: a Hugging Face id, a folder, or one .safetensors
            file, for example the much smaller madebyollin/taesd. It is --pretrained_vae_model_name_or_path of d2f.
            Default: the model's own.
        prediction_type: What the network predicts, as for `d2f sample`. Default: read from the model's files.
        rescale_betas_zero_snr: The model was trained with zero terminal SNR, so that its last timestep is pure noise;
            --no_rescale_betas_zero_snr says that it was not. Default: read from the model's files.
        tokenizer_name_or_path: Folder with CLIP's vocab.json and merges.txt, for a model that is one .safetensors file.
            Default: the vocabulary in the Python package open_clip_torch, which must then be installed.
        vae_custom_scale: Factor on the latents, the scaling_factor of the autoencoder. Default: that of its
            configuration.
        vae_custom_shift: Number that is subtracted from the latents before that factor. Default: that of the
            autoencoder's configuration, or 0.
        vae_reflection_padding: Pad the autoencoder's convolutions by reflection, for an autoencoder that was trained
            so; --no_vae_reflection_padding pads with zeros. Default: what the files of the model or the LoRA say, or
            zeros.
        variant: Variant of the weight files in a folder or under a Hugging Face id, such as fp16. Default: files
            without a variant.
        revision: Branch, tag or commit of a Hugging Face id. Default: the main branch.
    """

    model: str = option(None, MINIATURE, metavar="MODEL")
    lora: tuple[str, ...] = field(default=(), metadata={"repeated": True, "metavar": "PATH[:SCALE]"})
    vae: str | None = option(None, None, metavar="VAE")
    prediction_type: PredictionType | None = None
    rescale_betas_zero_snr: bool | None = None
    tokenizer_name_or_path: str | None = option(None, None, metavar="FOLDER")
    vae_custom_scale: float | None = option(None, None, positive(1000.0))
    vae_custom_shift: float | None = option(None, None, finite(1000.0))
    vae_reflection_padding: bool | None = None
    variant: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Choose where the export goes and what is printed.

    Args:
        output: Folder to write. It appears when the graphs have passed their checks.
        overwrite: Replace an earlier export in the output folder. A folder with files is an error otherwise.
        keep_failed: If a check fails, keep the graphs in a folder named like the output with "-failed" at its end. They
            are deleted otherwise.
        json: Print the report, the run time in seconds and the peak memory in bytes as JSON, in place of a table.
    """

    output: str = option(None, "d2f-onnx", metavar="FOLDER")
    overwrite: bool = False
    keep_failed: bool = False
    json: bool = False


@dataclass(frozen=True)
class GraphOptions:
    """Choose which graphs are written, in which shapes and precision.

    Args:
        components: Graphs to write, separated by commas. "sampler" is all sampling steps in one graph; it uses the
            weights of "unet" and needs it. "text_encoder" includes the second text encoder of SDXL.
        precision: Number format in which the UNet and the text encoders hold their weights and compute. Inputs and
            outputs are float32. So is the autoencoder, unless its config.json says "force_upcast": false. "bf16" needs
            --skip_verify.
        target: Program that runs the graphs: "ort" is ONNX Runtime. For "tensorrt", each normalisation and each
            attention is one operator; no graph has been run with TensorRT yet.
        opset: Version of ONNX's set of operators. Default: 20 for "ort", 23 for "tensorrt" and for bf16.
        static: Fixed input size as BATCHxHEIGHTxWIDTH, in images and pixels, such as 1x512x512; height and width are
            multiples of 8, at most 16384. Default: each run chooses its size.
    """

    components: str = option(None, ",".join(COMPONENTS), metavar="NAME,...")
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    target: Literal["ort", "tensorrt"] = "ort"
    opset: Literal[20, 23] | None = None
    static: str | None = option(None, None, metavar="BxHxW")


@dataclass(frozen=True)
class SamplerOptions:
    """Choose what the sampler graph does: all Euler steps from noise to latents in one graph.

    Args:
        steps: Numbers of sampling steps (Euler's method) that the sampler can take, separated by commas, each from 1 to
            1000.
        shift: Factor on the ratio of noise to image, (1 - t) / t, at each step; 1 changes nothing. Default: the one
            saved with the LoRA or model, or that of the model's own flow-matching scheduler, or 1.
        guidance: Build classifier-free guidance into the sampler, which doubles the network's batch. Its strength is an
            input of the graph. A Marigold model has no prompt, and so no guidance.
        image_guidance: Build guidance by the image into the sampler, too, for a model such as InstructPix2Pix, which
            triples the network's batch.
        with_vae: Let the sampler also decode its latents, so that it returns an image.
        unroll: Also write unet/sampler_N.onnx, a sampler of N steps, at most 50, without a loop, for programs that run
            no loops. It holds N copies of the network's operators, which share its weights. 0 writes none.
    """

    steps: str = option(None, "1,2,4,8", metavar="N,...")
    shift: float | None = option(None, None, positive(MAX_SHIFT))
    guidance: bool = True
    image_guidance: bool = False
    with_vae: bool = False
    unroll: int = option(None, 0, metavar="N")


@dataclass(frozen=True)
class CheckOptions:
    """Choose how the graphs are checked against torch.

    Args:
        tolerance: Largest error of each graph: RMS of the difference to torch in float32, divided by the RMS of torch's
            output, above 0 and below 1. A sampler may differ more, because errors grow over its steps; export.json has
            the factor. Default: 1e-5 for fp32, 3e-3 for fp16.
        verify_only: Export nothing, and compare the export in the output folder with the model again. Give --model,
            --lora, --vae and --tokenizer_name_or_path as for the export; it holds all other options.
        skip_verify: Check that the graphs are valid, but do not run them. bf16 needs this, because ONNX Runtime does
            not run bf16 graphs on a CPU.
    """

    tolerance: float | None = None
    verify_only: bool = False
    skip_verify: bool = False


class _Program:
    """Export a Stable Diffusion pipeline to ONNX graphs, which are then compared with torch.

    Without --model the miniature is exported, a tiny model inside this package. The export runs on the CPU.
    docs/deploy.md shows how to run the graphs.

    Exit codes: 0 done, 1 a graph differs from torch, 2 an option or a file cannot be used, 143 stopped by SIGTERM.

    Examples:
        python export/to_onnx.py --output d2f-onnx
        python export/to_onnx.py --model MODEL --lora run:0.8 --precision fp16 --output out
        python export/to_onnx.py --model MODEL --output out --verify_only
    """


# Groups of the options in the help, by their titles.
_GROUPS: Mapping[str | None, type] = {
    "source": SourceOptions,
    "output": OutputOptions,
    "shapes and precision": GraphOptions,
    "sampler": SamplerOptions,
    "check": CheckOptions,
}


@dataclass(frozen=True)
class ExportOptions(CheckOptions, SamplerOptions, GraphOptions, OutputOptions, SourceOptions):
    """Hold the options of all groups side by side. Construction accepts any value; `check` refuses wrong ones."""

    def check(self) -> None:
        """Refuse options that no export can follow.

        This is not done at construction, where tyro would print the refusal as several lines in a box.

        Raises:
            RefusedInputError: an option is out of its range, or does not go with another.
        """
        self._check_components()
        self._check_precision()
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise RefusedInputError(f"tolerance must be above 0 and below 1, got {self.tolerance}")
        check_options(self)
        if self.verify_only and self.skip_verify:
            raise RefusedInputError("verify_only and skip_verify exclude each other: give only one of them")
        _ = self.step_counts, self.static_sizes
        for adapter in self.adapters:
            check_lora_file(adapter.path)

    def check_files(self) -> None:
        """Refuse a model and LoRA whose names, configurations and headers show that they cannot be exported.

        Raises:
            RefusedInputError: a file is missing or cannot be used, or two LoRA contradict each other.
        """
        configs = read_configs(self.model, self.model_options)
        common_tags([adapter.path for adapter in self.adapters], self.shift)
        check_sampling_tags(self.model, self.lora, self.model_options, self.shift)
        check_lora_fits(self.lora, self.model, self.model_options)
        if configs is not None and "sampler" in self.component_names:
            check_sampler_network(configs.unet.get("in_channels", 4), configs.unet.get("out_channels", 4))

    def _check_components(self) -> None:
        unknown = [name for name in self.component_names if name not in COMPONENTS]
        if unknown or not self.component_names:
            raise RefusedInputError(
                f"components must be some of {', '.join(COMPONENTS)}, got {', '.join(unknown) or 'none'}"
            )
        if self.unroll < 0 or self.unroll > 50:
            raise RefusedInputError(f"unroll must be 0 to 50, got {self.unroll}: each step is a copy of the network")
        of_sampler = {"with_vae": self.with_vae, "unroll": self.unroll > 0, "image_guidance": self.image_guidance}
        for name, is_given in of_sampler.items():
            if is_given and "sampler" not in self.component_names:
                raise RefusedInputError(f"{name} changes the sampler only: add sampler to components")
        if self.image_guidance and not self.guidance:
            raise RefusedInputError("image_guidance needs guidance by text, too: leave no_guidance out")
        if "sampler" in self.component_names and "unet" not in self.component_names:
            raise RefusedInputError("the sampler uses the weights in unet/: add unet to components")
        if self.with_vae and "vae_decoder" not in self.component_names:
            raise RefusedInputError("with_vae needs vae_decoder: add vae_decoder to components")

    def _check_precision(self) -> None:
        if self.precision == "bf16" and not self.skip_verify:
            raise RefusedInputError(
                "bf16 graphs do not run on ONNX Runtime's CPU provider: use --precision fp16 or --skip_verify"
            )
        if self.precision == "bf16" and self.opset_version < 22:
            raise RefusedInputError(
                f"bf16 needs opset 23, got {self.opset}: ONNX has no bfloat16 convolution before 22; leave opset out"
            )

    @property
    def component_names(self) -> tuple[str, ...]:
        """Return the names in `components`."""
        return tuple(name for name in self.components.replace(" ", "").split(",") if name)

    @property
    def opset_version(self) -> int:
        """Return `opset`, or the opset of the target and the precision where it is None."""
        return self.opset or (23 if self.target == "tensorrt" or self.precision == "bf16" else 20)

    @property
    def largest_error(self) -> float:
        """Return `tolerance`, or the tolerance of the precision where it is None."""
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Return the numbers of steps in rising order, that of `unroll` included."""
        words = [word for word in self.steps.replace(" ", "").split(",") if word]
        if not words or not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
            raise RefusedInputError(f"steps must be numbers from 1 to 1000 separated by commas, got {self.steps!r}")
        return tuple(sorted({int(word) for word in words} | ({self.unroll} if self.unroll else set())))

    @property
    def static_sizes(self) -> tuple[int, int, int] | None:
        """Return the batch, and the height and width in pixels, of a static export; None where each run chooses."""
        if self.static is None:
            return None
        found = re.fullmatch(r"(\d{1,4})x(\d{1,5})x(\d{1,5})", self.static)
        if found is None or int(found[1]) < 1:
            raise RefusedInputError(
                f"static must be BATCHxHEIGHTxWIDTH in pixels, for example 1x512x512, got {self.static!r}"
            )
        batch, height, width = (int(size) for size in found.groups())
        check_number("static", max(height, width), 1, MAX_SIDE)
        return batch, height, width

    @property
    def model_options(self) -> ModelOptions:
        """Return the options of the base model that training and sampling have, too."""
        given = {field.name: getattr(self, field.name) for field in fields(ModelOptions) if hasattr(self, field.name)}
        return ModelOptions(**given, pretrained_vae_model_name_or_path=self.vae)

    @property
    def adapters(self) -> tuple[LoraSource, ...]:
        """Return the path and the scale of each LoRA."""
        return tuple(map(parse_lora, self.lora))


def check_sampler_network(in_channels: int, out_channels: int) -> None:
    """Refuse a network whose inputs the sampler graph does not have.

    Args:
        in_channels: number of channels that the network takes.
        out_channels: number of channels that it returns.

    Raises:
        RefusedInputError: it takes other channels than those of its own latents and of whole images.
    """
    if in_channels % out_channels:
        raise RefusedInputError(
            f"the network takes {in_channels} channels and returns {out_channels} (inpainting), and the sampler graph"
            " has no mask to condition on: leave sampler out of components"
        )


def check_steps_of_jump(options: ExportOptions) -> None:
    """Refuse an export that could not take the single step of a model that was trained to jump from zeros.

    Args:
        options: options of the export.

    Raises:
        RefusedInputError: there is no table for one step, or the unrolled sampler takes several.
    """
    if 1 not in options.step_counts or options.unroll > 1:
        raise RefusedInputError(
            f"{options.model} was trained to jump from zeros in one step: steps must hold 1 and unroll be 0"
            f" or 1, got steps {options.steps} and unroll {options.unroll}"
        )


def parse(arguments: list[str], program: str) -> ExportOptions:
    """Read the options from a command line.

    Args:
        arguments: words after the program's name.
        program: name that the help shows.

    Raises:
        RefusedInputError: the program has no such option.
        SystemExit: an option has a wrong type (code 2), or help was asked for (code 0).
    """
    names = [each.name for each in fields(ExportOptions)]
    refuse_unknown_options(arguments, program, names, _FOREIGN_OPTIONS)
    groups = {title: list(options_of(group)) for title, group in _GROUPS.items()}
    values = parse_groups(_Program, groups, arguments, program, given={})
    return ExportOptions(**{name: values[name] for name in names})
