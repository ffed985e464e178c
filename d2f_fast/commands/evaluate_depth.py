"""`d2f evaluate --task depth`: compare predicted depth with true depth."""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.depth_sampling import DepthSampling
from d2f_fast.config import MAX_STEPS, at_least, check_options, option, positive
from d2f_fast.data.depth_options import MAX_DEPTH, DepthOptions
from d2f_fast.files.lock import locked_folder
from d2f_fast.models.library_messages import silence_libraries

if TYPE_CHECKING:
    from d2f_fast.data.depth_source import DepthSource

_TITLES = {
    "abs_rel": "AbsRel, lower is better",
    "delta1": "δ1, higher is better",
    "rmse": "RMSE in m, lower is better",
    "log10": "log10, lower is better",
}


@dataclass(frozen=True)
class EvaluateDepth:
    """Compare the depth that a model predicts with the true depth of images, by Marigold's protocol.

    Required: --reference and --model. The measures are AbsRel, δ1, RMSE and log10 (docs/depth.md). It runs in float32
    on an NVIDIA GPU, or else on the CPU.

    Args:
        reference: Folder of images with their depth, as for `d2f train --task depth`; or the test images of NYUv2,
            KITTI, ETH3D, ScanNet or DIODE, whose regions and ranges are then those of the protocol.
        sampling: Model that predicts depth, and the options of its prediction.
        output_dir: Folder for metrics.json, which is replaced if it exists.
        num_samples: Number of images, from the first of the folder on. Default: all of them.
        task: What the model does: "depth", which these options belong to.
        depth_scale: Number in the depth files that stands for one metre, such as 1000 for millimetres. Default: metres
            for floating-point files; the unit of a data set whose layout is recognised.
        depth_min: Smallest depth that counts, in metres. Predictions are clipped to it.
        depth_max: Largest depth that counts, in metres. Predictions are clipped to it. Default: no limit in a plain
            folder; that of a recognised data set.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the numbers of metrics.json as one line of JSON, in place of the path of the folder. The table then
            goes to the error output.

    Examples:
        d2f evaluate --task depth --model run/pipeline --reference rooms/test --num_inference_steps 2
    """

    reference: str = field(metadata={"group": "essential", "metavar": "FOLDER"})
    sampling: DepthSampling
    output_dir: str = option("essential", "d2f-evaluation", metavar="FOLDER")
    num_samples: int | None = option("essential", None, at_least(1, MAX_STEPS))
    task: Literal["depth"] = option("essential", "depth")
    depth_scale: float | None = option("depth", None, positive(MAX_DEPTH))
    depth_min: float = option("depth", 0.0, at_least(0, MAX_DEPTH))
    depth_max: float | None = option("depth", None, positive(MAX_DEPTH))
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the measurements, what would be refused after them.

        Raises:
            RefusedInputError: An option, the folder, the LoRA file or the output folder cannot be used.
        """
        check_options(self)
        self._images()
        self.sampling.check(self.output_dir)

    def run(self) -> dict[str, Any]:
        """Measure, write what was measured, and return it.

        Raises:
            RefusedInputError: An option, an image, the model or the output folder cannot be used.
        """
        self.check()
        output = Path(self.output_dir)
        with locked_folder(output):
            return self._measure(output)

    def _measure(self, output: Path) -> dict[str, Any]:
        """Measure, and write into a folder that no other command uses."""
        started = time.monotonic()
        silence_libraries()
        from d2f_fast.evaluation.depth import error_intervals
        from d2f_fast.files.run_record import write_run_record
        from d2f_fast.tasks.depth import measure_depth

        images = self._images()
        count = min(len(images), self.num_samples or len(images))
        model, options = self.sampling.load(), self.sampling.of_prediction
        if options["processing_resolution"] is None:
            options["processing_resolution"] = images.processing_resolution
        if (processed := options["processing_resolution"]) is None:
            processed = model.pipeline.config.default_processing_resolution

        def progress(done: int) -> None:
            if done % 50 == 0:
                print(f"d2f: {done} of {count} images", file=sys.stderr)

        errors = measure_depth(model, images, count, progress, **options)
        row = {
            **self.sampling.row(model),
            "processing_resolution": processed,
            "reference": self.reference,
            "layout": images.layout,
            "samples": count,
            **{name: asdict(interval) for name, interval in error_intervals(errors, seed=self.sampling.seed).items()},
        }
        write_run_record(output, "d2f evaluate", self.sampling.seed, time.monotonic() - started, [row])
        print("\n".join(depth_table(row)), file=sys.stderr if self.json else sys.stdout)
        return row | {"output": str(output)}

    def _images(self) -> "DepthSource":
        """Return the images with their depth."""
        from d2f_fast.data.depth_data import find_depth_images

        units = DepthOptions(depth_scale=self.depth_scale, depth_min=self.depth_min, depth_max=self.depth_max)
        return find_depth_images(self.reference, units)


def depth_table(row: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of a row.

    Args:
        row: Row of metrics.json.
    """
    steps, ensemble = row["steps"], row["ensemble_size"]
    return [
        f"Depth of {row['samples']} images at {steps} step{'' if steps == 1 else 's'}, ensemble of {ensemble}",
        "",
        "| measure | mean | 95 % interval |",
        "|---|---|---|",
        *(
            f"| {title} | {row[name]['value']:.4f} | {row[name]['low']:.4f} to {row[name]['high']:.4f} |"
            for name, title in _TITLES.items()
        ),
    ]
