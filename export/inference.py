"""Generate images with an export folder, using onnxruntime, numpy, tokenizers and Pillow. Imports no torch.

pipeline = OnnxPipeline("d2f-onnx")
images = pipeline(["an owl on a blue background"], steps=4, guidance_scale=3.0)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from d2f_fast.config import check_guidance
from d2f_fast.errors import RefusedInputError
from d2f_fast.export.exported_files import TABLE_INPUTS, steps_of_report
from d2f_fast.export.exported_pipeline import ExportedPipeline
from d2f_fast.export.graph_sampler import Conditions, Form
from d2f_fast.export.sessions import Array, Provider
from d2f_fast.sampling.options import (
    ChosenSteps,
    check_image_guidance,
    check_negative_prompt,
    guidance_or_default,
)


class OnnxPipeline(ExportedPipeline):
    """A text-to-image pipeline made of exported graphs, whose network may see an image, too.

    Args:
        folder, form, providers, threads: as for `ExportedPipeline`.

    Raises:
        RefusedInputError: the folder is not an export or is damaged, has no such form, or a provider does not load.
    """

    def __init__(
        self, folder: str | Path, form: Form = "loop", providers: Sequence[Provider] | None = None, threads: int = 0
    ) -> None:
        super().__init__(folder, form, providers, threads)
        if self.is_depth:
            raise RefusedInputError(f"{self.folder} predicts depth and takes no prompts: use OnnxDepthPipeline")

    @property
    def recommended_guidance(self) -> float | None:
        """Return the guidance scale that was saved with the model or LoRA; None for no recommendation."""
        found = self.report.get("recommended_guidance")
        check_guidance(f"{self.folder}: recommended_guidance", found)
        return found

    @property
    def default_steps(self) -> ChosenSteps:
        """Return the number of steps that is taken where none is given, and where it comes from."""
        if self.form == "unrolled":
            return ChosenSteps(self.report["unroll"], "as exported with --unroll")
        return steps_of_report(self.folder, self.report)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        noise: Array | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        image_guidance_scale: float = 1.0,
    ) -> list[Image.Image]:
        """Generate one image per prompt.

        Args:
            prompts: one text or several; a static export takes exactly its batch.
            steps: number of network evaluations; the export must have a table for it. None takes the number saved with
                the model or LoRA, or else 4; in the unrolled form, the number that it was exported with.
            guidance_scale: strength of classifier-free guidance; None takes the one saved with the model or LoRA, or
                else 3. 1 and 0 turn it off, which halves the work, and other values below 1 are refused. The Loop
                always evaluates both halves, so without guidance the network is run step by step, as in the folder
                form; graphs of a static or unrolled export evaluate both halves even then. An export without guidance
                takes only 1 and 0.
            negative_prompt: text to steer away from, with a guidance_scale above 1; empty for none.
            height: height in pixels; None for the model's own, or the export's where it is static.
            width: width in pixels; None likewise.
            seed: seed of the noise, 0 or above; torch's generator of the CPU samples the same noise with it.
            noise: standard normal noise [B, C, H / f, W / f] float32 to use in place of the seed's; None for the
                seed's.
            image: image to start from, resized to height and width; None to start from noise alone. A network that sees
                an image, such as InstructPix2Pix's, starts from noise and sees this one, cropped in the middle, or one
                of several for each prompt.
            strength: how much of `image` changes, above 0 and at most 1; the first 1 - strength of the steps are left
                out. None means 0.8. It needs `image`, and a network that sees none.
            image_guidance_scale: strength of the guidance by the image that the network sees, at least 1, which turns
                it off. Above 1 it needs --image_guidance at the export, or the form "folder".

        Raises:
            RefusedInputError: the export cannot serve a size, a number of steps or another argument.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        guidance_scale = guidance_or_default(guidance_scale, self.recommended_guidance)
        self._check_call(prompts, seed, image, strength)
        check_guidance("guidance_scale", guidance_scale)
        check_image_guidance("image_guidance_scale", image_guidance_scale)
        if image_guidance_scale > 1 and not self.sees_image:
            raise RefusedInputError(f"the network of {self.folder} sees no image: leave image_guidance_scale out")
        copies = self._sampler.copies(guidance_scale, image_guidance_scale)
        check_negative_prompt(negative_prompt, max(guidance_scale, image_guidance_scale))
        steps = self.default_steps.number if steps is None else steps
        table = self._table(steps)
        height, width = self._size(height, width)
        state, first_step, seen = self._noise((len(prompts), height, width), seed, noise), 0, None
        if image is not None and self.sees_image:
            each = [image] * len(prompts) if isinstance(image, Image.Image) else image
            fitted = [ImageOps.fit(one.convert("RGB"), (width, height), Image.Resampling.LANCZOS) for one in each]
            seen = np.concatenate([self.encode_context(one) for one in fitted]).astype(np.float32)
        elif isinstance(image, Image.Image):
            start = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            first_step = steps - max(1, round(steps * (0.8 if strength is None else strength)))
            weights = table["alphas"][first_step], table["noise_scales"][first_step]
            state = (weights[0] * self.encode_image(start) + weights[1] * state).astype(np.float32)
        negative = None
        if copies > 1:
            negative = self.encode_prompts([negative_prompt] * len(prompts), height, width, negative=True)
        # A scale of 0 is the prompt alone too, which 1 gives in every graph.
        scales = max(guidance_scale, 1.0), image_guidance_scale
        condition = self.encode_prompts(prompts, height, width)
        given = Conditions(condition, negative, scales[0], seen, scales[1])
        left = {name: np.asarray(table[name][first_step:], np.float32) for name in TABLE_INPUTS}
        found = self._sampler.run(state, given, left, copies)
        return _to_images(found["image"]) if "image" in found else self.decode(found["out_latents"])

    def encode_prompts(
        self, prompts: Sequence[str], height: int, width: int, negative: bool = False
    ) -> dict[str, Array]:
        """Return the network's condition: encoder_hidden_states [B, L, D], for SDXL also text_embeds and time_ids.

        Args:
            prompts: one text per image.
            height: height of the images in pixels, which SDXL is told.
            width: width of the images in pixels, likewise.
            negative: Whether this is the negative condition, which SDXL sets to zeros for empty prompts.
        """
        if not self.is_xl:
            return {"encoder_hidden_states": self._encode("text_encoder", "tokenizer", prompts)["last_hidden_state"]}
        states = []
        for encoder, tokenizer in self._encoders():
            encoded = self._encode(encoder, tokenizer, prompts)
            last = max(int(name.rpartition(".")[2]) for name in encoded if name.startswith("hidden_states."))
            states.append(encoded[f"hidden_states.{last - 1}"])
        context, pooled = np.concatenate(states, -1), encoded["text_embeds"]
        if negative and self._index.get("force_zeros_for_empty_prompt") and not any(prompts):
            context, pooled = np.zeros_like(context), np.zeros_like(pooled)
        time_ids = np.tile(np.asarray([height, width, 0, 0, height, width], np.float32), (len(prompts), 1))
        return {"encoder_hidden_states": context, "text_embeds": pooled, "time_ids": time_ids}

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the images of scaled latents [B, C, H / f, W / f]."""
        return _to_images(self.decode_pixels(latents) / 2 + 0.5)

    def _check_call(
        self, prompts: list[str], seed: int, image: Image.Image | Sequence[Image.Image] | None, strength: float | None
    ) -> None:
        """Refuse arguments that the graphs cannot serve, before a graph is opened."""
        if not prompts:
            raise RefusedInputError("prompts is empty: give at least one")
        if seed < 0:
            raise RefusedInputError(f"seed must be 0 or above, got {seed}")
        if self._static_sizes and len(prompts) != self._static_sizes[0]:
            raise RefusedInputError(
                f"the graphs in {self.folder} generate {self._static_sizes[0]} images at a time (--static"
                f" {self.report['static']}), got {len(prompts)} prompts"
            )
        if self.sees_image and (image is None or strength is not None):
            wrong = "none was given: give image" if image is None else f"strength {strength} has no use: leave it out"
            raise RefusedInputError(f"the network of {self.folder} sees an image, and {wrong}")
        if (
            image is not None
            and not isinstance(image, Image.Image)
            and (not self.sees_image or len(image) != len(prompts))
        ):
            raise RefusedInputError(
                f"give one image, or one for each of the {len(prompts)} prompts to a network that sees images, got"
                f" {len(image)}"
            )
        if image is None and strength is not None:
            raise RefusedInputError(f"strength {strength} needs an image to start from: give image, or leave it out")
        if strength is not None and not 0 < strength <= 1:
            raise RefusedInputError(f"strength must be above 0 and at most 1, got {strength}")


def _to_images(images: npt.NDArray[np.floating]) -> list[Image.Image]:
    """Convert [B, 3, H, W] in [0, 1] to Pillow images."""
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels]
