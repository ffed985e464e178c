"""Options of the image that a network sees beside its own latents. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from d2f_fast.config import MAX_GUIDANCE, at_least, check_options, option
from d2f_fast.errors import RefusedInputError, printable


@dataclass(frozen=True)
class ImageOptions:
    """Choose the images that the network sees.

    Args:
        image: Image files, one for each prompt, that a model such as InstructPix2Pix changes as the prompt says. Each
            is resized and cropped in the middle to --height and --width. Such a model needs it, and others refuse it.
            Default: none.
        image_guidance_scale: Strength of the guidance by --image. Larger values keep more of the image. 1
            turns it off; above, the network is evaluated three times in place of two.

    Raises:
        RefusedInputError: An option has a value that it does not take.
    """

    image: tuple[str, ...] | None = option("image", None, metavar="FILE")
    image_guidance_scale: float = option("image", 1.0, at_least(1, MAX_GUIDANCE))

    def __post_init__(self) -> None:
        """Refuse values that an option does not take."""
        check_options(self)

    def check(self, prompts: int) -> None:
        """Refuse images that are missing, or not one for each prompt, and guidance without them.

        Args:
            prompts: Number of prompts.

        Raises:
            RefusedInputError: An option cannot be used; the message says what to change.
        """
        if self.image is None:
            if self.image_guidance_scale > 1:
                raise RefusedInputError(
                    f"image_guidance_scale {self.image_guidance_scale:g} has no image to guide by: give --image"
                )
            return
        if len(self.image) != prompts:
            raise RefusedInputError(f"image: give one file for each of the {prompts} prompts, got {len(self.image)}")
        for file in self.image:
            if not Path(file).is_file():
                raise RefusedInputError(f"image: {printable(file)} is not a file: check the path")

    def given(self) -> dict[str, object]:
        """Return the options by name where there is an image; nothing elsewhere."""
        if self.image is None:
            return {}
        return {"image": list(self.image), "image_guidance_scale": self.image_guidance_scale}
