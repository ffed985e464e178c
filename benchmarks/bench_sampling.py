"""Measure sampling from prompt to image, with guidance, text encoder and autoencoder.

    pytest --benchmark benchmarks/bench_sampling.py -m "not slow"     # the embedded miniature, 32 x 32 pixels
    pytest --benchmark --keep FOLDER benchmarks/bench_sampling.py     # and a model of SD1.5's size, 256 x 256 pixels

Providers: "diffusers" eager and "diffusers_compiled" by torch.compile, both with `Diff2FlowScheduler`; and the three
forms of an export in ONNX Runtime, "onnx_folder", "onnx_loop" and "onnx_unrolled". Each runs in a process of its own,
one after the other, on the same threads; its images are compared with those of diffusers before its times are written
to `results/<device>-sampling.csv`. With `--keep`, the large model with random weights, its export and diffusers' images
outlive the run, so that single providers can be run again by `-k`.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions

WORKER = Path(__file__).with_name("sampling.py")
STEPS, UNROLLED = (1, 2, 4, 25), 4
PROVIDERS = ("diffusers", "diffusers_compiled", "onnx_folder", "onnx_loop", "onnx_unrolled")


@dataclass(frozen=True)
class Subject:
    """A model, its export, and the folder of its noise and images.

    Args:
        name: name of the model in the rows.
        source: "miniature", or the folder of the pipeline.
        graphs: folder of the export.
        work: folder of the noise and the images.
        side: height and width of the images in pixels.
        rounds: timed calls for each number of steps.
    """

    name: str
    source: str
    graphs: Path
    work: Path
    side: int
    rounds: dict[int, int]

    def run(self, provider: str) -> dict[str, Any]:
        """Run a provider in a process of its own, and return what it measured."""
        steps = [UNROLLED] if provider == "onnx_unrolled" else list(STEPS)
        settings = {
            "provider": provider,
            "model": self.source,
            "graphs": str(self.graphs),
            "side": self.side,
            "steps": steps,
            "rounds": self.rounds,
            "noise": str(self.work / "noise.npy"),
            "images": str(self.work / f"{provider}.npz"),
        }
        (self.work / "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, str(WORKER), str(self.work / "settings.json")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=WORKER.parent.parent)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def file_mb(self, provider: str) -> float:
        """Return the size in megabytes of the files that a provider reads."""
        if provider.startswith("diffusers"):
            from d2f_fast import miniature

            folder = Path(miniature.__file__).parent / "pipeline" if self.source == "miniature" else Path(self.source)
            return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
        graph = {"onnx_folder": "model", "onnx_loop": "sampler", "onnx_unrolled": f"sampler_{UNROLLED}"}[provider]
        files = [self.graphs / "unet" / f"{graph}.onnx", self.graphs / "unet" / "model.onnx.data"]
        files += [self.graphs / name / "model.onnx" for name in ("text_encoder", "vae_decoder")]
        return sum(path.stat().st_size for path in files) / 1e6


@pytest.fixture(scope="module", params=["miniature", pytest.param("sd15_size", marks=pytest.mark.slow)])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dry_run: bool) -> Subject:
    name = request.param
    is_small = name == "miniature"
    if dry_run and not is_small:
        pytest.skip("a dry run measures the miniature only")
    source = name if is_small else str(request.getfixturevalue("sd15_folder"))
    kept = request.config.getoption("--keep")
    work = Path(kept) / f"{name}-sampling" if kept else tmp_path_factory.mktemp(name)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "graphs").exists():
        components = "unet,text_encoder,vae_decoder,sampler"
        options = {"components": components, "unroll": UNROLLED, "steps": ",".join(map(str, STEPS))}
        export_folder(ExportOptions(model=source, output=str(work / "graphs"), **options))  # type: ignore[arg-type]
    side, factor = (32, 4) if is_small else (256, 8)
    np.save(
        work / "noise.npy", np.random.default_rng(0).standard_normal((1, 4, side // factor, side // factor), np.float32)
    )
    rounds = {steps: 1 if dry_run else 15 if is_small else 1 if steps > 4 else 3 for steps in STEPS}
    return Subject(name, source, work / "graphs", work, side, rounds)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_sampling(subject: Subject, provider: str, record: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    if not (subject.work / "diffusers.npz").exists() or provider == "diffusers":
        measured = subject.run("diffusers")
        (subject.work / "diffusers.json").write_text(json.dumps(measured))
    if provider != "diffusers":
        measured = subject.run(provider)
    eager = json.loads((subject.work / "diffusers.json").read_text())
    want, got = (np.load(subject.work / f"{name}.npz") for name in ("diffusers", provider))
    for steps, seconds in measured["seconds"].items():
        difference = int(np.abs(got[steps].astype(np.int16) - want[steps].astype(np.int16)).max())
        assert difference <= 2, (steps, difference)
        median = statistics.median(seconds)
        record(
            "sampling",
            {
                "case": subject.name,
                "steps": steps,
                "provider": provider,
                "picture_ms": f"{1e3 * median:.2f}",
                "fastest_ms": f"{1e3 * min(seconds):.2f}",
                "slowest_ms": f"{1e3 * max(seconds):.2f}",
                "rounds": len(seconds),
                "vs_diffusers": f"{statistics.median(eager['seconds'][steps]) / median:.3f}",
                "load_s": f"{measured['load_s']:.2f}",
                "file_mb": f"{subject.file_mb(provider):.1f}",
                "peak_mib": f"{measured['peak_mib']:.0f}",
                "largest_difference": difference,
            },
        )
