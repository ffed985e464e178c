"""The miniature's tokenizer, text encoder and UNet: the stages `tokenizer` and `denoiser` of `build.py`."""

import copy
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from d2f_fast.miniature import MINIATURE, pictures

SEED = 0
VOCABULARY = 2000
START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 128
LEVELS = (48, 96)
EMPTY_SHARE = 0.1
OPEN_BACKGROUND_SHARE = 0.1
SNR_CAP = 5.0


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def all_captions() -> list[str]:
    """Every caption that training shows, name by name: without a colour, then on each background; last, no words."""
    colours = (None, *range(len(pictures.BACKGROUNDS)))
    return [pictures.caption(name, colour) for name in range(len(pictures.names())) for colour in colours] + [""]


def build_tokenizer() -> None:
    """Byte-level BPE in CLIP's file format, trained on the captions; every byte is in it, so that any text encodes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(all_captions(), trainer)
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    learned = json.loads(trained.to_str())["model"]["merges"][: VOCABULARY - len(tokens) - 2]
    merges = [tuple(merge) for merge in learned]
    tokens += [first + second for first, second in merges] + [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    longest = max(map(len, CLIPTokenizer(vocab=vocabulary, merges=merges)(all_captions()).input_ids))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest)
    folder = MINIATURE / "tokenizer"
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()  # vocab.json and merges.txt say the same, and are what SD 1.5 ships
    print(f"{len(vocabulary)} tokens, captions of at most {longest}")


def new_networks(vocabulary: int, length: int, start: int, end: int) -> nn.ModuleDict:
    """Text encoder and UNet of the shapes that Stable Diffusion 1.5 has, freshly initialised."""
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
        attention_head_dim=(2, 4),  # the number of heads, by this argument's old misnomer
        norm_num_groups=8,
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(text), "unet": unet})


def new_scheduler() -> Any:
    """Stable Diffusion 1.5's noise schedule, sampled by DDIM."""
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
def cached_latents(vae: Any, device: str) -> Tensor:
    """Posterior mean and deviation of every picture, scaled: [names, colours, 2 (mirrored), 2 (mean, std), 4, 8, 8]."""
    colours = range(len(pictures.BACKGROUNDS))
    rows = []
    for name in tqdm(range(len(pictures.names())), desc="latents", mininterval=5):
        pairs = [pictures.Picture(name, colour, mirrored) for colour in colours for mirrored in (False, True)]
        posterior = vae.encode(pictures.draw(pairs, "noto").to(device)).latent_dist
        rows.append(torch.stack((posterior.mean, posterior.std), dim=1) * vae.config.scaling_factor)
    return torch.stack(rows).unflatten(1, (len(colours), 2))


def build_denoiser(
    steps: int, batch: int, learning_rate: float, device: str, state: Path | None, save_every_s: float
) -> None:
    """Text encoder and UNet together, from scratch or from `state`: epsilon-prediction, min-SNR weights, bfloat16.

    Each step seeds its own random numbers, so that an interrupted run with `state` ends as an uninterrupted one.
    Float32 weights stay in `state`, the averaged ones go to the pipeline folder in float16.
    """
    from diffusers import AutoencoderKL
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

    vae = AutoencoderKL.from_pretrained(MINIATURE / "vae", dtype=torch.float32)
    latents = cached_latents(vae.to(device), device)
    shape = (len(pictures.names()), len(pictures.BACKGROUNDS))
    pairs = [pair for pair in itertools.product(*map(range, shape)) if pair not in pictures.held_out_pairs()]
    trained = torch.tensor(pairs, device=device)
    ids = tokenizer(all_captions(), padding="max_length", return_tensors="pt").input_ids.to(device)
    captions, empty = ids[:-1].unflatten(0, (shape[0], shape[1] + 1)), ids[-1]
    snr = compute_snr(scheduler, torch.arange(len(scheduler.alphas_cumprod)))
    loss_weights = (snr.clamp(max=SNR_CAP) / snr).to(device)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    generator = torch.Generator(device)
    loss_sum = torch.zeros((), device=device)
    saved = time.monotonic()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=10)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(step, steps)
        generator.manual_seed(SEED + step)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        def normal() -> Tensor:
            return torch.randn((batch, 4, 8, 8), generator=generator, device=device)

        name, colour = trained[(uniform(batch) * len(trained)).long()].unbind(-1)
        mean, std = latents[name, colour, (uniform(batch) * 2).long()].unbind(1)
        kind = uniform(batch)
        open_background = kind < EMPTY_SHARE + OPEN_BACKGROUND_SHARE
        tokens = captions[name, torch.where(open_background, 0, colour + 1)]
        tokens = torch.where((kind < EMPTY_SHARE)[:, None], empty, tokens)
        # one timestep in each of `batch` equal strata of the schedule: less variance between steps
        strata = (torch.arange(batch, device=device) + uniform(batch)) / batch
        timesteps = (strata * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
        noise = normal()
        signal = alphas_cumprod[timesteps][:, None, None, None]
        sample = signal.sqrt() * (mean + std * normal()) + (1 - signal).sqrt() * noise
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            context = networks["text_encoder"](tokens).last_hidden_state
            epsilon = networks["unet"](sample, timesteps, context).sample
        loss = (loss_weights[timesteps] * (epsilon.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
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


def save_state(path: Path, networks: nn.Module, optimizer: torch.optim.Optimizer, ema: Any, step: int) -> None:
    """Write everything that a later run needs to go on, through a temporary name."""
    tensors = {f"networks.{key}": value for key, value in networks.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in entry.items()}
    temporary = path.with_suffix(".new")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, networks: nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> int:
    """Restore what `save_state` wrote; returns the number of steps done."""
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


def save_pipeline(networks: nn.ModuleDict, scheduler: Any) -> None:
    """Write the whole pipeline folder beside the old one, weights in float16, then put it in its place."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    new, old = MINIATURE.with_name("pipeline.new"), MINIATURE.with_name("pipeline.old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    halves: dict[str, Any] = {}
    for name, network in networks.items():
        halves[name] = copy.deepcopy(network).half()
        halves[name].save_pretrained(new / name)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(MINIATURE / "vae"),
        tokenizer=CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **halves,
    )
    # transformers loads in the stored precision, diffusers in float32: the pipeline must come up in one.
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
