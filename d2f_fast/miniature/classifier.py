"""Classify the miniature's images by name and style, and give the features in which sets of images are compared."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from d2f_fast.miniature import emoji

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
FEATURES = 64


class Classifier(nn.Module):
    """Convolutions to 64 features, and two heads on these features: one for the name, one for the style.

    The heads share the features, so that distances between features depend on the subject and on the style.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.SiLU()]
        for narrow, wide in zip(widths, (*widths[1:], widths[-1]), strict=True):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=2 if wide > narrow else 1, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, FEATURES))
        self.name_head = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.SiLU(), nn.Linear(FEATURES, len(emoji.names())))
        self.style_head = nn.Linear(FEATURES, 1)

    def features(self, images: Tensor) -> Tensor:
        """Return features [B, 64] of images [B, 3, 32, 32] in [-1, 1]."""
        features: Tensor = self.trunk(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, names], in the order of `emoji.names()`, of images [B, 3, 32, 32] in [-1, 1]."""
        logits: Tensor = self.name_head(self.features(images))
        return logits


def load_classifier() -> Classifier:
    """Load the classifier of this package, in float32 and evaluation mode."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(WEIGHTS))  # The file holds float16; the parameters are float32.
    return classifier.eval()
