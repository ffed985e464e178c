"""A small network that names the miniature's pictures: it judges what a model draws, and gives a space of styles."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from d2f_fast.miniature import pictures

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
FEATURES = 64


class Classifier(nn.Module):
    """Convolutions to 64 features, and two linear readings of them: the name, and the style it is drawn in.

    Both readings share the features, so that distances between them see what is drawn as well as how.
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
        self.name_head = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.SiLU(), nn.Linear(FEATURES, len(pictures.names())))
        self.style_head = nn.Linear(FEATURES, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Features of pictures, [B, 64]; `pixels` [B, 3, 32, 32] in [-1, 1]."""
        return self.trunk(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits over `pictures.names()`, [B, names]; `pixels` [B, 3, 32, 32] in [-1, 1]."""
        return self.name_head(self.features(pixels))


def load_classifier() -> Classifier:
    """Load the shipped classifier, float32, in evaluation mode."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(WEIGHTS))  # copied into float32 parameters
    return classifier.eval()
