"""Keep the finished parts of a demo, so that a demo that was stopped goes on from them.

OUTPUT/unfinished/settings.json         settings that the parts belong to
OUTPUT/unfinished/NAME.safetensors      one finished part: rows and images, or trained weights; whole or missing
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from d2f_fast.demo.measurements import Measurements
from d2f_fast.errors import CheckpointError, RefusedInputError, printable
from d2f_fast.files.atomic import make_folder
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_file import read_tensors, write_tensors

FOLDER, SETTINGS_FILE = "unfinished", "settings.json"
_IMAGES, _WEIGHT = "images ", "weight "  # beginnings of the tensors' keys


class KeptParts:
    """Finished parts of one demo in its output folder.

    Args:
        output: output folder of the demo, which must exist.
        settings: everything that the results depend on, in the types of JSON; parts of other settings are refused.

    Attributes:
        folder: folder of the parts.
        seconds_taken: wall time that other processes took for the parts used so far, in seconds.

    Raises:
        RefusedInputError: the folder holds parts of a demo with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, object]) -> None:
        self.folder, self.seconds_taken = output / FOLDER, 0.0
        known: dict[str, object] = json.loads(json.dumps(settings))
        if not (self.folder / SETTINGS_FILE).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)  # Parts without their settings could be of any demo.
            write_json(make_folder(self.folder) / SETTINGS_FILE, known)
            return
        found = read_json(self.folder / SETTINGS_FILE)
        found = found if isinstance(found, dict) else {}
        for name, value in known.items():
            if found.get(name) != value:
                was = printable(str(found.get(name))[:60])
                raise RefusedInputError(
                    f"{printable(self.folder)} holds parts of an unfinished demo with another {name} ({was}, not"
                    f" {str(value)[:60]}): remove it, or name another output_dir"
                )

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def measure(self, name: str, measurements: Measurements, measure: Callable[[], None]) -> None:
        """Add a part to the measurements: the one that is kept, or else what a function measures.

        Args:
            name: name of the part.
            measurements: measurements of the demo.
            measure: function that adds to the measurements.
        """

        def without_weights() -> Mapping[str, Tensor]:
            measure()
            return {}

        self.train(name, measurements, without_weights)

    def train(
        self, name: str, measurements: Measurements, train: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Add a training to the measurements, and return its weights: those that are kept, or else a function's.

        Args:
            name: name of the part.
            measurements: measurements of the demo.
            train: function that adds to the measurements, and returns trained weights by name.

        Raises:
            CheckpointError: a weight or an image is not finite.
            RefusedInputError: the disk is full.
        """
        path = self.folder / f"{name}.safetensors"
        try:
            return self._take(path, measurements)
        except (CheckpointError, KeyError, ValueError):
            pass  # The part is not finished, or its file is damaged.
        rows, shown, passes = len(measurements.rows), set(measurements.shown), measurements.progress.n
        started = time.monotonic()
        weights = train()
        part = {
            "rows": measurements.rows[rows:],
            "passes": measurements.progress.n - passes,
            "seconds": time.monotonic() - started,
        }
        images = {_IMAGES + json.dumps(key): tensor for key, tensor in measurements.shown.items() if key not in shown}
        write_tensors(path, {_WEIGHT + key: w for key, w in weights.items()} | images, {"part": json.dumps(part)})
        return weights

    def remove(self) -> None:
        """Remove all parts, once the results of the demo are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, path: Path, measurements: Measurements) -> Mapping[str, Tensor]:
        """Add a kept part to the measurements, and return its weights.

        Raises:
            CheckpointError: the part is missing or damaged.
            KeyError: an entry of the part is missing.
            ValueError: an entry of the part is not JSON.
        """
        tensors, header = read_tensors(path)
        part = json.loads(header["part"])
        rows, passes, seconds = part["rows"], part["passes"], part["seconds"]
        weights, shown = {}, {}
        for key, tensor in tensors.items():
            if key.startswith(_IMAGES):
                section, name, number = json.loads(key.removeprefix(_IMAGES))
                shown[section, name, number] = tensor
            else:
                weights[key.removeprefix(_WEIGHT)] = tensor
        measurements.rows += rows
        measurements.shown |= shown
        measurements.progress.update(passes)
        self.seconds_taken += seconds
        return weights
