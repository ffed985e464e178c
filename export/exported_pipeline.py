"""Open an export folder: its files, its sizes, its noise, and the graphs around the network. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.exported_files import latent_sides, read_object, read_tables, read_tokenizer
from d2f_fast.export.graph_sampler import Form, GraphSampler
from d2f_fast.export.noise import standard_normal
from d2f_fast.export.sessions import Array, GraphSessions, Provider
from d2f_fast.models.context_form import context_form

_REPORT_KEYS = ("guidance", "with_vae", "unroll", "static")


class ExportedPipeline:
    """What the pipelines made of exported graphs have in common.

    Args:
        folder: folder that `export/to_onnx.py` wrote.
        form: "loop" runs unet/sampler.onnx, all steps in one call. "folder" runs unet/model.onnx, one network
            evaluation at a time. "unrolled" runs the sampler that `--unroll` wrote, which has a fixed number of steps.
        providers: ONNX Runtime providers, as names or (name, options). None takes CUDA where there is a GPU, and the
            CPU otherwise; TensorRT must be named, because it spends minutes on building engines at its first use. A
            provider that is named and does not load is refused, never replaced.
        threads: threads of the CPU provider; 0 for one per core.

    Attributes:
        report: content of export.json.
        tables: step tables by number of steps.
        graphs: sessions of the graphs.
        tokenizers: tokenizers by name.
        is_depth: whether the folder is one of `MarigoldDepthPipeline`.
        sees_image: whether the network takes the latents of an image beside its own.

    Raises:
        RefusedInputError: the folder is not an export or is damaged, has no such form, or a provider does not load.
    """

    def __init__(
        self, folder: str | Path, form: Form = "loop", providers: Sequence[Provider] | None = None, threads: int = 0
    ) -> None:
        self.folder, self.form = Path(folder), form
        if form not in get_args(Form):
            raise RefusedInputError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        if not (self.folder / "export.json").is_file():
            raise RefusedInputError(
                f"{self.folder} is not an export folder (export.json is missing): name one that export/to_onnx.py wrote"
            )
        self.report = read_object(self.folder, "export.json", *_REPORT_KEYS)
        if form == "unrolled" and not self.report["unroll"]:
            raise RefusedInputError(f"{self.folder} has no unrolled sampler: export with --unroll, or choose loop")
        self.tables = read_tables(self.folder)
        static = self.report["static"]
        self._static_sizes = [int(size) for size in str(static).split("x")] if static else []  # batch, height, width
        self.graphs = GraphSessions(self.folder, self.report.get("files") or {}, providers, threads)
        needed = ("in_channels", "out_channels", "block_out_channels")
        self._unet_config = read_object(self.folder, "unet/config.json", *needed)
        needed = ("block_out_channels", "latent_channels", "scaling_factor")
        self._vae_config = read_object(self.folder, "vae_decoder/config.json", *needed)
        self._index = read_object(self.folder, "model_index.json")
        kind = str(self._index.get("_class_name"))
        self.is_depth = kind == "MarigoldDepthPipeline"
        self._context_form = context_form(kind, bool(self._index.get("is_cosxl_edit")))
        channels = [int(self._unet_config[name]) for name in ("in_channels", "out_channels")]
        if channels[0] not in (channels[1], 2 * channels[1]):
            raise RefusedInputError(
                f"{self.folder}: its network takes {channels[0]} channels, not {channels[1]}, or {2 * channels[1]} with"
                " one image (it is for inpainting, or for several images): run unet/model.onnx yourself"
            )
        self.sees_image = channels[0] > channels[1]
        self._sampler = GraphSampler(self.graphs, self.report, form, self._context_form.first)
        self.tokenizers = {name: read_tokenizer(self.folder, name) for _, name in self._encoders()}

    @property
    def downsampling(self) -> int:
        """Return the pixels per latent along each side."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    @property
    def is_xl(self) -> bool:
        """Return whether the network takes SDXL's pooled text and image sizes."""
        return bool(self._unet_config.get("addition_embed_type") == "text_time")

    def encode_image(self, image: Image.Image) -> Array:
        """Return the scaled latents of an image, [1, C, H / f, W / f] float32: the mean of the posterior."""
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        pixels = np.repeat(pixels, self._static_sizes[0] if self._static_sizes else 1, axis=0)
        (encoded,) = self.graphs.run("vae_encoder/model.onnx", {"sample": pixels})
        mean = encoded[:1, : self._vae_config["latent_channels"]]  # an AutoencoderKL gives the log variance after it
        return (mean - self._shift()) * np.float32(self._vae_config["scaling_factor"])

    def encode_context(self, image: Image.Image) -> Array:
        """Return the latents of an image as the network sees them, [1, C, H / f, W / f] float32."""
        scaled = self.encode_image(image)
        if self._context_form.scaled:
            return scaled
        return scaled / np.float32(self._vae_config["scaling_factor"]) + self._shift()

    def decode_pixels(self, latents: Array) -> Array:
        """Return the pixels of scaled latents [B, C, H / f, W / f], in about [-1, 1]."""
        unscaled = (latents / self._vae_config["scaling_factor"] + self._shift()).astype(np.float32)
        pixels: Array = self.graphs.run("vae_decoder/model.onnx", {"latent_sample": unscaled})[0]
        return pixels

    def _encode(self, encoder: str, tokenizer: str, prompts: Sequence[str]) -> dict[str, Array]:
        """Return the outputs of a text encoder by name."""
        encoded = self.tokenizers[tokenizer].encode_batch(list(prompts))
        ids = np.asarray([entry.ids for entry in encoded], np.int64)
        graph = f"{encoder}/model.onnx"
        names = [output.name for output in self.graphs.session(graph).get_outputs()]
        return dict(zip(names, self.graphs.run(graph, {"input_ids": ids}), strict=True))

    def _encoders(self) -> list[tuple[str, str]]:
        """Return the text encoders with their tokenizers; SDXL's refiner has only the second."""
        if not self.is_xl:
            return [("text_encoder", "tokenizer")]
        both = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
        return [pair for pair in both if self._index.get(pair[0]) != [None, None]]

    def _table(self, steps: int) -> dict[str, list[float]]:
        if steps not in self.tables:
            known = ", ".join(map(str, sorted(self.tables)))
            raise RefusedInputError(
                f"{steps} steps: this export has tables for {known}: export with --steps for others"
            )
        return self.tables[steps]

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the images in pixels."""
        own = [latent * self.downsampling for latent in latent_sides(self._unet_config)]
        sizes = self._static_sizes[1:] or own
        chosen = (sizes[0] if height is None else height, sizes[1] if width is None else width)
        step = self.downsampling * 2 ** (len(self._unet_config["block_out_channels"]) - 1)
        for name, size in zip(("height", "width"), chosen, strict=True):
            if size < step or size % step:
                raise RefusedInputError(f"{name} {size} is not a multiple of {step}")
        if self._static_sizes and chosen != tuple(sizes):
            fixed = self.report["static"]
            raise RefusedInputError(f"the graphs were exported for {fixed} (--static), got {chosen[0]}x{chosen[1]}")
        return chosen

    def _noise(self, sizes: tuple[int, int, int], seed: int, noise: Array | None) -> Array:
        """Return the given noise, or the seed's, for a number of images, a height and a width in pixels."""
        count, height, width = sizes
        channels, factor = self._unet_config["out_channels"], self.downsampling
        shape = (count, channels, height // factor, width // factor)
        if noise is None:
            return standard_normal(shape, seed)
        if noise.shape != shape:
            raise RefusedInputError(f"noise must be of shape {list(shape)}, got {list(noise.shape)}")
        return noise.astype(np.float32)

    def _shift(self) -> float:
        return float(self._vae_config.get("shift_factor") or 0.0)
