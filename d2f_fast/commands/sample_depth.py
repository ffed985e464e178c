"""`d2f sample --task depth`: predict the depth of images."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.checks import say_sampling
from d2f_fast.commands.depth_sampling import DepthSampling
from d2f_fast.commands.sample import earlier_rows
from d2f_fast.commands.sample_files import find_images
from d2f_fast.config import check_options, option
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.lock import locked_folder
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.sampling.options import ChosenSteps

if TYPE_CHECKING:
    from d2f_fast.tasks.depth import DepthPrediction


@dataclass(frozen=True)
class SampleDepth:
    """Predict the depth of images with a model of `d2f train --task depth`, in few steps.

    Required: --image and --model. It runs in float32 on an NVIDIA GPU, or else on the CPU.

    Args:
        image: One or more image files, or folders of images.
        sampling: Model that predicts depth, and the options of its prediction.
        output_dir: Folder for the depth of each image as NAME.npy (float32 from 0 to 1), NAME_16bit.png and the
            coloured NAME_preview.png, and for metrics.json. It is an error if a NAME.npy exists.
        task: What the model does: "depth", which these options belong to.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (steps, number and paths of the files) as one line of JSON, in place of the path of the
            folder.

    Examples:
        d2f sample --task depth --model run/pipeline --image photo.jpg
        d2f sample --task depth --model run/pipeline --image photos --ensemble_size 10
    """

    image: tuple[str, ...] = field(metadata={"group": "essential", "metavar": "PATH"})
    sampling: DepthSampling
    output_dir: str = option("essential", "d2f-depth", metavar="FOLDER")
    task: Literal["depth"] = option("essential", "depth")
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the sampling, what would be refused after them.

        Raises:
            RefusedInputError: An option, an image, the model, the LoRA file or the output folder cannot be used.
        """
        from d2f_fast.data.image_headers import stored_size

        check_options(self)
        output = Path(self.output_dir)
        for path in find_images(self.image):
            stored_size(path)  # This refuses a damaged file before the results of others are written.
            if (existing := output / f"{path.stem}.npy").exists():
                raise RefusedInputError(f"{printable(existing)} exists: choose another output_dir, or move it away")
        self.sampling.check(self.output_dir)

    def run(self) -> dict[str, Any]:
        """Predict the depth of the images, write it, and return what was written.

        Raises:
            RefusedInputError: An option, an image, the model or the output folder cannot be used.
        """
        self.check()
        output = Path(self.output_dir)
        with locked_folder(output):
            return self._predict(output, earlier_rows(output))

    def _predict(self, output: Path, earlier: list[Any]) -> dict[str, Any]:
        """Predict, and write into a folder that no other command uses."""
        started = time.monotonic()
        silence_libraries()
        from d2f_fast.data.images import read_image, to_rgb
        from d2f_fast.data.loading import refused_sample
        from d2f_fast.files.run_record import write_run_record

        model, given = self.sampling.load(), self.sampling.num_inference_steps
        row = self.sampling.row(model)
        say_sampling(ChosenSteps(row["steps"], "as saved with the model" if given is None else "as given"))
        images, files = find_images(self.image), list[Path]()
        for path in images:
            with refused_sample(printable(path)):
                image = to_rgb(read_image(path))
            prediction = model.predict(image, name=printable(path), **self.sampling.of_prediction)
            files += write_prediction(output / path.stem, prediction)
        row |= {"samples": len(images)}
        rows = [*earlier, row | {"files": [file.name for file in files]}]
        write_run_record(output, "d2f sample", self.sampling.seed, time.monotonic() - started, rows)
        return row | {"files": [str(file) for file in files], "output": str(output)}


def write_prediction(stem: Path, prediction: "DepthPrediction") -> list[Path]:
    """Write the depth of one image, each file whole or not at all, and return the files.

    Args:
        stem: Path of the files without their endings.
        prediction: Predicted depth.

    Raises:
        RefusedInputError: The disk is full.
    """
    import numpy as np

    from d2f_fast.files.atomic import atomic_path
    from d2f_fast.tasks.depth import colour_preview, depth_png

    arrays = {".npy": prediction.values, "_uncertainty.npy": prediction.uncertainty}
    pictures = {"_16bit.png": depth_png(prediction), "_preview.png": colour_preview(prediction)}
    written = []
    for ending, values in arrays.items():
        if values is not None:
            with atomic_path(path := stem.with_name(stem.name + ending)) as temporary, temporary.open("wb") as file:
                np.save(file, values.astype(np.float32))
            written.append(path)
    for ending, image in pictures.items():
        with atomic_path(path := stem.with_name(stem.name + ending)) as temporary:
            image.save(temporary, format="PNG")
        written.append(path)
    return written
