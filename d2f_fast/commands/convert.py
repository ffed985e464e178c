"""`d2f convert`: convert models and LoRA files between the forms that other programs read."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from d2f_fast.commands.checks import check_lora_forms, check_merge, check_readers
from d2f_fast.config import MAX_RANK, at_least, check_options, option
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.lock import locked_place
from d2f_fast.lora.source import KOHYA_ENDING, LORA_FILE, check_lora_file, lora_path, parse_lora
from d2f_fast.lora.tags import common_tags
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE, check_model_name
from d2f_fast.models.options import ModelOptions

if TYPE_CHECKING:
    import torch
    from diffusers import DPMSolverMultistepScheduler

    from d2f_fast.lora.forms import Networks
    from d2f_fast.lora.resize import Layers
    from d2f_fast.models.convert import ModelWeights

OutputForm = Literal["diffusers", "single_file", "peft", "kohya"]
_MODEL_FORMS, _LORA_FORMS = ("diffusers", "single_file"), ("peft", "kohya")
# All that may be in a folder which --overwrite replaces: the files and folders of a diffusers model.
_MODEL_ENTRIES = {
    *("model_index.json", "d2f.json", "README.md", "unet", "vae", "scheduler", "tokenizer", "tokenizer_2"),
    *("text_encoder", "text_encoder_2", "safety_checker", "feature_extractor", "image_encoder"),
}


class Input(NamedTuple):
    """What is converted.

    Attributes:
        name: Hub id, file or folder.
        scale: Factor on a LoRA; 1 for a model.
        is_lora: Whether it is a LoRA, and not a model.
    """

    name: str
    scale: float
    is_lora: bool


@dataclass(frozen=True)
class Convert:
    """Convert models and LoRA files to other forms; merge, extract and resize LoRA.

    Required: INPUT and OUTPUT. The model options say what INPUT is, and are an error where it is a LoRA.

    Args:
        input: Model or LoRA to convert. A model is a diffusers folder, a .safetensors file with all its parts, or a
            Hugging Face id; a LoRA is a .safetensors file, with a scale if you like, as FILE:0.8. The folder of a run
            stands for its result.
        output: File to write, if the name ends in .safetensors, or folder.
        to: Form of the output. Of a model, "diffusers" is a folder, and "single_file" one .safetensors file for
            ComfyUI, A1111 and Forge. Of a LoRA, "peft" is the file that diffusers reads, and "kohya" the one for the
            other programs. Default: "diffusers" or "peft" if OUTPUT is a folder (or a LoRA named
            pytorch_lora_weights.safetensors), "single_file" or "kohya" if it is a file.
        dtype: Type of the weights in the output. Default: that of the input; fp32 with --extract_lora_from.
        lora: LoRA to add, each as PATH or PATH:SCALE: they are merged into a model, or joined with a LoRA to one whose
            rank is the sum of the ranks. Default: none.
        extract_lora_from: Base model of INPUT, which was finetuned from it in full. The output is then a LoRA of what
            the two differ by; it needs --rank. Default: nothing is extracted.
        rank: Largest rank of the LoRA in the output. Layers of a larger rank are approximated. Default: the ranks are
            kept.
        base_model: Diffusers folder of the model that a LoRA belongs to, or "miniature". It is needed only if that
            model is none of Stable Diffusion 1.x, 2.x and SDXL, or has other layers. Default: found from the LoRA.
        model_options: Options of the model.
        overwrite: Replace the output if it exists, which is an error otherwise. A folder that holds anything but a
            model is never replaced.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (form, what was written, its size in bytes, path) as one line of JSON, in place of the
            path of the output.

    Examples:
        d2f convert run/pipeline style.safetensors --dtype fp16
        d2f convert MODEL merged.safetensors --lora run:0.8 other.safetensors
        d2f convert run style_kohya.safetensors --rank 16
    """

    input: str = field(metadata={"positional": True})
    output: str = field(metadata={"positional": True})
    to: OutputForm | None = option("essential", None)
    dtype: Literal["fp16", "bf16", "fp32"] | None = option("essential", None)
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    extract_lora_from: str | None = option("essential", None, metavar="MODEL")
    rank: int | None = option("essential", None, at_least(1, MAX_RANK))
    base_model: str | None = option("essential", None, metavar="FOLDER")
    model_options: ModelOptions = field(default_factory=ModelOptions)
    overwrite: bool = option("essential", False)
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse an input, an output or options that cannot be used.

        Raises:
            RefusedInputError: An option, the input or the output cannot be used.
        """
        self._settled()

    def _settled(self) -> tuple[Input, OutputForm, Path]:
        """Return the input, and the form and the path of the output."""
        check_options(self)
        source = self._input()
        form = self._form(source)
        output = self._output_path(source, form)
        if self.extract_lora_from is not None:
            check_model_name(self.extract_lora_from)
        added = [check_lora_file(parse_lora(entry).path) for entry in self.lora]
        check_readers(source.name, added, form, is_lora=source.is_lora)
        if source.is_lora:
            loras = [lora_path(source.name), *added]
            check_lora_forms(self.base_model, loras, output if form == "kohya" else None)
            common_tags(loras, shift=1.0)  # Where their shifts differ, none is taken.
        elif self.lora:
            check_merge(source.name, self.lora, self.model_options)
        return source, form, output

    def run(self) -> dict[str, Any]:
        """Convert the input, and return what was written and where.

        Raises:
            RefusedInputError: An option, the input or the output cannot be used; nothing was written.
        """
        source, form, output = self._settled()
        with locked_place(output.resolve()):  # Two commands would replace each other's output.
            return self._convert(source, output, form)

    def _convert(self, source: Input, output: Path, form: OutputForm) -> dict[str, Any]:
        """Convert the input to an output that no other command writes."""
        output = self._output_path(source, form)  # Another command may have written it meanwhile.
        silence_libraries()
        if self.extract_lora_from is not None:
            details = self._extract(source, output, form)
        elif source.is_lora:
            details = self._convert_lora(source, output, form)
        else:
            details = self._convert_model(source, output, form)
        files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
        return {"to": form, **details, "bytes": sum(path.stat().st_size for path in files), "output": str(output)}

    def _input(self) -> Input:
        """Return the input, or refuse one that is neither a model nor a LoRA."""
        from d2f_fast.commands.kind import kind_of
        from d2f_fast.models.names import PICKLE_SUFFIXES, check_model_name

        if not self.input or not self.output:
            raise RefusedInputError(f"{'output' if self.input else 'input'} is empty: give a file or a folder")
        path, scale = parse_lora(self.input)
        if self.input == MINIATURE:
            return Input(MINIATURE, 1.0, False)
        if not path.exists() and path.suffix not in {*PICKLE_SUFFIXES, ".safetensors"}:
            check_model_name(self.input)
            return Input(self.input, 1.0, False)  # A hub id.
        kind = kind_of(path)
        if kind == "run":
            is_full = (path / "pipeline").is_dir()
            return Input(str(path / "pipeline"), 1.0, False) if is_full else Input(str(path), scale, True)
        if kind not in ("model folder", "model file", "LoRA"):
            raise RefusedInputError(
                f"{printable(path)} is neither a model nor a LoRA ({kind}): `d2f inspect` says what is in it"
            )
        return Input(str(path), scale, kind == "LoRA")

    def _form(self, source: Input) -> OutputForm:
        """Return the form of the output, or refuse options that contradict each other."""
        gives_lora = source.is_lora or self.extract_lora_from is not None
        output = Path(self.output)
        is_file = output.suffix == ".safetensors"
        if output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise RefusedInputError(f"output: {output.name} would be a pickle: give a name that ends in .safetensors")
        form: OutputForm | None = self.to
        if form is None and gives_lora:
            form = "kohya" if is_file and output.name != LORA_FILE else "peft"
        elif form is None:
            form = "single_file" if is_file else "diffusers"
        kind, forms = ("LoRA", _LORA_FORMS) if gives_lora else ("model", _MODEL_FORMS)
        if form not in forms:
            raise RefusedInputError(f"to: the result is a {kind}, so give {' or '.join(forms)}, got {form}")
        if form == "single_file" and not is_file:
            raise RefusedInputError(f"output: a single file must end in .safetensors, got {printable(output)}")
        if form == "diffusers" and is_file:
            raise RefusedInputError(f"output: a diffusers folder has no ending, got {printable(output)}")
        if self.extract_lora_from is not None:
            if source.is_lora or self.lora or self.rank is None:
                raise RefusedInputError("extract_lora_from: give a finetuned model as input, --rank, and no --lora")
        elif not source.is_lora and self.rank is not None:
            raise RefusedInputError("rank: the input is a model, whose LoRA is found with --extract_lora_from BASE")
        given = [name for name, value in asdict(self.model_options).items() if value is not None]
        if source.is_lora and given:
            raise RefusedInputError(f"{given[0]}: the input is a LoRA, and this is an option of models: leave it out")
        if self.base_model is not None and not source.is_lora:
            raise RefusedInputError("base_model: the input is a model, and this is an option of LoRA: leave it out")
        return form

    def _output_path(self, source: Input, form: OutputForm) -> Path:
        """Return the file or folder to write, or refuse one that exists."""
        from d2f_fast.files.atomic import check_writable

        output = Path(self.output)
        if form in _LORA_FORMS and output.suffix != ".safetensors":
            output = output / (LORA_FILE if form == "peft" else f"{output.resolve().name}{KOHYA_ENDING}")
        if output.exists() and not self.overwrite:
            raise RefusedInputError(f"{printable(output)} exists: add --overwrite, or choose another output")
        if output.exists() and output.is_dir() != (form == "diffusers"):
            raise RefusedInputError(f"{printable(output)} is of another kind than the output: choose another output")
        if output.is_dir() and (foreign := sorted({entry.name for entry in output.iterdir()} - _MODEL_ENTRIES)):
            raise RefusedInputError(
                f"{printable(output)} holds {printable(foreign[0])}, which is no part of a model and would be lost:"
                " choose another output"
            )
        check_writable(output)
        return output

    def _convert_model(self, source: Input, output: Path, form: OutputForm) -> dict[str, Any]:
        """Write a model, with LoRA merged into it, and return details of the result."""
        from d2f_fast.files.atomic import make_folder
        from d2f_fast.lora.merge import fuse_adapter
        from d2f_fast.models import convert
        from d2f_fast.models.load import load_model, local_source
        from d2f_fast.models.tags import take_trained_size

        local = local_source(source.name, self.model_options)  # the folder of a hub id, which has the tags
        dtype = None if self.dtype is None else _torch_dtype(self.dtype)
        loras = [parse_lora(entry) for entry in self.lora]
        paths = [path for path, _ in loras]
        tags, scheduler = _tags_with_lora(local, self.model_options, paths, form)
        if form == "single_file" and (not loras or convert.can_stream(source.name, self.model_options)):
            model = convert.read_model(source.name, self.model_options)
            model = convert.with_lora(model, loras, dtype) if loras else model
        else:
            kept = convert.stored_dtype(source.name)
            loaded = load_model(source.name, kept if not loras else _torch_dtype("fp32"), self.model_options)
            for path, scale in loras:
                fuse_adapter(loaded.pipeline, path, scale)
            take_trained_size(loaded.pipeline, local, paths, squares_only=True)
            print(f"d2f: {printable(source.name)} is {loaded.facts}", file=sys.stderr)
            dtype = dtype or kept
            if form == "diffusers":
                loaded.pipeline.scheduler = scheduler or loaded.pipeline.scheduler
                convert.write_folder(loaded.pipeline, output, dtype, tags, overwrite=self.overwrite)
                kind = tags.get("d2f.prediction_type", loaded.facts.prediction_type)
                return {"family": loaded.facts.family, "prediction_type": kind}
            model = convert.weights_of_pipeline(loaded.pipeline, source.name, tags)
        if scheduler is not None:
            model = replace(model, configs={**model.configs, "scheduler": dict(scheduler.config)})
        make_folder(output.parent)
        for warning in convert.write_single_file(replace(model, tags=tags), output, dtype):
            print(f"d2f: {warning}", file=sys.stderr)
        return {"family": model.family, "prediction_type": model.prediction_type}

    def _convert_lora(self, source: Input, output: Path, form: OutputForm) -> dict[str, Any]:
        """Write a LoRA, with others joined to it, and return details of the result."""
        from d2f_fast.files.tensor_header import read_tensor_header
        from d2f_fast.lora.forms import kept_entries, layers_by_name
        from d2f_fast.lora.header import common_family
        from d2f_fast.lora.read import read_lora
        from d2f_fast.lora.resize import added

        loras = [(Path(source.name), source.scale), *map(parse_lora, self.lora)]
        files = [(read_lora(path), scale) for path, scale in loras]
        networks = self._networks(common_family([file.about for file, _ in files]))
        layers = added([(layers_by_name(file, networks), scale) for file, scale in files])
        tags = [kept_entries(file.header) for file, _ in files]
        common = {name: value for name, value in tags[0].items() if all(other.get(name) == value for other in tags)}
        common |= common_tags([path for path, _ in loras], shift=1.0)
        names = {"v": "v_prediction"}
        prediction_type = files[0][0].header.get("modelspec.prediction_type", "epsilon")
        prediction_type = common.get("d2f.prediction_type", names.get(prediction_type, prediction_type))
        headers = [read_tensor_header(file.path) for file, _ in files]
        dtype = self.dtype or _widest([info.dtype for header in headers for info in header.tensors.values()])
        title = "+".join(path.name.removesuffix(".safetensors") for path, _ in loras)
        return self._write_lora(layers, output, form, networks, title, prediction_type, common, dtype)

    def _extract(self, source: Input, output: Path, form: OutputForm) -> dict[str, Any]:
        """Write the LoRA between two models, and return details of the result."""
        from d2f_fast.lora.extract import extract_lora
        from d2f_fast.models.convert import read_model

        assert self.extract_lora_from is not None and self.rank is not None
        base_is_file, options = Path(self.extract_lora_from).is_file(), self.model_options
        same = ModelOptions(tokenizer_name_or_path=options.tokenizer_name_or_path)
        base = read_model(self.extract_lora_from, same if base_is_file else None)
        if base_is_file and not Path(source.name).is_file():
            options = replace(options, tokenizer_name_or_path=None)  # Only the base needs it.
        tuned = read_model(source.name, options)
        networks = self._networks(tuned.family, tuned)
        found = extract_lora(base.components, tuned.components, self.rank)
        if found.left_out:
            print(
                f"d2f: {len(found.left_out)} tensors changed that no LoRA holds and are left out, such as"
                f" {found.left_out[0]}",
                file=sys.stderr,
            )
        details = self._write_lora(
            found.layers, output, form, networks, tuned.title, tuned.prediction_type, tuned.tags, self.dtype or "fp32"
        )
        return {**details, "relative_error": found.relative_error, "left_out": len(found.left_out)}

    def _networks(self, family: Any, model: "ModelWeights | None" = None) -> "Networks | None":
        """Return the networks that the layers of a LoRA are named after, or None where they are not known."""
        from d2f_fast.models.configs import MINIATURE_FOLDER
        from d2f_fast.models.skeleton import skeleton_of_family, skeleton_of_folder

        folder = self.base_model if model is None else model.source
        if folder == MINIATURE:
            return skeleton_of_folder(MINIATURE_FOLDER)
        if folder is not None and Path(folder).is_dir():
            return skeleton_of_folder(Path(folder))
        return None if family is None else skeleton_of_family(family)

    def _write_lora(
        self,
        layers: "Layers",
        output: Path,
        form: OutputForm,
        networks: "Networks | None",
        title: str,
        prediction_type: str,
        tags: Mapping[str, str],
        dtype: str,
    ) -> dict[str, Any]:
        """Write a LoRA file, cut to the rank that was asked for, and return details of the result."""
        from d2f_fast.files.atomic import make_folder
        from d2f_fast.lora.forms import write_lora_form
        from d2f_fast.lora.resize import resized

        if self.rank is not None:
            layers = {name: resized(layer, self.rank) for name, layer in layers.items()}
        make_folder(output.parent)
        write_lora_form(
            output,
            layers,
            "peft" if form == "peft" else "kohya",
            networks,
            title=title,
            prediction_type=prediction_type,
            tags=tags,
            dtype=_torch_dtype(dtype),
        )
        ranks = [layer.rank for layer in layers.values()]
        return {"layers": len(ranks), "smallest_rank": min(ranks), "largest_rank": max(ranks)}


def _widest(dtypes: list[str]) -> Literal["fp16", "bf16", "fp32"]:
    """Return the type that holds numbers of all types, which safetensors names."""
    found = {dtype for dtype in dtypes if dtype in ("F16", "BF16", "F32", "F64")}
    return "fp16" if found == {"F16"} else "bf16" if found == {"BF16"} else "fp32"


def _torch_dtype(name: str) -> "torch.dtype":
    """Return the type of weights that an option names."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _tags_with_lora(
    model: str, options: ModelOptions, loras: Sequence[Path], form: OutputForm
) -> "tuple[dict[str, str], DPMSolverMultistepScheduler | None]":
    """Return the tags of a model with LoRA, and its scheduler where the LoRA make the network predict the flow.

    Args:
        model: Pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the model.
        loras: LoRA files or folders that are merged into it; none leave the model's own tags.
        form: Form of the output.

    Raises:
        RefusedInputError: The programs that read the form would not sample the result, or a tag cannot be used.
    """
    from d2f_fast.flow.scheduler_config import NUM_TRAIN_TIMESTEPS
    from d2f_fast.models.convert import tags_of_model
    from d2f_fast.models.save import stock_flow_scheduler
    from d2f_fast.models.tags import tags_of_merged

    check_readers(model, loras, form, is_lora=False)
    tags = tags_of_model(model, options)
    if not loras:
        return tags, None
    merged, differing = tags_of_merged(model, tags, loras)
    for name in differing:
        print(f"d2f: the LoRA files differ in {name}, and the result does not state it", file=sys.stderr)
    if merged.get("d2f.fm_form") == "published":
        raise RefusedInputError(
            "--lora was trained with --fm_form published, whose models other programs do not sample: keep the LoRA as a"
            " file of its own, for d2f sample"
        )
    becomes_flow = merged.get("d2f.prediction_type") == "flow_prediction" != tags.get("d2f.prediction_type")
    shift = float(merged.get("d2f.shift", 1))
    return merged, stock_flow_scheduler(NUM_TRAIN_TIMESTEPS, shift) if becomes_flow else None
