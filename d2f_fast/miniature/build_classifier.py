"""Train the classifier of the miniature's images: the stage `classifier` of `build.py`."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.build_denoiser import cosine
from d2f_fast.miniature.classifier import WEIGHTS, Classifier, load_classifier

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SEED = 0


@torch.no_grad()
def reconstructions(vae: "AutoencoderKL", pairs: Sequence[tuple[int, int]], style: str, seed: int) -> Tensor:
    """Pass images through the autoencoder, mirrored at random.

    Args:
        vae: the miniature's autoencoder.
        pairs: (name, colour) of B images.
        style: style of the images.
        seed: seed of the mirroring and of the latents.

    Returns:
        Images [B, 3, 32, 32] in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    mirrored = (torch.rand(len(pairs), generator=generator) < 0.5).tolist()
    chosen = [emoji.Emoji(*pair, mirror) for pair, mirror in zip(pairs, mirrored, strict=True)]
    decoded = []
    for start in tqdm(range(0, len(chosen), 64), desc=style, mininterval=5):
        latents = vae.encode(emoji.render(chosen[start : start + 64], style)).latent_dist.sample(generator)
        decoded.append(vae.decode(latents).sample.clamp(-1, 1))
    return torch.cat(decoded)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels, blur half of the batch, and add noise of a random strength."""
    down, right = (torch.randint(5, (2,), generator=generator)).tolist()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    shifted = padded[..., down : down + emoji.SIZE, right : right + emoji.SIZE]
    kernel = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(
        F.pad(shifted, (1, 1, 1, 1), mode="replicate"), kernel.outer(kernel).expand(3, 1, 3, 3), groups=3
    )
    blur = torch.rand(len(images), 1, 1, 1, generator=generator)
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(shifted.shape, generator=generator)
    return torch.where(blur < 0.5, shifted, torch.lerp(shifted, blurred, 2 * blur - 1)) + strength * noise


class TrainingImages:
    """Images that the classifier is trained and tested on, passed through the autoencoder.

    It is trained on a third of the (name, colour) combinations that the base model was trained on, and tested on the
    combinations that were held out, in both styles.
    """

    def __init__(self) -> None:
        vae = load_miniature().vae
        pairs = itertools.product(range(len(emoji.names())), range(len(emoji.BACKGROUNDS)))
        held_out = sorted(emoji.held_out_pairs())
        # 3 and 8 have no common divisor, so that a third of the combinations has every name and every colour.
        seen = [pair for pair in pairs if pair not in emoji.held_out_pairs()][::3]
        in_both = frozenset(emoji.names_in_both_styles())
        decoded, labels = [], []
        self.tests: dict[str, tuple[Tensor, Tensor]] = {}  # By style: images, names.
        for style_index, style in enumerate(emoji.STYLES):
            shown, test = (
                [pair for pair in group if style_index == 0 or pair[0] in in_both] for group in (seen, held_out)
            )
            decoded.append(reconstructions(vae, shown, style, SEED))
            labels.append(torch.tensor([(name, style_index) for name, _ in shown]))
            images = reconstructions(vae, test, style, SEED + 1)
            self.tests[style] = images, torch.tensor([name for name, _ in test])
        self._decoded, self._labels = torch.cat(decoded), torch.cat(labels)
        self._sprites = torch.stack([emoji.sprites(style) for style in emoji.STYLES])
        self._palette = torch.tensor(tuple(emoji.BACKGROUNDS.values()))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sample augmented images, three in five of them autoencoded, with their names and styles."""
        chosen = torch.randint(len(self._labels), (batch,), generator=generator)
        names, styles = self._labels[chosen].unbind(-1)
        backgrounds = self._palette[torch.randint(len(self._palette), (batch,), generator=generator)]
        clean = emoji.composite(self._sprites[styles, names], backgrounds)
        autoencoded = torch.rand(batch, 1, 1, 1, generator=generator) < 0.6
        flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(autoencoded, self._decoded[chosen], clean)
        return augment(torch.where(flipped, images.flip(-1), images), generator), names, styles


def build_classifier(steps: int, batch: int, learning_rate: float) -> None:
    """Train the classifier, save it in float16, and print its accuracy on held-out combinations.

    Args:
        steps: number of training steps.
        batch: images in a step.
        learning_rate: highest learning rate, after warm-up.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    data = TrainingImages()
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.05)
    progress = tqdm(range(steps), desc="classifier", mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(step, steps)
        images, names, styles = data.sample(batch, generator)
        features = classifier.features(images)
        loss = F.cross_entropy(classifier.name_head(features), names, label_smoothing=0.1)
        style_logits = classifier.style_head(features).squeeze(-1)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(style_logits, styles.float())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=loss.item())
    half = {key: value.half() if value.is_floating_point() else value for key, value in classifier.state_dict().items()}
    temporary = WEIGHTS.with_suffix(".new")
    save_file(half, temporary)
    temporary.replace(WEIGHTS)
    for style, (images, expected) in data.tests.items():
        ranks = ranks_of(load_classifier(), images, expected)
        print(f"autoencoded images of held-out combinations, {style}:", rank_line(ranks))


@torch.no_grad()
def ranks_of(classifier: Classifier, images: Tensor, names: Tensor) -> Tensor:
    """Return the rank of the right name among the classifier's guesses, [B]; 0 is the first guess.

    Args:
        classifier: classifier of names.
        images: images [B, 3, 32, 32] in [-1, 1].
        names: right names, [B] int64.
    """
    logits = torch.cat([classifier(part) for part in torch.split(images, 256)])
    return (logits > logits.gather(1, names[:, None])).sum(dim=1)


def rank_line(ranks: Tensor) -> str:
    """Return in words how often the right name is the first guess, and among the first five."""
    return f"name first {(ranks < 1).float().mean():.1%}, in the first five {(ranks < 5).float().mean():.1%}"
