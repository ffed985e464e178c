"""`d2f sample`: draw pictures of prompts."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d2f_fast.config import (
    Method,
    PredictionType,
    Spacing,
    check_number,
    check_positive,
    check_seed,
)
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.by_name import MINIATURE, model_by_name
from d2f_fast.models.library_messages import silence_libraries


@dataclass(frozen=True)
class Sample:
    """Draw pictures of prompts along flow time, in any Stable Diffusion pipeline.

    Args:
        prompts: one picture each.
        model: hub id, pipeline folder, .safetensors file, or "miniature", the embedded model.
        lora: folder or file of LoRA weights.
        onnx: folder of export/to_onnx.py to draw with, by ONNX Runtime, in place of model and lora.
        onnx_provider: auto, cpu, cuda or tensorrt, for onnx; auto is cuda where there is one.
        num_inference_steps: network evaluations a picture; twice as many with midpoint and heun.
        guidance_scale: 1 is no guidance.
        negative_prompt: led away from.
        prediction_type: flow_prediction for a network trained on naive flow matching; None for what the file says.
        method: euler, midpoint or heun.
        flow_spacing: uniform in flow time, or trailing.
        shift: factor on the sampling sigmas; None for that of the training, or 1.
        height: pixels; None for the model's own.
        width: pixels; None for the model's own.
        seed: of the noise.
        output_dir: of the pictures.
        dry_run: print the resolved options and stop.
        json: print the result as JSON.
    """

    prompts: tuple[str, ...]
    model: str = MINIATURE
    lora: str | None = None
    onnx: str | None = None
    onnx_provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    num_inference_steps: int = 4
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    prediction_type: PredictionType | None = None
    method: Method = "euler"
    flow_spacing: Spacing = "uniform"
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    output_dir: str = "d2f-samples"
    dry_run: bool = False
    json: bool = False

    def run(self) -> dict[str, Any]:
        """Draw, write the pictures, and return where they are."""
        from d2f_fast.files.atomic import atomic_path, make_folder
        from d2f_fast.files.run_record import write_metrics

        if not self.prompts or not all(self.prompts):
            raise RefusedInputError("prompts: give at least one prompt, none of them empty")
        for name, least in (("num_inference_steps", 1), ("height", 8), ("width", 8)):
            check_number(name, getattr(self, name), least)
        check_seed(self.seed)
        check_positive("shift", self.shift)
        if not math.isfinite(self.guidance_scale):
            raise RefusedInputError(f"guidance_scale must be finite, got {self.guidance_scale}")
        output = Path(self.output_dir)
        if output.exists():
            make_folder(output)  # or refuse it, before the pictures are drawn
        started = time.monotonic()
        pictures = self._draw() if self.onnx is None else self._draw_with_onnx(self.onnx)
        make_folder(output)
        files = [str(output / f"{i:03d}.png") for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            with atomic_path(file) as temporary:
                picture.save(temporary)
        seconds = time.monotonic() - started
        row = {"sampler": "flow", "method": self.method, "steps": self.num_inference_steps, "samples": len(files)}
        write_metrics(output, "d2f sample", self.seed, seconds, [row])
        return row | {"files": files, "output": str(output)}

    def _draw(self) -> list[Any]:
        """Pictures by diffusers."""
        silence_libraries()
        import torch

        from d2f_fast.lora.merge import fuse_adapter
        from d2f_fast.models.load import load_pipeline
        from d2f_fast.sampling.generate import generate

        model = model_by_name(self.model)
        pipe = load_pipeline(model) if isinstance(model, str) else model
        if self.lora is not None:
            fuse_adapter(pipe, Path(self.lora), 1.0)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        return generate(
            pipe,
            self.prompts,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            generator=torch.Generator().manual_seed(self.seed),
            method=self.method,
            flow_spacing=self.flow_spacing,
            **self._of_training(),
        )

    def _of_training(self) -> dict[str, Any]:
        """Prediction type and shift: those given, else those that the LoRA file or the pipeline's folder tells."""
        from d2f_fast.files.json_file import read_json
        from d2f_fast.lora.read import lora_tags

        source = Path(self.model) / "d2f.json" if self.lora is None else Path(self.lora)
        tags = lora_tags(source) if self.lora is not None else read_json(source) if source.is_file() else {}
        chosen: dict[str, Any] = {"prediction_type": self.prediction_type, "shift": self.shift}
        try:
            if self.shift is None:
                chosen["shift"] = float(tags.get("d2f.shift", 1))
            # Any other type is that of the base, which has it in its own configuration.
            if self.prediction_type is None and tags.get("d2f.prediction_type") == "flow_prediction":
                chosen["prediction_type"] = "flow_prediction"
        except (AttributeError, TypeError, ValueError) as error:
            raise RefusedInputError(f"{source} tells no usable shift ({error}): give --shift") from error
        return {name: value for name, value in chosen.items() if value is not None}

    def _draw_with_onnx(self, folder: str) -> list[Any]:
        """Pictures by ONNX Runtime."""
        from d2f_fast.export.inference import OnnxPipeline
        from d2f_fast.export.sessions import PROVIDERS

        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in ("model", "lora", "prediction_type", "method", "flow_spacing", "shift"):
            if getattr(self, name) != defaults[name]:
                raise RefusedInputError(f"{name} was settled when {folder} was exported: leave it out, or export again")
        providers = None if self.onnx_provider == "auto" else PROVIDERS[self.onnx_provider]
        return OnnxPipeline(folder, providers=providers)(
            self.prompts,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            seed=self.seed,
        )
