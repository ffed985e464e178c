"""How the miniature was made, from two npm packages to the pipeline folder; each stage seeded, each rerunnable alone.

npm install emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
python -m d2f_fast.miniature.build pictures --npm node_modules
python -m d2f_fast.miniature.build vae
python -m d2f_fast.miniature.build tokenizer
python -m d2f_fast.miniature.build denoiser --state denoiser.safetensors
python -m d2f_fast.miniature.build classifier
python -m d2f_fast.miniature.build evaluate

The shipped text encoder and UNet had 8,600 steps of 64 pictures on two CPU cores, in two parts: 3,640, whose cosine
ended there, and on to 8,600 from `--state`, so a run of the command above differs from them in detail.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from d2f_fast.miniature import MINIATURE, pictures
from d2f_fast.miniature.build_classifier import build_classifier, evaluate
from d2f_fast.miniature.build_denoiser import build_denoiser, build_tokenizer, cosine

CATEGORIES = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}
SEED = 0


def build_pictures(npm: Path) -> None:
    """Two aligned sprite sheets and their names, from the npm packages' own files."""
    noto = npm / "emoji-datasource-google"
    fluent = npm / "@lobehub" / "fluent-emoji-3d" / "assets"
    entries = [
        entry
        for entry in json.loads((noto / "emoji.json").read_text())
        if entry["has_img_google"]
        and (
            entry["category"] in CATEGORIES
            or ("LARGE" in entry["name"] and ("SQUARE" in entry["name"] or "CIRCLE" in entry["name"]))
        )
    ]
    entries.sort(key=lambda entry: entry["sort_order"])
    rows = math.ceil(len(entries) / pictures.COLUMNS)
    size = (pictures.COLUMNS * pictures.SIZE, rows * pictures.SIZE)
    sheets = {style: Image.new("RGBA", size) for style in pictures.STYLES}
    names = []
    for i, entry in enumerate(entries):
        codes = [code.lower() for code in (entry["unified"], entry["non_qualified"]) if code]
        found = [path for path in (fluent / f"{code}.webp" for code in codes) if path.exists()]
        sources = {"noto": noto / "img" / "google" / "64" / entry["image"]} | ({"fluent": found[0]} if found else {})
        corner = (i % pictures.COLUMNS * pictures.SIZE, i // pictures.COLUMNS * pictures.SIZE)
        for style, path in sources.items():
            with Image.open(path) as image:
                small = image.convert("RGBA").resize((pictures.SIZE, pictures.SIZE), Image.Resampling.LANCZOS)
            sheets[style].paste(small, corner)
        names.append({"name": entry["name"].lower().replace("’", "'"), "code_point": codes[0], "fluent": bool(found)})
    pictures.FOLDER.mkdir(exist_ok=True)
    for style, sheet in sheets.items():
        sheet.save(pictures.FOLDER / f"{style}.webp", lossless=True, quality=100, method=6)
    (pictures.FOLDER / "names.json").write_text("[\n" + ",\n".join(json.dumps(name) for name in names) + "\n]\n")


def random_pictures(batch: int, generator: torch.Generator) -> Tensor:
    """Pictures of both styles, one background in three of any colour at all: the autoencoder's diet."""
    both = torch.tensor(pictures.names_in_both_styles())
    chosen = both[torch.randint(len(both), (batch,), generator=generator)]
    second = torch.rand(batch, generator=generator) < 0.5
    noto, fluent = (pictures.sprites(style)[chosen] for style in pictures.STYLES)
    rgba = torch.where(second[:, None, None, None], fluent, noto)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    rgba = torch.where(mirrored[:, None, None, None], rgba.flip(-1), rgba)
    palette = torch.tensor(tuple(pictures.BACKGROUNDS.values()))
    solid = palette[torch.randint(len(palette), (batch,), generator=generator)].float()
    free = torch.rand(batch, 3, generator=generator) * 255
    return pictures.composite(rgba, torch.where(torch.rand(batch, 1, generator=generator) < 1 / 3, free, solid))


def build_vae(steps: int, batch: int, save_every: int = 2000) -> None:
    """AutoencoderKL to 8x8x4 latents: L1 on pixels and on their differences, and a light KL; bfloat16 autocast."""
    from diffusers import AutoencoderKL
    from diffusers.training_utils import EMAModel

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    levels = (32, 64, 96)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=pictures.SIZE,
    )
    ema = EMAModel(vae.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        pixels = random_pictures(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        decoded = decoded.float()
        difference = decoded - pixels
        loss_pixels = difference.abs().mean()
        loss_edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        loss_kl = posterior.kl().float().mean() / (4 * 8 * 8)
        (loss_pixels + loss_edges + 1e-3 * loss_kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 50 == 0:
            deviation = posterior.mean.std() / posterior.std.mean()
            progress.set_postfix(l1=loss_pixels.item(), mse=difference.square().mean().item(), snr=deviation.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            save_vae(vae)
            ema.restore(vae.parameters())


@torch.no_grad()
def save_vae(vae: Any) -> None:
    """Write the autoencoder in float16 with the factor that gives its latents unit deviation."""
    pairs = [pictures.Picture(i, i % len(pictures.BACKGROUNDS)) for i in pictures.names_in_both_styles()]
    latents = torch.cat([vae.encode(pictures.draw(pairs, style)).latent_dist.mean for style in pictures.STYLES])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    # A copy: `from_config` would drop the factor, which the configuration still lists among its defaults.
    copy.deepcopy(vae).half().save_pretrained(MINIATURE / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    stage = stages.add_parser("pictures")
    stage.add_argument("--npm", type=Path, required=True, help="the node_modules folder")
    stage = stages.add_parser("vae")
    stage.add_argument("--steps", type=int, default=16000)
    stage.add_argument("--batch", type=int, default=16)
    stages.add_parser("tokenizer")
    stage = stages.add_parser("denoiser")
    stage.add_argument("--steps", type=int, default=8600)
    stage.add_argument("--batch", type=int, default=64)
    stage.add_argument("--learning_rate", type=float, default=1.5e-3)
    stage.add_argument("--device", default="cpu")
    stage.add_argument("--state", type=Path, help="safetensors file to resume from, if it exists, and to keep")
    stage.add_argument("--save_every_s", type=float, default=600)
    stage = stages.add_parser("classifier")
    stage.add_argument("--steps", type=int, default=2000)
    stage.add_argument("--batch", type=int, default=128)
    stage.add_argument("--learning_rate", type=float, default=3e-3)
    stage = stages.add_parser("evaluate")
    stage.add_argument("--count", type=int, default=1000, help="pictures of each group")
    stage.add_argument("--steps", type=int, default=25, help="DDIM steps")
    stage.add_argument("--grid", type=Path, help="image file to write, 128 pictures")
    options = vars(parser.parse_args())
    builders: dict[str, Callable[..., None]] = {
        "pictures": build_pictures,
        "vae": build_vae,
        "tokenizer": build_tokenizer,
        "denoiser": build_denoiser,
        "classifier": build_classifier,
        "evaluate": evaluate,
    }
    builders[options.pop("stage")](**options)


if __name__ == "__main__":
    main()
