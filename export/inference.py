"""Draw pictures with an export folder: onnxruntime, numpy, tokenizers and Pillow, and no torch.

pipeline = OnnxPipeline("d2f-onnx")
pictures = pipeline(["an owl on a blue background"], steps=4, guidance_scale=3.0)
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from d2f_fast.errors import RefusedInputError

Array = np.ndarray[Any, Any]
Form = Literal["loop", "folder", "unrolled"]
Provider = str | tuple[str, dict[str, Any]]

# By the name that the command line has for them; what a provider cannot run goes to the next.
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
# What a drawing reads of the export's own files.
_REPORT_KEYS = ("guidance", "with_vae", "unroll", "static")
_TABLE_KEYS = {"timesteps": 0, "coef_x": 0, "coef_out": 0, "alphas": 1, "noise_scales": 1}  # numbers beside the steps
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class OnnxPipeline:
    """A text-to-image pipeline of exported graphs.

    Args:
        folder: that `export/to_onnx.py` made.
        form: "loop" runs unet/sampler.onnx; "folder" one network evaluation at a time, from unet/model.onnx;
            "unrolled" the sampler that `--unroll` wrote, for its own number of steps.
        providers: of ONNX Runtime, names or (name, options); None for CUDA where there is a GPU, then the CPU. TensorRT
            builds engines for minutes at its first use, so it is never chosen unasked. One that is asked for and does
            not load is refused, never replaced.
        threads: of the CPU provider; 0 for all cores.

    Raises:
        RefusedInputError: the folder is no export or is damaged, has no such form, or the provider does not load.
    """

    def __init__(
        self, folder: str | Path, form: Form = "loop", providers: Sequence[Provider] | None = None, threads: int = 0
    ) -> None:
        self.folder, self.form = Path(folder), form
        if form not in get_args(Form):
            raise RefusedInputError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        if not (self.folder / "export.json").is_file():
            raise RefusedInputError(f"{self.folder} is no export folder: export.json is missing")
        self.report = self._json("export.json", *_REPORT_KEYS)
        if form == "unrolled" and not self.report["unroll"]:
            raise RefusedInputError(f"{self.folder} has no unrolled sampler: export with --unroll, or choose loop")
        self.tables = self._tables()
        static = self.report["static"]
        self._static_sizes = [int(size) for size in str(static).split("x")] if static else []  # batch, height, width
        self._asked = providers is not None
        self._providers: list[Provider] = list(default_providers() if providers is None else providers)
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._unet_config = self._json("unet/config.json", "in_channels", "out_channels", "block_out_channels")
        needed = ("block_out_channels", "latent_channels", "scaling_factor")
        self._vae_config = self._json("vae_decoder/config.json", *needed)
        channels = [self._unet_config[name] for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            raise RefusedInputError(
                f"{self.folder} draws no pictures of prompts: its network takes {channels[0]} channels, of which only"
                f" {channels[1]} are noise (depth or inpainting)"
            )
        self._index = self._json("model_index.json")
        self._tokenizers = {name: self._tokenizer(name) for _, name in self._encoders()}

    @property
    def is_xl(self) -> bool:
        """Whether the network takes SDXL's pooled text and sizes."""
        return bool(self._unet_config.get("addition_embed_type") == "text_time")

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 4,
        guidance_scale: float = 3.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        noise: Array | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
    ) -> list[Image.Image]:
        """Draw one picture a prompt.

        Args:
            prompts: one or several texts; as many as the pictures of a static export.
            steps: network evaluations; a number that the export has a table for.
            guidance_scale: 1 is no guidance, and half the work: the Loop would evaluate both halves, so the network is
                then run step by step, as in the folder form. Graphs of a static or unrolled export do evaluate both. An
                export without guidance takes no other.
            negative_prompt: led away from.
            height, width: pixels; None for the model's own size, or the export's where that is fixed.
            seed: of the noise.
            noise: [B, C, H / f, W / f] float32 standard normal in place of the seed's.
            image: to start from; its share of the steps, 1 - strength, is left out.
            strength: 0 < strength <= 1, of the change.

        Raises:
            RefusedInputError: a size, a number of steps or a strength that the export cannot serve.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check_call(prompts, guidance_scale, seed)
        table = self._table(steps)
        height, width = self._size(height, width)
        latents = self._noise((len(prompts), height, width), seed, noise)
        first_step = 0
        if image is not None:
            if not 0 < strength <= 1:
                raise RefusedInputError(f"strength must be above 0 and at most 1, got {strength}")
            first_step = steps - max(1, round(steps * strength))
            encoded = self.encode_image(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
            latents = table["alphas"][first_step] * encoded + table["noise_scales"][first_step] * latents
        condition, negative = self.encode_prompts(prompts, height, width), None
        # A network of fixed sizes has room for both halves, whatever the scale.
        if guidance_scale != 1 or (self.report["guidance"] and (self.report["static"] or self.form == "unrolled")):
            negative = self.encode_prompts([negative_prompt] * len(prompts), height, width, negative=True)
        if self.form == "folder" or (self.report["guidance"] and negative is None):
            latents = self._loop(latents.astype(np.float32), condition, negative, guidance_scale, table, first_step)
            return self.decode(latents)
        feed = {"latents": latents.astype(np.float32), **condition}
        feed |= {name: np.asarray(table[name][first_step:], np.float32) for name in ("timesteps", "coef_x", "coef_out")}
        if negative is not None:
            feed |= {f"negative_{name}": value for name, value in negative.items()}
            feed["guidance_scale"] = np.asarray(guidance_scale, np.float32)
        graph = "unet/sampler.onnx"
        if self.form == "unrolled":
            graph = f"unet/sampler_{self.report['unroll']}.onnx"
            if steps - first_step != self.report["unroll"]:
                raise RefusedInputError(f"{graph} takes {self.report['unroll']} steps, got {steps - first_step}")
        (result,) = self._run(graph, feed)
        return _pictures(result) if self.report["with_vae"] else self.decode(result)

    def encode_prompts(
        self, prompts: Sequence[str], height: int, width: int, negative: bool = False
    ) -> dict[str, Array]:
        """Condition of the network: encoder_hidden_states [B, L, D], for SDXL also text_embeds and time_ids."""
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
        """Scaled latents of a picture, [1, C, H / f, W / f]: the posterior's mean."""
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        pixels = np.repeat(pixels, self._static_sizes[0] if self._static_sizes else 1, axis=0)
        (encoded,) = self._run("vae_encoder/model.onnx", {"sample": pixels})
        mean = encoded[:1, : self._vae_config["latent_channels"]]  # the log variance comes after it, if at all
        return (mean - self._shift()) * np.float32(self._vae_config["scaling_factor"])

    def decode(self, latents: Array) -> list[Image.Image]:
        """Pictures of scaled latents."""
        unscaled = (latents / self._vae_config["scaling_factor"] + self._shift()).astype(np.float32)
        (decoded,) = self._run("vae_decoder/model.onnx", {"latent_sample": unscaled})
        return _pictures(decoded / 2 + 0.5)

    def _loop(
        self,
        state: Array,
        condition: dict[str, Array],
        negative: dict[str, Array] | None,
        guidance_scale: float,
        table: dict[str, list[float]],
        first_step: int,
    ) -> Array:
        """The steps one by one, unguided where there is no negative; the condition stays on the device."""
        graph = "unet/model.onnx"
        session, guided = self._session(graph), negative is not None
        binding = session.io_binding()
        device = "cuda" if session.get_providers()[0] != "CPUExecutionProvider" else "cpu"
        for name, value in condition.items():
            held = value if negative is None else np.concatenate([negative[name], value])
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(held, device, 0))
        for k in range(first_step, len(table["timesteps"])):
            binding.bind_cpu_input("sample", np.concatenate([state, state]) if guided else state)
            binding.bind_cpu_input("timestep", np.asarray(table["timesteps"][k], np.float32))
            binding.bind_output("out_sample", "cpu")
            with self._named(graph):
                session.run_with_iobinding(binding)
            (output,) = binding.copy_outputs_to_cpu()
            if guided:
                uncond, cond = np.split(output, 2)
                output = uncond + np.float32(guidance_scale) * (cond - uncond)
            state = np.float32(table["coef_x"][k]) * state + np.float32(table["coef_out"][k]) * output
        return state

    def _encode(self, encoder: str, tokenizer: str, prompts: Sequence[str]) -> dict[str, Array]:
        encoded = self._tokenizers[tokenizer].encode_batch(list(prompts))
        ids = np.asarray([entry.ids for entry in encoded], np.int64)
        graph = f"{encoder}/model.onnx"
        names = [output.name for output in self._session(graph).get_outputs()]
        return dict(zip(names, self._run(graph, {"input_ids": ids}), strict=True))

    def _encoders(self) -> list[tuple[str, str]]:
        """Text encoders with their tokenizers; SDXL's refiner has the second only."""
        if not self.is_xl:
            return [("text_encoder", "tokenizer")]
        both = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
        return [pair for pair in both if self._index.get(pair[0]) != [None, None]]

    def _tokenizer(self, name: str) -> Tokenizer:
        path = self.folder / name / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no other class
            raise RefusedInputError(f"{path} is missing or damaged ({error}): export again") from error
        config = self._json(f"{name}/tokenizer_config.json", "eos_token")
        encoder = self._json(f"{name.replace('tokenizer', 'text_encoder')}/config.json")
        length = min(config.get("model_max_length") or 77, encoder.get("max_position_embeddings", 77))
        padding = config.get("pad_token") or config["eos_token"]
        padding = padding["content"] if isinstance(padding, dict) else padding
        tokenizer.enable_truncation(length)
        pad_id = tokenizer.token_to_id(padding)
        if pad_id is None:
            config_file = path.with_name("tokenizer_config.json")
            raise RefusedInputError(f"{config_file}: {padding} is no token of tokenizer.json: export again")
        tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=padding)
        return tokenizer

    def _check_call(self, prompts: list[str], guidance_scale: float, seed: int) -> None:
        """Refuse what the graphs cannot serve, before any is opened."""
        if not prompts:
            raise RefusedInputError("prompts: give at least one")
        if not _is_finite(guidance_scale):
            raise RefusedInputError(f"guidance_scale must be a number, got {guidance_scale}")
        if seed < 0:
            raise RefusedInputError(f"seed must be 0 or above, got {seed}")
        if self._static_sizes and len(prompts) != self._static_sizes[0]:
            raise RefusedInputError(
                f"the graphs in {self.folder} draw {self._static_sizes[0]} pictures at a time (--static"
                f" {self.report['static']}), got {len(prompts)} prompts"
            )
        takes_any = self.form == "folder" and not self._static_sizes
        if not self.report["guidance"] and guidance_scale != 1 and not takes_any:
            raise RefusedInputError(
                f"this sampler was exported without guidance: guidance_scale must be 1, got {guidance_scale}"
            )

    def _tables(self) -> dict[int, dict[str, list[float]]]:
        """The step tables by number of steps."""
        tables, path = {}, self.folder / "unet/steps.json"
        for steps, table in self._json("unet/steps.json").items():
            for name, more in _TABLE_KEYS.items():
                row = table.get(name) if isinstance(table, dict) and steps.isdecimal() else None
                if not isinstance(row, list) or len(row) != int(steps) + more or not all(map(_is_finite, row)):
                    raise RefusedInputError(f"{path}: {name} of {steps} steps is not whole: export again")
            tables[int(steps)] = table
        if not tables:
            raise RefusedInputError(f"{path} holds no table: export again")
        return tables

    def _table(self, steps: int) -> dict[str, list[float]]:
        if steps not in self.tables:
            known = ", ".join(map(str, sorted(self.tables)))
            raise RefusedInputError(f"steps must be one of {known}, got {steps}: export with --steps for others")
        return dict(self.tables[steps])

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
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
        pictures, height, width = sizes
        channels, factor = self._unet_config["out_channels"], self.downsampling
        shape = (pictures, channels, height // factor, width // factor)
        if noise is None:
            return np.random.default_rng(seed).standard_normal(shape, np.float32)
        if noise.shape != shape:
            raise RefusedInputError(f"noise must be of shape {list(shape)}, got {list(noise.shape)}")
        return noise.astype(np.float32)

    def _shift(self) -> float:
        return float(self._vae_config.get("shift_factor") or 0.0)

    def _run(self, graph: str, feed: dict[str, Array]) -> list[Array]:
        session = self._session(graph)
        with self._named(graph):
            return list(session.run(None, feed))

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        """The graph's session, opened at its first use."""
        if graph not in self._sessions:
            path = self.folder / graph
            if not path.is_file():
                raise RefusedInputError(f"{path} is missing: export that component too")
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = self._threads
            with self._named(graph):
                session = onnxruntime.InferenceSession(path, options, providers=self._providers)
            first = self._providers[0]
            name = first if isinstance(first, str) else first[0]
            if session.get_providers()[0] != name:  # ONNX Runtime itself falls back
                missing = f"{name} does not load here (ONNX Runtime says why)"
                if self._asked:
                    raise RefusedInputError(f"{missing}: install what it needs, or choose cpu")
                warnings.warn(f"{missing}: the CPU draws", stacklevel=2)
                self._providers = list(PROVIDERS["cpu"])
            self._sessions[graph] = session
        return self._sessions[graph]

    @contextmanager
    def _named(self, graph: str) -> Iterator[None]:
        """Turn an exception of ONNX Runtime's into the package's own, which names the file that is to blame."""
        try:
            yield
        except Exception as error:  # onnxruntime's own exceptions share no base class
            listed = self.report.get("files") or {}
            for name in (graph, f"{graph.partition('/')[0]}/model.onnx.data"):
                path, size = self.folder / name, dict(listed.get(name) or {}).get("bytes")
                found = path.stat().st_size if path.is_file() else None
                if size is not None and found != size:
                    what = "is missing" if found is None else f"has {found} bytes of the {size} that were exported"
                    raise RefusedInputError(f"{path} {what}: copy the folder again, or export again") from error
            raise RefusedInputError(f"{self.folder / graph} does not run: {str(error).splitlines()[0]}") from error

    def _json(self, name: str, *keys: str) -> dict[str, Any]:
        """A JSON object of the folder, with these keys at least."""
        path = self.folder / name
        mend = "export that component too" if "/" in name else "export again"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RefusedInputError(f"{path} cannot be read: {mend}") from error
        if not isinstance(found, dict):
            raise RefusedInputError(f"{path} is no JSON object: export again")
        for key in keys:
            if key not in found:
                raise RefusedInputError(f"{path} has no {key}: export again")
        return found


def latent_sides(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width, in latents, that a network was trained at."""
    size = unet_config.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def default_providers() -> list[str]:
    """CUDA where this onnxruntime has it and there is a driver, then the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and _NVIDIA_DRIVER.exists():
        onnxruntime.preload_dlls()
        return PROVIDERS["cuda"]
    return PROVIDERS["cpu"]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _pictures(images: Array) -> list[Image.Image]:
    """Pictures of [B, 3, H, W] in [0, 1]."""
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels]
