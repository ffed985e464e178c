"""Options of the export, and the refusals that need no model. Imports no torch, so that `--help` is instant."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from d2f_fast.errors import RefusedInputError

MINIATURE = "miniature"
COMPONENTS = ("unet", "text_encoder", "vae_encoder", "vae_decoder", "sampler")
TOLERANCES = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class ExportOptions:
    """Export a Stable Diffusion pipeline, aligned or not, to ONNX graphs that were checked against torch.

    Args:
        model: hub id, pipeline folder, .safetensors file, or "miniature", the embedded model.
        lora: FILE_OR_FOLDER[:scale] of a peft or kohya LoRA to merge first; may be repeated.
        vae: hub id or folder of another autoencoder to export in place of the model's: madebyollin/taesd decodes in
            a fraction of the time, which at 4 steps is half of the whole.
        output: folder to make.
        components: of unet, text_encoder, vae_encoder, vae_decoder, sampler; separated by commas.
        precision: of the weights; inputs, outputs, times and step tables are float32 always. bf16 needs opset 23.
        target: ort for opset 20, tensorrt for opset 23, whose normalisations and attentions TensorRT fuses.
        opset: in place of the target's; of bf16 it is 23, as convolutions take bfloat16 from 22 on.
        steps: numbers of steps to make tables for, separated by commas.
        guidance: build classifier-free guidance into the sampler; without it half the batch.
        with_vae: let the sampler decode its latents to a picture.
        static: BATCHxHEIGHTxWIDTH in pixels, for graphs of one size; None for any size.
        unroll: also write the sampler with this many steps written out, for engines; 0 for none.
        tolerance: largest relative error of a network against torch in float32; None for 1e-5, 3e-3 (fp16).
        overwrite: replace an earlier export in the output folder.
        verify_only: check the export in the output folder against the model again, with the options that it was made
            with; model, lora and vae are to be given again.
        skip_verify: check that the graphs are valid, but do not run them; needed for bf16, which ONNX Runtime has no
            CPU kernels for.
        keep_failed: keep the folder of an export that failed its checks, under another name.
        json: print the report, the seconds and the peak memory as JSON.
    """

    model: str = MINIATURE
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    vae: str | None = None
    output: str = "d2f-onnx"
    components: str = ",".join(COMPONENTS)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    target: Literal["ort", "tensorrt"] = "ort"
    opset: Literal[20, 23] | None = None
    steps: str = "1,2,4,8"
    guidance: bool = True
    with_vae: bool = False
    static: str | None = None
    unroll: int = 0
    tolerance: float | None = None
    overwrite: bool = False
    verify_only: bool = False
    skip_verify: bool = False
    keep_failed: bool = False
    json: bool = False

    def check(self) -> None:
        """Refuse what no export could mean; not at construction, where tyro would put it into a box.

        Raises:
            RefusedInputError: an option is out of its range, or does not go with another.
        """
        unknown = [name for name in self.component_names if name not in COMPONENTS]
        if unknown or not self.component_names:
            raise RefusedInputError(
                f"components: {', '.join(unknown) or 'none'} unknown: choose of {', '.join(COMPONENTS)}"
            )
        if self.unroll < 0 or self.unroll > 50:
            raise RefusedInputError(f"unroll must be 0 to 50, got {self.unroll}: each step is a copy of the network")
        for option, needed in {"with_vae": self.with_vae, "unroll": self.unroll > 0}.items():
            if needed and "sampler" not in self.component_names:
                raise RefusedInputError(f"{option} is of the sampler: add it to components")
        if "sampler" in self.component_names and "unet" not in self.component_names:
            raise RefusedInputError("the sampler shares the weights of unet/: add unet to components")
        if self.with_vae and "vae_decoder" not in self.component_names:
            raise RefusedInputError("with_vae needs vae_decoder: add it to components")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise RefusedInputError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        if self.precision == "bf16" and not self.skip_verify:
            raise RefusedInputError(
                "bf16 graphs do not run on the ONNX Runtime CPU provider: use --precision fp16 or --skip_verify"
            )
        if self.precision == "bf16" and self.opset_version < 22:
            raise RefusedInputError(
                f"bf16 needs opset 23, got {self.opset}: before 22 ONNX has no convolution of bfloat16; leave opset out"
            )
        if self.verify_only and self.skip_verify:
            raise RefusedInputError("verify_only and skip_verify exclude each other")
        _ = self.step_counts, self.static_sizes, self.adapters

    @property
    def component_names(self) -> tuple[str, ...]:
        """The components asked for."""
        return tuple(name for name in self.components.replace(" ", "").split(",") if name)

    @property
    def opset_version(self) -> int:
        """The opset asked for, or that of the target and the precision."""
        return self.opset or (23 if self.target == "tensorrt" or self.precision == "bf16" else 20)

    @property
    def largest_error(self) -> float:
        """The tolerance asked for, or the precision's."""
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps, rising; the unrolled one among them."""
        words = [word for word in self.steps.replace(" ", "").split(",") if word]
        if not words or not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
            raise RefusedInputError(f"steps must be numbers from 1 to 1000 separated by commas, got {self.steps!r}")
        return tuple(sorted({int(word) for word in words} | ({self.unroll} if self.unroll else set())))

    @property
    def static_sizes(self) -> tuple[int, int, int] | None:
        """Batch, height and width in pixels, or None."""
        if self.static is None:
            return None
        found = re.fullmatch(r"(\d{1,4})x(\d{1,5})x(\d{1,5})", self.static)
        if found is None or int(found[1]) < 1:
            raise RefusedInputError(f"static must be BATCHxHEIGHTxWIDTH in pixels, as 1x512x512, got {self.static!r}")
        batch, height, width = (int(size) for size in found.groups())
        return batch, height, width

    @property
    def adapters(self) -> tuple[tuple[Path, float], ...]:
        """LoRA files with their scales."""
        found = []
        for entry in self.lora:
            path, _, scale = entry.rpartition(":")
            if path and re.fullmatch(r"[-+]?\d+(\.\d*)?|[-+]?\.\d+", scale):
                found.append((Path(path), float(scale)))
            else:
                found.append((Path(entry), 1.0))
        return tuple(found)
