"""Define the options of the export, and refuse wrong ones before a model is loaded. Imports no torch."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from d2f_fast.config import (
    MAX_SHIFT,
    MAX_SIDE,
    PredictionType,
    check_number,
    check_options,
    check_positive,
    spell_out_flags,
)
from d2f_fast.errors import RefusedInputError
from d2f_fast.lora.source import LoraSource, check_lora_file, parse_lora
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
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
        model: Model to export: a hub id, the folder of a diffusers pipeline, a .safetensors file, or "miniature" for
            the model that comes with this package.
        lora: LoRA to merge into the model first, as PATH or PATH:SCALE; the scale is 1 if left out. PATH is the folder
            of a run or of a checkpoint-N, or a file in the format of peft, diffusers, kohya or LyCORIS. Repeat the
            option for several; without it, nothing is merged.
        vae: Hub id, folder or .safetensors file of an autoencoder to export in place of the model's own, for example
            the much smaller madebyollin/taesd. None exports the model's own.
        prediction_type: What the network predicts, in the words of diffusers. None takes it from the model's own files.
        rescale_betas_zero_snr: Whether the model was trained with zero terminal SNR; --no_rescale_betas_zero_snr states
            that it was not. None takes it from the model's own files.
        tokenizer_name_or_path: Folder with CLIP's vocab.json and merges.txt, for a model that is one .safetensors file.
            None takes the vocabulary from the installed package open_clip_torch.
        vae_custom_scale: Factor on the autoencoder's latents. None takes it from its configuration.
        vae_custom_shift: Number that is subtracted from the autoencoder's latents before the factor. None takes it from
            its configuration.
        vae_reflection_padding: Pad the autoencoder's convolutions by reflection, as fine-tunes for EQ-VAE need;
            --no_vae_reflection_padding pads with zeros. None takes it from the model or the LoRA.
        variant: Variant of the weight files of a folder or hub id, such as fp16. None takes the files without one.
        revision: Branch, tag or commit of a hub id. None takes the main branch.
    """

    model: str = MINIATURE
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    vae: str | None = None
    prediction_type: PredictionType | None = None
    rescale_betas_zero_snr: bool | None = None
    tokenizer_name_or_path: str | None = None
    vae_custom_scale: float | None = None
    vae_custom_shift: float | None = None
    vae_reflection_padding: bool | None = None
    variant: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Choose where the export goes and what is printed.

    Args:
        output: Folder to write. It appears only once every check has passed.
        overwrite: Replace an earlier export in the output folder. Without it, a folder with files is refused.
        keep_failed: If a check fails, keep the graphs in a folder named like the output with "-failed" appended.
            Without it, they are removed.
        json: Print the report, the run time in seconds and the peak memory in bytes as JSON instead of a table.
    """

    output: str = "d2f-onnx"
    overwrite: bool = False
    keep_failed: bool = False
    json: bool = False


@dataclass(frozen=True)
class GraphOptions:
    """Choose which graphs are written, in which shapes and precision.

    Args:
        components: Graphs to write, separated by commas; the default names all that there are. "text_encoder" includes
            the second text encoder of SDXL.
        precision: Number format in which the UNet and the text encoders hold their weights and compute. The autoencoder
            stays float32 unless its config.json has "force_upcast": false; so do inputs, outputs, and the times and
            coefficients of the steps in steps.json. bf16 also needs --skip_verify.
        target: Program that runs the graphs. "ort" (ONNX Runtime) writes opset 20. "tensorrt" writes opset 23, in which
            each normalisation and attention is one operator; no graph has been run with TensorRT yet.
        opset: Version of ONNX's set of operators. None takes the version of --target, or 23 for bf16.
        static: Fixed input size as BATCHxHEIGHTxWIDTH, in images and pixels, for example 1x512x512. None lets each run
            choose its own size.
    """

    components: str = ",".join(COMPONENTS)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    target: Literal["ort", "tensorrt"] = "ort"
    opset: Literal[20, 23] | None = None
    static: str | None = None


@dataclass(frozen=True)
class SamplerOptions:
    """Choose what the sampler graph does: all steps from noise to latents in one graph.

    Args:
        steps: Numbers of sampling steps that the sampler can take, separated by commas, each 1 to 1000.
        shift: Factor on the ratio of noise to image, (1 - t) / t, at each step, above 0; 1 turns it off. None takes the
            factor saved with the trained weights, or that of the model's flow-matching scheduler, or else 1.
        guidance: Build classifier-free guidance into the sampler, which doubles the network's batch.
        with_vae: Let the sampler also decode its latents, so that it returns an image.
        unroll: Also write unet/sampler_N.onnx, a sampler of this number N of steps, 1 to 50, without a loop: it holds N
            copies of the network's operators, which share its weights. It is for engines that run no loops. 0 writes
            none.
    """

    steps: str = "1,2,4,8"
    shift: float | None = None
    guidance: bool = True
    with_vae: bool = False
    unroll: int = 0


@dataclass(frozen=True)
class CheckOptions:
    """Choose how the graphs are checked against torch.

    Args:
        tolerance: Largest error of each graph, the autoencoder's included: RMS of the difference to torch in float32,
            divided by the RMS of torch's output, above 0 and below 1. A sampler may differ more, by a factor that
            export.json names. None allows 1e-5 for fp32 and 3e-3 for fp16.
        verify_only: Export nothing; compare the export in the output folder with the model again. Give --model, --lora,
            --vae and --tokenizer_name_or_path as for the export; all other options are read from it.
        skip_verify: Check that the graphs are valid, but do not run them. bf16 needs this, because ONNX Runtime cannot
            run bf16 graphs on a CPU.
    """

    tolerance: float | None = None
    verify_only: bool = False
    skip_verify: bool = False


@dataclass(frozen=True)
class _Groups:
    """Export a Stable Diffusion pipeline, aligned or not, to ONNX graphs that are checked against torch.

    Exit codes: 0 done, 1 a graph differs from torch, 2 refused input, 143 stopped by SIGTERM.
    """

    model: SourceOptions
    output: OutputOptions
    graphs: Annotated[GraphOptions, tyro.conf.arg(name="shapes and precision")]
    sampler: SamplerOptions
    check: CheckOptions


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
        check_positive("shift", self.shift, MAX_SHIFT)
        if self.verify_only and self.skip_verify:
            raise RefusedInputError("verify_only and skip_verify exclude each other: give only one of them")
        _ = self.step_counts, self.static_sizes
        for adapter in self.adapters:
            check_lora_file(adapter.path)

    def _check_components(self) -> None:
        unknown = [name for name in self.component_names if name not in COMPONENTS]
        if unknown or not self.component_names:
            raise RefusedInputError(
                f"components must be some of {', '.join(COMPONENTS)}, got {', '.join(unknown) or 'none'}"
            )
        if self.unroll < 0 or self.unroll > 50:
            raise RefusedInputError(f"unroll must be 0 to 50, got {self.unroll}: each step is a copy of the network")
        for option, is_given in {"with_vae": self.with_vae, "unroll": self.unroll > 0}.items():
            if is_given and "sampler" not in self.component_names:
                raise RefusedInputError(f"{option} changes the sampler only: add sampler to components")
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


def parse(arguments: list[str], program: str) -> ExportOptions:
    """Read the options from a command line.

    Args:
        arguments: words after the program's name.
        program: name that the help shows.

    Raises:
        RefusedInputError: the program has no such option.
        SystemExit: an option has a wrong type (code 2), or help was asked for (code 0).
    """
    refuse_unknown_options(arguments, program, [option.name for option in fields(ExportOptions)], _FOREIGN_OPTIONS)
    arguments = spell_out_flags(arguments, ["rescale_betas_zero_snr", "vae_reflection_padding"])
    groups = tyro.cli(_Groups, prog=program, args=arguments, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))
    held = [getattr(groups, group.name) for group in fields(groups)]
    return ExportOptions(**{option.name: getattr(group, option.name) for group in held for option in fields(group)})
