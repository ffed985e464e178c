"""Build the miniature from two npm packages, stage by stage; each stage is seeded, and can be run again alone.

npm install emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
python -m d2f_fast.miniature.build pictures --npm node_modules
python -m d2f_fast.miniature.build vae
python -m d2f_fast.miniature.build tokenizer
python -m d2f_fast.miniature.build denoiser --state denoiser.safetensors
python -m d2f_fast.miniature.build classifier
python -m d2f_fast.miniature.build reflow --folder reflow
python -m d2f_fast.miniature.build evaluate

The stage `images` writes the emoji as an image folder with captions, at a size that the miniature was not trained for:
python -m d2f_fast.miniature.build images --npm node_modules --size 64 --split train --output emoji/64/train

The shipped text encoder and UNet were trained for 8,600 steps of 64 images on two CPU cores, in two parts: 3,640 steps
with a cosine schedule that ended there, then on to step 8,600 from the file of `--state`. The command above trains in
one part, so its result differs in detail.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from d2f_fast.miniature.build_classifier import build_classifier
from d2f_fast.miniature.build_denoiser import build_denoiser
from d2f_fast.miniature.build_images import SPLITS, build_images
from d2f_fast.miniature.build_reflow import build_reflow
from d2f_fast.miniature.build_sheets import build_sheets
from d2f_fast.miniature.build_tokenizer import build_tokenizer
from d2f_fast.miniature.build_vae import build_vae
from d2f_fast.miniature.emoji import STYLES
from d2f_fast.miniature.evaluate import evaluate

BUILDERS: dict[str, Callable[..., None]] = {
    "pictures": build_sheets,
    "vae": build_vae,
    "tokenizer": build_tokenizer,
    "denoiser": build_denoiser,
    "classifier": build_classifier,
    "reflow": build_reflow,
    "evaluate": evaluate,
    "images": build_images,
}


def main() -> None:
    """Run the stage that the command line names."""
    options = vars(_parser().parse_args())
    BUILDERS[options.pop("stage")](**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return stages.add_parser(name, help=text, description=text)

    def add_training(
        stage: argparse.ArgumentParser, steps: int, batch: int, learning_rate: float | None = None
    ) -> None:
        stage.add_argument("--steps", type=int, default=steps, help="training steps (default %(default)s)")
        stage.add_argument("--batch", type=int, default=batch, help="images in a step (default %(default)s)")
        if learning_rate is not None:
            text = "highest learning rate, after warm-up (default %(default)s)"
            stage.add_argument("--learning_rate", type=float, default=learning_rate, help=text)

    stage = add("pictures", "Make the sprite sheets and the list of names.")
    stage.add_argument("--npm", type=Path, required=True, help="node_modules folder that holds both npm packages")
    add_training(add("vae", "Train the autoencoder."), 16000, 16)
    add("tokenizer", "Train the tokenizer on the captions.")
    stage = add("denoiser", "Train the text encoder and the UNet.")
    add_training(stage, 8600, 64, 1.5e-3)
    stage.add_argument("--device", default="cpu", help="torch device to train on (default %(default)s)")
    text = "safetensors file to save the training state in, and to resume from if it exists (default: none)"
    stage.add_argument("--state", type=Path, help=text)
    text = "seconds between two saves (default %(default)s)"
    stage.add_argument("--save_every_s", type=float, default=600, help=text)
    add_training(add("classifier", "Train the classifier of names and styles."), 2000, 128, 3e-3)
    stage = add("reflow", "Make pairs, and train the reflow LoRA on them.")
    stage.add_argument("--folder", type=Path, required=True, help="folder for the pairs and the run")
    stage.add_argument("--pairs", type=int, default=13110, help="number of pairs (default %(default)s)")
    stage.add_argument("--steps", type=int, default=3000, help="training steps (default %(default)s)")
    stage = add("evaluate", "Print how many generated images show the background colour and name of their caption.")
    text = "images of trained combinations, and of held-out ones (default %(default)s)"
    stage.add_argument("--count", type=int, default=1000, help=text)
    stage.add_argument("--steps", type=int, default=25, help="DDIM steps for each image (default %(default)s)")
    stage.add_argument("--grid", type=Path, help="image file to write 128 generated images to (default: none)")
    stage = add("images", "Write the emoji of one style as an image folder with captions.")
    stage.add_argument("--npm", type=Path, required=True, help="node_modules folder that holds both npm packages")
    stage.add_argument("--output", type=Path, required=True, help="folder to write, which must not exist")
    text = "side of the images in pixels: 1 to 64 for noto, 1 to 256 for fluent (default %(default)s)"
    stage.add_argument("--size", type=int, default=64, help=text)
    stage.add_argument("--style", choices=STYLES, default="noto", help="style of the emoji (default %(default)s)")
    text = "combinations of name and colour, which the base was trained on or not (default %(default)s)"
    stage.add_argument("--split", choices=SPLITS, default="train", help=text)
    stage.add_argument("--count", type=int, help="number of images, chosen at random (default: all of the split)")
    return parser


if __name__ == "__main__":
    main()
