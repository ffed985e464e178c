"""Train the miniature's text encoder and UNet: the stage `denoiser` of `build.py`."""

import copy
import itertools
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from d2f_fast.miniature import MINIATURE, emoji
from d2f_fast.miniature.build_tokenizer import all_captions

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTokenizer

SEED = 0
CONTEXT = 128  # features of a text token
LEVELS = (48, 96)  # channels of the UNet's levels
EMPTY_FRACTION = 0.1  # of the captions are replaced by the empty one
NO_COLOUR_FRACTION = 0.1  # of the captions leave the background out
SNR_CAP = 5.0


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Return the factor on the learning rate: a linear warm-up, then half a cosine down to zero.

    Args:
        step: training step, from 0.
        steps: number of training steps.
        warmup: steps of the warm-up.
    """
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def new_networks(vocabulary: int, length: int, start: int, end: int) -> nn.ModuleDict:
    """Make an untrained text encoder and UNet of Stable Diffusion 1.5's classes.

    Args:
        vocabulary: number of tokens.
        length: tokens of a padded caption.
        start, end: ids of the start token and of the end token.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CONTEXT,
        intermediate_size=2 * CONTEXT,
        projection_dim=CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=LEVELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(LEVELS),
        up_block_types=("CrossAttnUpBlock2D",) * len(LEVELS),
        cross_attention_dim=CONTEXT,
        attention_head_dim=(2, 4),  # diffusers takes the number of heads under this misleading name.
        norm_num_groups=8,
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(text), "unet": unet})


def new_scheduler() -> "DDIMScheduler":
    """Make a DDIM scheduler with Stable Diffusion 1.5's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def cached_latents(vae: "AutoencoderKL", device: str) -> Tensor:
    """Encode every image.

    Returns:
        Scaled mean and deviation of the posteriors, [names, colours, 2 (mirrored), 2 (mean, std), 4, 8, 8].
    """
    colours = range(len(emoji.BACKGROUNDS))
    rows = []
    for name in tqdm(range(len(emoji.names())), desc="latents", mininterval=5):
        items = [emoji.Emoji(name, colour, mirrored) for colour in colours for mirrored in (False, True)]
        posterior = vae.encode(emoji.render(items, "noto").to(device)).latent_dist
        rows.append(torch.stack((posterior.mean, posterior.std), dim=1) * vae.config.scaling_factor)
    return torch.unflatten(torch.stack(rows), 1, (len(colours), 2))


@dataclass(frozen=True)
class Batch:
    """Inputs of one training step.

    Args:
        tokens: token ids of the captions, [B, length].
        timesteps: diffusion timesteps, [B] int64.
        noise: noise in the samples, [B, 4, 8, 8].
        sample: diffusion states that the UNet is fed, [B, 4, 8, 8].
    """

    tokens: Tensor
    timesteps: Tensor
    noise: Tensor
    sample: Tensor


class TrainingData:
    """All training images, encoded, with the tokens of their captions.

    Args:
        tokenizer: tokenizer of the captions.
        alphas_cumprod: noise schedule, [T].
        device: device of all tensors.
    """

    def __init__(self, tokenizer: "CLIPTokenizer", alphas_cumprod: Tensor, device: str) -> None:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(MINIATURE / "vae", dtype=torch.float32)
        self._latents = cached_latents(vae.to(device), device)
        shape = (len(emoji.names()), len(emoji.BACKGROUNDS))
        pairs = [pair for pair in itertools.product(*map(range, shape)) if pair not in emoji.held_out_pairs()]
        self._pairs = torch.tensor(pairs, device=device)
        ids = tokenizer(all_captions(), padding="max_length", return_tensors="pt").input_ids.to(device)
        self._captions, self._empty = ids[:-1].unflatten(0, (shape[0], shape[1] + 1)), ids[-1]
        self._alphas_cumprod = alphas_cumprod.to(device)

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """Sample the inputs of a training step with random numbers from `generator`."""
        device, timestep_count = self._latents.device, len(self._alphas_cumprod)

        def uniform() -> Tensor:
            return torch.rand((batch,), generator=generator, device=device)

        def normal() -> Tensor:
            return torch.randn((batch, 4, 8, 8), generator=generator, device=device)

        name, colour = self._pairs[(uniform() * len(self._pairs)).long()].unbind(-1)
        mean, std = self._latents[name, colour, (uniform() * 2).long()].unbind(1)
        kind = uniform()
        no_colour = kind < EMPTY_FRACTION + NO_COLOUR_FRACTION
        tokens = self._captions[name, torch.where(no_colour, 0, colour + 1)]
        tokens = torch.where((kind < EMPTY_FRACTION)[:, None], self._empty, tokens)
        # One timestep in each of `batch` equal parts of the schedule lowers the variance between steps.
        parts = (torch.arange(batch, device=device) + uniform()) / batch
        timesteps = (parts * timestep_count).long().clamp(max=timestep_count - 1)
        noise = normal()
        signal = self._alphas_cumprod[timesteps][:, None, None, None]
        sample = signal.sqrt() * (mean + std * normal()) + (1 - signal).sqrt() * noise
        return Batch(tokens, timesteps, noise, sample)


def build_denoiser(
    steps: int, batch: int, learning_rate: float, device: str, state: Path | None, save_every_s: float
) -> None:
    """Train text encoder and UNet together on noise prediction, in bfloat16 autocast with min-SNR loss weights.

    Each step seeds its own random numbers, so that a run that resumes from `state` ends like an uninterrupted one.
    The averaged weights are saved in float16, in the pipeline's folder.

    Args:
        steps: number of training steps.
        batch: images in a step.
        learning_rate: highest learning rate, after warm-up.
        device: torch device to train on.
        state: file for the float32 weights and the optimizer's state, to resume from if it exists; None for none.
        save_every_s: seconds between two saves.
    """
    from diffusers.training_utils import EMAModel, compute_snr
    from transformers import CLIPTokenizer

    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    length = tokenizer.model_max_length
    networks = new_networks(len(tokenizer), length, tokenizer.bos_token_id, tokenizer.eos_token_id).to(device)
    scheduler = new_scheduler()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(networks.parameters(), decay=0.999, foreach=True)
    first = 0 if state is None or not state.exists() else load_state(state, networks, optimizer, ema)
    data = TrainingData(tokenizer, scheduler.alphas_cumprod, device)
    snr = compute_snr(scheduler, torch.arange(len(scheduler.alphas_cumprod)))
    loss_weights = (snr.clamp(max=SNR_CAP) / snr).to(device)
    generator = torch.Generator(device)
    loss_sum = torch.zeros((), device=device)
    saved = time.monotonic()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=10)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(step, steps)
        inputs = data.sample(batch, generator.manual_seed(SEED + step))
        loss = denoising_loss(networks, inputs, loss_weights)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(networks.parameters())
        loss_sum += loss.detach()
        if (step + 1) % 100 == 0:
            progress.set_postfix(loss=loss_sum.item() / 100)
            loss_sum.zero_()
        if step + 1 == steps or time.monotonic() - saved > save_every_s:
            if state is not None:
                save_state(state, networks, optimizer, ema, step + 1)
            ema.store(networks.parameters())
            ema.copy_to(networks.parameters())
            save_pipeline(networks, scheduler)
            ema.restore(networks.parameters())
            saved = time.monotonic()


def denoising_loss(networks: nn.ModuleDict, inputs: Batch, loss_weights: Tensor) -> Tensor:
    """Compute the weighted mean squared error of the predicted noise; `loss_weights` [T] are by timestep."""
    with torch.autocast(inputs.sample.device.type, torch.bfloat16):
        context = networks["text_encoder"](inputs.tokens).last_hidden_state
        epsilon = networks["unet"](inputs.sample, inputs.timesteps, context).sample
    errors = (epsilon.float() - inputs.noise).square().mean(dim=(1, 2, 3))
    loss: Tensor = (loss_weights[inputs.timesteps] * errors).mean()
    return loss


def save_state(path: Path, networks: nn.Module, optimizer: torch.optim.Optimizer, ema: "EMAModel", step: int) -> None:
    """Write everything that a later run needs to resume; a temporary file keeps the old state until it is complete."""
    tensors = {f"networks.{key}": value for key, value in networks.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in entry.items()}
    temporary = path.with_suffix(".new")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, networks: nn.Module, optimizer: torch.optim.Optimizer, ema: "EMAModel") -> int:
    """Restore what `save_state` wrote, and return the number of steps taken so far."""
    from safetensors import safe_open

    parts: dict[str, dict[str, Tensor]] = {"networks": {}, "ema": {}, "optimizer": {}}
    for key, value in load_file(path).items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    networks.load_state_dict(parts["networks"])
    for i, shadow in enumerate(ema.shadow_params):
        shadow.copy_(parts["ema"][str(i)])
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, _, slot = key.partition(".")
        entries.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    ema.optimization_step = step
    return step


def save_pipeline(networks: nn.ModuleDict, scheduler: "DDIMScheduler") -> None:
    """Write the whole pipeline with weights in float16 to a new folder, then replace the old folder by it."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    new, old = MINIATURE.with_name("pipeline.new"), MINIATURE.with_name("pipeline.old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    halves = {name: copy.deepcopy(network).half() for name, network in networks.items()}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(MINIATURE / "vae"),
        tokenizer=CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **halves,
    )
    for name in halves:
        getattr(pipe, name).save_pretrained(new / name)
    # transformers loads weights in their stored precision, diffusers in float32: both must come up in float32.
    config_file = new / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    pipe.save_config(new)
    scheduler.save_pretrained(new / "scheduler")
    for name in ("vae", "tokenizer"):
        shutil.copytree(MINIATURE / name, new / name)
    MINIATURE.rename(old)
    new.rename(MINIATURE)
    shutil.rmtree(old)
