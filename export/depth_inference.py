"""Predict depth with an exported Marigold folder, using onnxruntime, numpy, tokenizers and Pillow. Imports no torch.

depth = OnnxDepthPipeline("d2f-onnx")(image, steps=4)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.exported_files import TABLE_INPUTS
from d2f_fast.export.exported_pipeline import ExportedPipeline
from d2f_fast.export.graph_sampler import Conditions, Form
from d2f_fast.export.sessions import Array, Provider
from d2f_fast.sampling.options import check_jump


class OnnxDepthPipeline(ExportedPipeline):
    """A `MarigoldDepthPipeline` made of exported graphs.

    Args:
        folder, form, providers, threads: as for `ExportedPipeline`.

    Raises:
        RefusedInputError: the folder is not an export of a depth model or is damaged, has no such form, or a provider
            does not load.
    """

    def __init__(
        self, folder: str | Path, form: Form = "loop", providers: Sequence[Provider] | None = None, threads: int = 0
    ) -> None:
        super().__init__(folder, form, providers, threads)
        if not self.is_depth:
            raise RefusedInputError(f"{self.folder} is no export of a MarigoldDepthPipeline: use OnnxPipeline")
        self.tokenizers["tokenizer"].no_padding()

    def __call__(
        self,
        image: Image.Image,
        *,
        steps: int | None = None,
        processing_resolution: int | None = None,
        seed: int = 0,
        noise: Array | None = None,
    ) -> Array:
        """Return the depth of an image, [H, W] float32 in [0, 1]; near is 0, and 1 for disparity.

        An image whose sides are multiples of the network's unit, which is 64 pixels for Stable Diffusion, gets the
        depth of the stock pipeline. Others are resized to such sides, and the depth is resized back.

        Args:
            image: image of any mode and size.
            steps: number of network evaluations; the export must have a table for it. None for the model's own. A model
                that was trained to jump from zeros takes one.
            processing_resolution: longer side in pixels at which the image is processed; 0 for the image's own size,
                and None for the model's own, or the export's size where it is static.
            seed: seed of the noise, 0 or above; it changes nothing for a model that starts from zeros.
            noise: standard normal noise [1, C, h, w] float32 to use in place of the seed's; None for the seed's. A
                model that starts from zeros takes none.

        Raises:
            RefusedInputError: the export cannot serve the size, the number of steps or another argument.
        """
        if seed < 0:
            raise RefusedInputError(f"seed must be 0 or above, got {seed}")
        if self._static_sizes and self._static_sizes[0] != 1:
            raise RefusedInputError(
                f"the graphs in {self.folder} take {self._static_sizes[0]} images at a time (--static"
                f" {self.report['static']}): export for one"
            )
        if from_zeros := self.report.get("start") == "zeros":  # Exports of earlier versions have no such entry.
            check_jump(str(self.folder), "steps", steps)
            steps = 1
            if noise is not None:
                raise RefusedInputError("noise was given, and the model was trained to start from zeros: leave it out")
        table = self._table(int(self._index.get("default_denoising_steps") or 4) if steps is None else steps)
        height, width = self._processed_size(image, processing_resolution)
        fitted = image.convert("RGB")
        if fitted.size != (width, height):
            fitted = fitted.resize((width, height), Image.Resampling.BILINEAR)
        state = self._noise((1, height, width), seed, noise)
        state = np.zeros_like(state) if from_zeros else state
        given = Conditions({"encoder_hidden_states": self._empty_text()}, image_latents=self.encode_context(fitted))
        values = {name: np.asarray(table[name], np.float32) for name in TABLE_INPUTS}
        if self.report["with_vae"]:  # That sampler clips each channel of its image before the mean of the three.
            latents = self._sampler.step_by_step(state, given, values, 1)
        else:
            latents = self._sampler.run(state, given, values, 1)["out_latents"]
        depth = np.clip(self.decode_pixels(latents).mean(1)[0], -1, 1) / 2 + np.float32(0.5)
        if depth.shape != (image.height, image.width):
            depth = np.asarray(Image.fromarray(depth).resize(image.size, Image.Resampling.BILINEAR))
        result: Array = depth.astype(np.float32)
        return result

    def _processed_size(self, image: Image.Image, resolution: int | None) -> tuple[int, int]:
        """Return the height and the width at which an image is processed, multiples of the network's unit."""
        if self._static_sizes:
            if resolution not in (None, max(self._static_sizes[1:])):
                raise RefusedInputError(
                    f"the graphs were exported for {self.report['static']} (--static), got processing_resolution"
                    f" {resolution}: leave it out"
                )
            return self._static_sizes[1], self._static_sizes[2]
        longer = int(self._index.get("default_processing_resolution") or 0) if resolution is None else resolution
        if longer < 0:
            raise RefusedInputError(f"processing_resolution must be 0 or above, got {longer}")
        unit = self.downsampling * 2 ** (len(self._unet_config["block_out_channels"]) - 1)
        factor = longer / max(image.size) if longer else 1
        height, width = (max(1, round(side * factor / unit)) * unit for side in (image.height, image.width))
        return height, width

    def _empty_text(self) -> Array:
        """Return the encoded empty prompt without padding, [1, 2, D]."""
        text: Array = self._encode("text_encoder", "tokenizer", [""])["last_hidden_state"]
        return text
