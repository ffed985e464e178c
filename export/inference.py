"""Generate images with an export folder, using onnxruntime, numpy, tokenizers and Pillow. Imports no torch.

pipeline = OnnxPipeline("d2f-onnx")
images = pipeline(["an owl on a blue background"], steps=4, guidance_scale=3.0)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from d2f_fast.config import check_guidance
from d2f_fast.errors import RefusedInputError
from d2f_fast.export.exported_files import latent_sides, read_object, read_tables, read_tokenizer, steps_of_report
from d2f_fast.export.noise import standard_normal
from d2f_fast.export.sessions import Array, GraphSessions, Provider
from d2f_fast.sampling.options import ChosenSteps, check_negative_prompt, guidance_or_default

Form = Literal["loop", "folder", "unrolled"]
_REPORT_KEYS = ("guidance", "with_vae", "unroll", "static")
_TABLE_INPUTS = ("timesteps", "coef_x", "coef_out")


class OnnxPipeline:
    """A text-to-image pipeline made of exported graphs.

    Args:
        folder: folder that `export/to_onnx.py` wrote.
        form: "loop" runs unet/sampler.onnx, all steps in one call. "folder" runs unet/model.onnx, one network
            evaluation at a time. "unrolled" runs the sampler that `--unroll` wrote, which has a fixed number of steps.
        providers: ONNX Runtime providers, as names or (name, options). None takes CUDA where there is a GPU, and the
            CPU otherwise; TensorRT must be named, because it spends minutes on building engines at its first use. A
            provider that is named and does not load is refused, never replaced.
        threads: threads of the CPU provider; 0 for one per core.

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
        channels = [self._unet_config[name] for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            raise RefusedInputError(
                f"{self.folder} generates no images from prompts: its network takes {channels[0]} channels, of which"
                f" only {channels[1]} are noise (depth or inpainting); run unet/model.onnx yourself"
            )
        self._index = read_object(self.folder, "model_index.json")
        self.tokenizers = {name: read_tokenizer(self.folder, name) for _, name in self._encoders()}

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

    @property
    def is_xl(self) -> bool:
        """Return whether the network takes SDXL's pooled text and image sizes."""
        return bool(self._unet_config.get("addition_embed_type") == "text_time")

    @property
    def downsampling(self) -> int:
        """Return the pixels per latent along each side."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

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
        image: Image.Image | None = None,
        strength: float | None = None,
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
            image: image to start from, resized to height and width; None to start from noise alone.
            strength: how much of `image` changes, above 0 and at most 1; the first 1 - strength of the steps are left
                out. None means 0.8. It needs `image`.

        Raises:
            RefusedInputError: the export cannot serve a size, a number of steps or another argument.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        guidance_scale = guidance_or_default(guidance_scale, self.recommended_guidance)
        self._check_call(prompts, guidance_scale, seed)
        check_negative_prompt(negative_prompt, guidance_scale)
        steps = self.default_steps.number if steps is None else steps
        table = self._table(steps)
        height, width = self._size(height, width)
        latents = self._noise((len(prompts), height, width), seed, noise)
        first_step = 0
        if image is None and strength is not None:
            raise RefusedInputError(f"strength {strength} needs an image to start from: give image, or leave it out")
        if image is not None:
            strength = 0.8 if strength is None else strength
            if not 0 < strength <= 1:
                raise RefusedInputError(f"strength must be above 0 and at most 1, got {strength}")
            first_step = steps - max(1, round(steps * strength))
            encoded = self.encode_image(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
            latents = table["alphas"][first_step] * encoded + table["noise_scales"][first_step] * latents
        state = latents.astype(np.float32)
        condition, negative = self.encode_prompts(prompts, height, width), None
        # A network of fixed sizes takes both halves, whatever the scale.
        guidance_scale = max(guidance_scale, 1.0)  # 0 is the prompt alone too, which 1 gives in every graph.
        if guidance_scale > 1 or (self.report["guidance"] and (self.report["static"] or self.form == "unrolled")):
            negative = self.encode_prompts([negative_prompt] * len(prompts), height, width, negative=True)
        left = {name: np.asarray(table[name][first_step:], np.float32) for name in _TABLE_INPUTS}
        if self.form == "folder" or (self.report["guidance"] and negative is None):
            return self.decode(self._evaluate_step_by_step(state, condition, negative, guidance_scale, left))
        return self._run_sampler(state, condition, negative, guidance_scale, left)

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

    def encode_image(self, image: Image.Image) -> Array:
        """Return the scaled latents of an image, [1, C, H / f, W / f] float32: the mean of the posterior."""
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        pixels = np.repeat(pixels, self._static_sizes[0] if self._static_sizes else 1, axis=0)
        (encoded,) = self.graphs.run("vae_encoder/model.onnx", {"sample": pixels})
        mean = encoded[:1, : self._vae_config["latent_channels"]]  # an AutoencoderKL gives the log variance after it
        return (mean - self._shift()) * np.float32(self._vae_config["scaling_factor"])

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the images of scaled latents [B, C, H / f, W / f]."""
        unscaled = (latents / self._vae_config["scaling_factor"] + self._shift()).astype(np.float32)
        (decoded,) = self.graphs.run("vae_decoder/model.onnx", {"latent_sample": unscaled})
        return _to_images(decoded / 2 + 0.5)

    def _run_sampler(
        self,
        state: Array,
        condition: dict[str, Array],
        negative: dict[str, Array] | None,
        guidance_scale: float,
        table: dict[str, Array],
    ) -> list[Image.Image]:
        """Take all steps of a table in one call of the sampler graph, unguided where there is no negative condition."""
        feed = {"latents": state, **condition, **table}
        if negative is not None:
            feed |= {f"negative_{name}": value for name, value in negative.items()}
            feed["guidance_scale"] = np.asarray(guidance_scale, np.float32)
        graph, steps = "unet/sampler.onnx", len(table["timesteps"])
        if self.form == "unrolled":
            graph = f"unet/sampler_{self.report['unroll']}.onnx"
            if steps != self.report["unroll"]:
                raise RefusedInputError(
                    f"{graph} takes {self.report['unroll']} steps, got {steps}: choose the form loop for other numbers"
                )
        (result,) = self.graphs.run(graph, feed)
        return _to_images(result) if self.report["with_vae"] else self.decode(result)

    def _evaluate_step_by_step(
        self,
        state: Array,
        condition: dict[str, Array],
        negative: dict[str, Array] | None,
        guidance_scale: float,
        table: dict[str, Array],
    ) -> Array:
        """Take the steps of a table one by one; the condition stays on the device from the first to the last."""
        graph = "unet/model.onnx"
        session, guided = self.graphs.session(graph), negative is not None
        binding = session.io_binding()
        device = "cuda" if session.get_providers()[0] != "CPUExecutionProvider" else "cpu"
        for name, value in condition.items():
            held = value if negative is None else np.concatenate([negative[name], value])
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(held, device, 0))
        for timestep, coef_x, coef_out in zip(*(table[name] for name in _TABLE_INPUTS), strict=True):
            binding.bind_cpu_input("sample", np.concatenate([state, state]) if guided else state)
            binding.bind_cpu_input("timestep", np.asarray(timestep))
            binding.bind_output("out_sample", "cpu")
            with self.graphs.named(graph):
                session.run_with_iobinding(binding)
            (output,) = binding.copy_outputs_to_cpu()
            if guided:
                uncond, cond = np.split(output, 2)
                output = uncond + np.float32(guidance_scale) * (cond - uncond)
            state = coef_x * state + coef_out * output
        return state

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

    def _check_call(self, prompts: list[str], guidance_scale: float, seed: int) -> None:
        """Refuse arguments that the graphs cannot serve, before a graph is opened."""
        if not prompts:
            raise RefusedInputError("prompts is empty: give at least one")
        check_guidance("guidance_scale", guidance_scale)
        if seed < 0:
            raise RefusedInputError(f"seed must be 0 or above, got {seed}")
        if self._static_sizes and len(prompts) != self._static_sizes[0]:
            raise RefusedInputError(
                f"the graphs in {self.folder} generate {self._static_sizes[0]} images at a time (--static"
                f" {self.report['static']}), got {len(prompts)} prompts"
            )
        takes_any = self.form == "folder" and not self._static_sizes
        if not self.report["guidance"] and guidance_scale > 1 and not takes_any:
            raise RefusedInputError(
                f"this sampler was exported without guidance: guidance_scale must be 1, got {guidance_scale}"
            )

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


def _to_images(images: npt.NDArray[np.floating]) -> list[Image.Image]:
    """Convert [B, 3, H, W] in [0, 1] to Pillow images."""
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels]
