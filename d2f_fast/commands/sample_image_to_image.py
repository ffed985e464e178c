"""`d2f sample --task image_to_image`: change images with a flow that starts from them."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.checks import check_lora_and_output, say_sampling
from d2f_fast.commands.sample import earlier_rows
from d2f_fast.commands.sample_files import find_images, png_entries
from d2f_fast.config import (
    MAX_SAMPLING_STEPS,
    MAX_SHIFT,
    MAX_SIDE,
    SamplingMethod,
    Spacing,
    at_least,
    check_guidance,
    check_options,
    check_seed,
    option,
    positive,
)
from d2f_fast.errors import DatasetError, ModelError, RefusedInputError, printable
from d2f_fast.files.lock import locked_folder
from d2f_fast.image_sizes import side_multiple
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import CAPTIONS, SOURCE_NOISE, common_tags, starts_from_image
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import chosen_steps, lowest_guidance, saved_tags, tags_source
from d2f_fast.sampling.options import (
    ChosenSteps,
    check_negative_prompt,
    check_steps,
    chosen_guidance,
    guidance_or_default,
    image_size,
)
from d2f_fast.sampling.solver_options import SolverOptions, check_method_of_source

if TYPE_CHECKING:
    from PIL.Image import Image

    from d2f_fast.models.base_model import BaseModel
    from d2f_fast.models.solve import Sampling


@dataclass(frozen=True)
class SampleImageToImage:
    """Change images with a model of `d2f train --task image_to_image`, whose flow starts from them.

    Required: --image, and --lora or --model. It runs in float32 on an NVIDIA GPU, or else on the CPU.

    Args:
        image: One or more image files, or folders of images.
        prompts: One prompt for all images, or one for each, where the model was trained with captions. Default: the
            empty prompt.
        model: Model that the LoRA was trained on, or the folder `pipeline` of a run: a Hugging Face id, a diffusers
            pipeline folder, or one .safetensors file. "miniature" is the tiny model inside this package.
        lora: LoRA of `d2f train --task image_to_image` that are merged into the model, each as PATH or PATH:SCALE.
            Default: none.
        output_dir: Folder for the result of each image as NAME.png, and for metrics.json. It is an error if a NAME.png
            exists.
        num_inference_steps: Number of sampling steps, each of which evaluates the network as in `d2f sample`. Default:
            the number saved with the LoRA or the model, which is 4 after `d2f train`.
        guidance_scale: Strength of classifier-free guidance by the prompt. 1 and 0 turn it off. Default: the value
            saved with the LoRA or the model, which is 1 after `d2f train`.
        source_noise: Share of noise in the start of the flow, see `d2f train --help`. Another value than that of the
            training gives the model what it has not learned. Default: the value saved with the LoRA or the model.
        seed: Seed of the noise. Every image starts with the same noise, so that its result does not depend on the other
            images.
        task: What the model does: "image_to_image", which these options belong to.
        model_options: Options of the base model.
        negative_prompt: Prompt to steer away from, the same for all images. It needs a guidance scale above 1. Default:
            none.
        method: Integration method; see `d2f sample --help`. Those that add noise, euler_maruyama and stochastic_heun,
            are an error, because they are for a flow that starts from noise.
        solver_options: Options of solvers and guidance.
        flow_spacing: Spacing of the steps; see `d2f sample --help`.
        shift: Factor on (1 - t) / t at each step. Values above 1 spend more steps near the source; 1 changes nothing.
            Default: the value saved with the LoRA or the model, or else 1.
        height: Height of the results in pixels, a multiple of 8; images are resized and cropped in the middle. Default:
            that of each image, cropped to a multiple of 8.
        width: Width of the results in pixels, a multiple of 8. Default: that of each image, cropped to a multiple of 8.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (steps, number and paths of the images) as one line of JSON, in place of the path of the
            folder.

    Examples:
        d2f sample --task image_to_image --model MODEL --lora run --image blurred.png
        d2f sample --task image_to_image --model run/pipeline --image photos --num_inference_steps 2
    """

    image: tuple[str, ...] = field(metadata={"group": "essential", "metavar": "PATH"})
    prompts: tuple[str, ...] = option("essential", ())
    model: str = option("essential", MINIATURE, metavar="MODEL")
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    output_dir: str = option("essential", "d2f-images", metavar="FOLDER")
    num_inference_steps: int | None = option("essential", None, at_least(1, MAX_SAMPLING_STEPS))
    guidance_scale: float | None = option("essential", None, check_guidance)
    source_noise: float | None = option("essential", None, at_least(0, 1.0))
    seed: int = option("essential", 0, check_seed)
    task: Literal["image_to_image"] = option("essential", "image_to_image")
    model_options: ModelOptions = field(default_factory=ModelOptions)
    negative_prompt: str = option("image", "")
    method: SamplingMethod = option("sampling", "euler")
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    flow_spacing: Spacing = option("sampling", "uniform")
    shift: float | None = option("sampling", None, positive(MAX_SHIFT))
    height: int | None = option("image", None, at_least(8, MAX_SIDE))
    width: int | None = option("image", None, at_least(8, MAX_SIDE))
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the sampling, what would be refused after them.

        Raises:
            RefusedInputError: An option, an image, the model, the LoRA file or the output folder cannot be used.
        """
        from d2f_fast.data.image_headers import stored_size
        from d2f_fast.models.configs import check_seen_images, downsampling_of, local_name, read_configs

        check_options(self)
        files, output = find_images(self.image), Path(self.output_dir)
        if len(self.prompts) not in (0, 1, len(files)):
            raise RefusedInputError(
                f"prompts: give one, or one for each of the {len(files)} images, got {len(self.prompts)}"
            )
        sizes = {path: stored_size(path) for path in files}  # A damaged file is refused before others are changed.
        for path in files:
            if (existing := output / f"{path.stem}.png").exists():
                raise RefusedInputError(f"{printable(existing)} exists: choose another output_dir, or move it away")
        if (self.height is None) != (self.width is None):
            raise RefusedInputError("height and width must be given together: add the other one, or leave both out")
        source = local_name(self.model, self.model_options)
        if source is not None or self.lora:
            _tags_and_noise(source or self.model, self.lora, self.source_noise)
        saved = lowest_guidance(source or self.model, [parse_lora(entry).path for entry in self.lora])
        guidance_scale = guidance_or_default(self.guidance_scale, saved)
        check_negative_prompt(self.negative_prompt, guidance_scale)
        check_method_of_source(self.method)
        self.solver_options.check(self.method, guidance_scale)
        check_lora_and_output(
            *(self.lora, self.output_dir, self.shift),
            model=self.model,
            options=self.model_options,
            starts_from_image=True,
        )
        if (configs := read_configs(self.model, self.model_options)) is not None:
            check_seen_images(self.model, configs, "give a text-to-image model", 0)
            downsampling = downsampling_of(configs.vae)
            image_size(self.height, self.width, configs.unet.get("sample_size"), downsampling)
            for path, size in sizes.items() if self.height is None else ():
                _multiples(*size, side_multiple(downsampling), path)
        check_steps(self.method, self._steps_of(self.model).number)

    def run(self) -> dict[str, Any]:
        """Change the images, write the results, and return what was written.

        Raises:
            RefusedInputError: An option, an image, the model, the LoRA file or the output folder cannot be used.
        """
        self.check()
        output = Path(self.output_dir)
        with locked_folder(output):
            return self._change(output, earlier_rows(output))

    def _steps_of(self, model: str) -> ChosenSteps:
        """Return the number of sampling steps of a model."""
        return chosen_steps(self.num_inference_steps, model, [parse_lora(entry).path for entry in self.lora])

    def _change(self, output: Path, earlier: list[Any]) -> dict[str, Any]:
        """Change the images, and write into a folder that no other command uses."""
        started = time.monotonic()
        silence_libraries()
        from d2f_fast.files.atomic import atomic_path
        from d2f_fast.files.run_record import write_run_record
        from d2f_fast.sampling.png_text import png_text

        files = find_images(self.image)
        model, sampling, taken = self._load()
        source_noise = taken["source_noise"]
        prompts = list(self.prompts) * (len(files) if len(self.prompts) == 1 else 1) or [""] * len(files)
        row = self._row(taken) | {"samples": len(files)}
        written: list[Path] = []
        for position, (file, prompt) in enumerate(zip(files, prompts, strict=True)):
            image = self._changed(model, file, prompt, sampling, source_noise)
            entries = png_entries(row | {"height": image.height, "width": image.width}, position)
            with atomic_path(path := output / f"{file.stem}.png") as temporary:
                image.save(temporary, format="PNG", pnginfo=png_text(prompt, self.negative_prompt, entries))
            written.append(path)
        rows = [*earlier, row | {"files": [path.name for path in written]}]
        write_run_record(output, "d2f sample", self.seed, time.monotonic() - started, rows)
        return row | {"files": [str(path) for path in written], "output": str(output)}

    def _load(self) -> "tuple[BaseModel, Sampling, dict[str, Any]]":
        """Return the model with its LoRA, how it is sampled, and what the files said about that."""
        import torch

        from d2f_fast.commands.load_model import load_with_lora
        from d2f_fast.models.base_model import BaseModel
        from d2f_fast.models.solve import Sampling

        loaded = load_with_lora(self.model, self.lora, self.model_options, self.shift, from_image=True)
        print(f"d2f: Model {printable(self.model)}: {loaded.facts}", file=sys.stderr)
        tags, source_noise = _tags_and_noise(loaded.source, self.lora, self.source_noise)
        steps = self._steps_of(loaded.source)
        guidance = chosen_guidance(self.guidance_scale, loaded.guidance_scale)
        say_sampling(steps, guidance)
        if tags.get(CAPTIONS) == "true" and not self.prompts:
            print("d2f: the model was trained with captions: describe the result with --prompts", file=sys.stderr)
        model = BaseModel(loaded.pipeline, self.model_options, loaded.facts)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        sampling = Sampling(
            self.method,
            self.solver_options,
            steps.number,
            guidance.scale,
            self.negative_prompt,
            flow_spacing=self.flow_spacing,
            scheduler_options=loaded.scheduler_options,
        )
        shift = float(loaded.flow_scheduler(self.flow_spacing).config["shift"])
        taken = {"steps": steps.number, "shift": shift, "guidance_scale": guidance.scale, "source_noise": source_noise}
        return model, sampling, {**loaded.scheduler_options, **taken}

    def _changed(
        self, model: "BaseModel", file: Path, prompt: str, sampling: "Sampling", source_noise: float
    ) -> "Image":
        """Return the result of one image."""
        import torch

        from d2f_fast.data.images import read_image, to_rgb
        from d2f_fast.data.loading import refused_sample
        from d2f_fast.models.solve import generate_images
        from d2f_fast.models.source_start import start_of_flow

        with refused_sample(printable(file)):
            image = to_rgb(read_image(file))
        if self.height is None or self.width is None:
            image = _cropped(image, side_multiple(model.downsampling), file)
        size = self.height or image.height, self.width or image.width
        generator = torch.Generator().manual_seed(self.seed)
        start = start_of_flow(model, [image], *size, source_noise, generator)
        of_size = dataclasses.replace(sampling, height=size[0], width=size[1])
        return generate_images(model, [prompt], of_size, generator, start)[0]

    def _row(self, taken: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the images were changed, as metrics.json records it."""
        found = {
            "task": "image_to_image",
            "sampler": "flow",
            "method": self.method,
            "flow_spacing": self.flow_spacing,
            "steps": taken["steps"],
            **{name: taken.get(name) for name in ("shift", "prediction_type", "fm_form", "guidance_scale")},
            **self.solver_options.given(),
            "source_noise": taken["source_noise"],
            "seed": self.seed,
            "model": self.model,
            "lora": list(self.lora),
            "prompts": list(self.prompts),
            "negative_prompt": self.negative_prompt,
        }
        return {name: value for name, value in found.items() if value is not None}


def _tags_and_noise(model: str, lora: Sequence[str], given: float | None) -> tuple[dict[str, str], float]:
    """Return the tags of a model with LoRA, and the share of noise at its start: that given, or else that of the tags.

    Args:
        model: The model; of a hub id its folder, which has the tags.
        lora: LoRA as PATH or PATH:SCALE, whose tags replace those of the model.
        given: Share that was given; None for none.

    Raises:
        ModelError: It was not trained to start from images, or its share of noise cannot be used.
    """
    tags = saved_tags(model) | common_tags([parse_lora(entry).path for entry in lora], 1.0)
    source = printable(", ".join(lora) or tags_source(model))
    if not starts_from_image(tags):
        raise ModelError(
            f"{source} does not say that its flow starts from an image: give the result of d2f train --task"
            " image_to_image, a LoRA with --lora or a folder pipeline with --model"
        )
    try:
        share = float(tags[SOURCE_NOISE]) if given is None else given
    except (KeyError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        got = printable(tags.get(SOURCE_NOISE, "none, or several")[:100])
        raise ModelError(f"{source}: {SOURCE_NOISE} must be in [0, 1], got {got}: give --source_noise")
    return tags, share


def _cropped(image: "Image", multiple: int, file: Path) -> "Image":
    """Return the middle of an image, whose sides are the largest multiples of a number of pixels."""
    width, height = _multiples(image.width, image.height, multiple, file)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _multiples(width: int, height: int, multiple: int, file: Path) -> tuple[int, int]:
    """Return the largest multiples of a number of pixels in the width and the height of an image.

    Raises:
        DatasetError: A side is smaller than that number.
    """
    if min(width, height) < multiple:
        raise DatasetError(
            f"{printable(file)}: {width}x{height} pixels are too small: each side needs {multiple} or more"
        )
    return width // multiple * multiple, height // multiple * multiple
