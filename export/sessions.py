"""Open and run the graphs of an export folder with ONNX Runtime. Imports no torch."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from d2f_fast.errors import RefusedInputError

Array = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
Provider = str | tuple[str, dict[str, Any]]  # a name of ONNX Runtime's, or the name with the provider's own options

# Providers by the word that the command line has for them; a node that one cannot run goes to the next.
PROVIDERS: dict[str, list[Provider]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def default_providers() -> list[Provider]:
    """Return CUDA, then the CPU, where this onnxruntime has CUDA and there is a driver; the CPU alone elsewhere."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and _NVIDIA_DRIVER.exists():
        onnxruntime.preload_dlls()
        return PROVIDERS["cuda"]
    return PROVIDERS["cpu"]


class GraphSessions:
    """Sessions of the graphs in a folder, each opened at its first use.

    Args:
        folder: export folder.
        files: "files" of its report, used to say which file is damaged; may be empty.
        providers: providers to run with; None for `default_providers`. A provider that was named and does not load is
            refused; a default one is replaced by the CPU, with a warning.
        threads: threads of the CPU provider; 0 for one per core.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Any], providers: Sequence[Provider] | None, threads: int
    ) -> None:
        self.folder = folder
        self.opened: dict[str, onnxruntime.InferenceSession] = {}
        self._files = files
        self._are_named = providers is not None
        self._providers = list(default_providers() if providers is None else providers)
        self._threads = threads

    def session(self, graph: str) -> onnxruntime.InferenceSession:
        """Return the session of a graph, given by its path in the folder.

        Raises:
            RefusedInputError: the graph is missing or damaged, or a named provider does not load.
        """
        if graph not in self.opened:
            self.opened[graph] = self._open(graph)
        return self.opened[graph]

    def run(self, graph: str, feed: Mapping[str, Array | TokenIds]) -> list[Array]:
        """Return all outputs of a graph for its inputs by name.

        Raises:
            RefusedInputError: the graph is missing or damaged, or does not run on these inputs.
        """
        session = self.session(graph)
        with self.named(graph):
            return list(session.run(None, dict(feed)))

    @contextmanager
    def named(self, graph: str) -> Iterator[None]:
        """Turn ONNX Runtime's exceptions in the block into a RefusedInputError that names the file at fault."""
        try:
            yield
        except Exception as error:  # onnxruntime's own exceptions share no base class
            for name in (graph, f"{graph.partition('/')[0]}/model.onnx.data"):
                path, size = self.folder / name, dict(self._files.get(name) or {}).get("bytes")
                found = path.stat().st_size if path.is_file() else None
                if size is not None and found != size:
                    what = "is missing" if found is None else f"has {found} bytes of the {size} that were exported"
                    raise RefusedInputError(f"{path} {what}: copy the folder again, or export again") from error
            reason = str(error).splitlines()[0]
            raise RefusedInputError(f"{self.folder / graph} does not run ({reason}): export again") from error

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        path = self.folder / graph
        if not path.is_file():
            raise RefusedInputError(f"{path} is missing: export that component too")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        with self.named(graph):
            session = onnxruntime.InferenceSession(path, options, providers=self._providers)
        first = self._providers[0]
        name = first if isinstance(first, str) else first[0]
        if session.get_providers()[0] != name:  # ONNX Runtime has fallen back to another provider by itself
            missing = f"{name} does not load here (ONNX Runtime's log says why)"
            if self._are_named:
                raise RefusedInputError(f"{missing}: install what it needs, or choose cpu")
            warnings.warn(f"{missing}: the CPU is used instead", stacklevel=2)
            self._providers = list(PROVIDERS["cpu"])
        return session
