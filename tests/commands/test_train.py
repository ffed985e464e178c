"""`d2f train` as a user types it: what it saves, what it prints, and what it refuses."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from d2f_fast.commands.main import main
from d2f_fast.data import pair_checks
from d2f_fast.data.pairs import PairDataset
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.training.trainer import AlignedTrainer

HOSTILE = Path(__file__).parents[1] / "hostile"


def test_full_finetuning_saves_the_averaged_pipeline_and_no_lora(train, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--adapter", "full", "--learning_rate", "0.01") == 0
    assert capsys.readouterr().out.strip() == str(output / "pipeline")
    assert not list(output.rglob("pytorch_lora_weights.safetensors"))
    saved = StableDiffusionPipeline.from_pretrained(output / "pipeline").unet.state_dict()
    average, _ = read_tensors(output / "checkpoint-2" / "ema.safetensors")
    assert all(torch.equal(tensor, average[f"shadow.{name}"]) for name, tensor in saved.items())
    base = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").state_dict()
    assert not any(torch.equal(saved[name], base[name]) for name in saved)


def test_lora_training_saves_the_lora_its_metrics_and_its_options(train, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output / "pytorch_lora_weights.safetensors")
    assert (output / "run_kohya.safetensors").is_file()
    assert sum(line.startswith("d2f: training runs on ") for line in printed.err.splitlines()) == 1
    assert "d2f: 3 images, 2 per step: an epoch has 2 steps, and 2 steps are 1 epochs\n" in printed.err
    metrics = json.loads((output / "metrics.json").read_text())
    card = (output / "README.md").read_text()
    for words in ("sigmas=[17.6146, 3, 1, 0.3333, 0], guidance_scale=3", "ComfyUI, A1111 and Forge load SD1.x"):
        assert words in printed.err and words in card
    # The printed lines name the base model, which the card does not where it is a path of this machine.
    assert f"--model {tiny_folder} --lora {output} " in printed.err and "--model BASE --lora run " in card
    assert metrics["command"] == "d2f train" and metrics["peak_memory_bytes"] > 0
    assert metrics["results"][0]["steps"] == 2
    options = json.loads((output / "config.json").read_text())
    assert options["rank"] == 2 and "json" not in options
    assert Path(options["train_data_dir"]).is_dir() and Path(options["pretrained_model_name_or_path"]).is_dir()


def test_lora_format_chooses_the_saved_file(train, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--lora_format", "kohya") == 0
    assert capsys.readouterr().out.strip() == str(output / "run_kohya.safetensors")
    assert [path.name for path in output.glob("*.safetensors")] == ["run_kohya.safetensors"]


def test_lora_that_a_run_started_from_is_recorded(train, tmp_path, capsys):
    assert train(tmp_path / "first") == 0
    kohya = tmp_path / "first" / "first_kohya.safetensors"
    assert train(tmp_path / "second", "--init_lora", f"{kohya}:0.5") == 0
    (row,) = json.loads((tmp_path / "second" / "metrics.json").read_text())["results"]
    sha256 = hashlib.sha256(kohya.read_bytes()).hexdigest()
    assert row["init_lora"] == {"file": str(kohya), "scale": 0.5, "sha256": sha256}
    capsys.readouterr()
    assert train(tmp_path / "third", "--init_lora", "nope:0.5") == 2
    assert capsys.readouterr().err == "d2f: LoRA nope: there is no such file or folder; check the path\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train_data_dir", "no-such-folder"], "no-such-folder is not a folder"),
        (["--train_data_dir", "x", "--pretrained_model_name_or_path", "./model.ckpt"], "is a pickle"),
        (["--train_data_dir", "x", "--pretrained_model_name_or_path", "./nothing"], "x is not a folder"),
        *(
            (["--train_data_dir", "x", f"--{option}", *values.split()], sentence)
            for option, values, sentence in (
                ("rank", "0", "rank must be at least 1, got 0"),
                ("seed", "-1", "seed must be in [0, 2**63), got -1"),
                ("seed", str(2**63), "seed must be in [0, 2**63), got 9223372036854775808"),
                ("checkpoints_total_limit", "0", "checkpoints_total_limit must be at least 1, got 0"),
                ("caption_dropout", "1.5", "caption_dropout must be in [0, 1), got 1.5"),
                ("adam_beta1", "2", "adam_beta1 must be in [0, 1), got 2.0"),
                ("learning_rate", "nan", "learning_rate must be positive and finite, got nan"),
                ("max_grad_norm", "0", "max_grad_norm must be positive and finite, got 0.0"),
                ("lora_alpha", "0", "lora_alpha must be positive and finite, got 0.0"),
                ("flow_shift", "inf", "flow_shift must be positive and finite, got inf"),
                ("adam_weight_decay", "-1", "adam_weight_decay must be at least 0, got -1.0"),
                ("logit_mean", "nan", "logit_mean must be finite, got nan"),
                (
                    "objective",
                    "fm --loss_weighting native",
                    "loss_weighting must be flow with the objective fm, got native: leave it out",
                ),
                ("lr_scheduler", "foo", "lr_scheduler"),
                ("snr_gamma", "5 --loss_weighting flow", "snr_gamma works only with loss_weighting min_snr, got flow"),
                ("lr_warmup_steps", "4", "lr_warmup_steps has no effect with lr_scheduler constant, got 4: add"),
            )
        ),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(arguments, sentence, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(images) if a == "x" and "ckpt" in arguments[-1] else a for a in arguments]
    try:
        code = main(["train", *arguments])
    except SystemExit as exit_:  # raised by the option parser
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error
    assert not (tmp_path / "d2f-output").exists()


def test_model_is_rectified_twice_from_its_own_pairs(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The tiny network has random weights, whose latents are larger than those of a trained one.
    monkeypatch.setattr(pair_checks, "_USUAL_DEVIATION", (0.0, 1e3))
    Path("prompts.txt").write_text("ab\nc\n")
    model = str(tiny_folder)
    make = ["pairs", "--prompts_file", "prompts.txt", "--num_pairs", "6", "--pairs_per_shard", "4", "--model", model]
    make += ["--num_inference_steps", "3", "--solver", "euler"]
    train = ["train", "--pretrained_model_name_or_path", model, "--max_train_steps", "2"]
    assert main([*make, "--guidance_scale", "2", "--output_dir", "pairs1"]) == 0
    assert main([*train, "--rank", "2", "--pairs", "pairs1", "--output_dir", "run1"]) == 0
    said = capsys.readouterr().err
    assert "pairs of 2 shards, made with guidance 2 and solver euler, 3 steps: sample the result without" in said
    assert (
        "6 pairs, 4 per step: an epoch has 2 steps, and 2 steps are 1 epochs" in said
        and "--num_inference_steps 2 --guidance_scale 1`" in said
    )
    options = json.loads(Path("run1", "config.json").read_text())
    assert options["caption_dropout"] == 0 and options["resolution"] == 16
    assert main(["sample", "--model", model, "--lora", "run1", "--prompts", "ab"]) == 0
    assert "guidance_scale 1, as saved with the model or LoRA" in capsys.readouterr().err
    # Guidance is built into the LoRA, so that its own pairs are made without.
    assert main([*make, "--lora", "run1", "--output_dir", "pairs2"]) == 0
    said = capsys.readouterr().err
    assert "d2f: guidance_scale 1, as saved with the model or LoRA; 3 steps of euler; LoRA run1" in said
    assert main([*make, "--lora", "run1", "--guidance_scale", "2", "--output_dir", "pairs2", "--dry_run"]) == 2
    assert "pairs.json: guidance_scale was 1.0 and is now 2.0" in capsys.readouterr().err
    first, second = (PairDataset([name]).shards[0].meta for name in ("pairs1", "pairs2"))
    assert first["lora"] == [] and len(second["lora"]) == 1 and first["model"] == second["model"]
    assert main([*train, "--init_lora", "run1", "--pairs", "pairs2", "--output_dir", "run2"]) == 0
    assert read_tensors("run2/pytorch_lora_weights.safetensors")[1]["d2f.pairs_guidance"] == "1"


def test_training_does_not_go_on_with_other_pairs(tiny_folder, write_pairs, tmp_path, capsys):
    for name in ("0.tar", "1.tar"):
        write_pairs(tmp_path / name, 4)
    (tmp_path / "0.tar.gz").touch()
    train = ["train", "--pretrained_model_name_or_path", str(tiny_folder), "--rank", "2", "--max_train_steps", "1"]
    train += ["--output_dir", str(tmp_path / "run")]
    assert main([*train, "--pairs", str(tmp_path / "0.tar")]) == 0
    capsys.readouterr()
    again = [*train, "--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--pairs"]
    for more in ([], ["--dry_run"]):
        assert main([*again, str(tmp_path / "1.tar"), *more]) == 2
        assert "state.json: pairs was '" in capsys.readouterr().err
    assert main([*again, str(tmp_path)]) == 2
    (tmp_path / "1.tar").rename(tmp_path / "moved")
    assert main([*again, str(tmp_path)]) == 0
    assert f"d2f: {tmp_path / '0.tar.gz'} is not read: only uncompressed files" in capsys.readouterr().err


def test_published_shards_train_as_those_of_this_package(tiny_folder, write_pairs, tmp_path):
    """The published folders hold no meta.json and no pairs.json, and their members have times and owners."""
    ours = PairDataset([write_pairs(tmp_path / "ours" / "0.tar", 4)])
    (tmp_path / "published").mkdir()
    with tarfile.open(tmp_path / "published" / "000000.tar", "w") as tar:
        for i in range(len(ours)):
            arrays = [io.BytesIO(), io.BytesIO()]
            for stream, array in zip(arrays, (ours[i].latents, ours[i].noise), strict=True):
                np.save(stream, array)
            contents = [*(stream.getvalue() for stream in arrays), ours[i].prompt.encode()]
            for name, content in zip(("image_latent.npy", "noise.npy", "prompt.txt"), contents, strict=True):
                member = tarfile.TarInfo(f"{i:09d}.{name}")
                member.size, member.mtime = len(content), time.time()
                tar.addfile(member, io.BytesIO(content))
    for name in ("ours", "published"):
        train = ["train", "--pretrained_model_name_or_path", str(tiny_folder), "--pairs", str(tmp_path / name)]
        run = ["--rank", "2", "--max_train_steps", "2", "--train_batch_size", "2", "--seed", "3"]
        assert main([*train, *run, "--output_dir", str(tmp_path / f"run-{name}")]) == 0
    (wanted, _), (found, tags) = (
        read_tensors(tmp_path / f"run-{name}" / "pytorch_lora_weights.safetensors") for name in ("ours", "published")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()) and found.keys() == wanted.keys()
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    assert (tags["d2f.pairs"], tags["d2f.pairs_guidance"]) == ("4", "unknown")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give --train_data_dir, the folder of the captioned images, or --pairs"),
        (["--train_data_dir", ".", "--pairs", "x"], "give either --train_data_dir or --pairs"),
        (["--pairs", "x", "--random_flip"], "random_flip has no effect on pairs: leave it out"),
        (["--pairs", "x", "--caption_column", "a"], "caption_column has no effect on pairs: leave it out"),
        (["--pairs", "nothing"], "nothing: there is no such folder or shard"),
        (["--pairs", "x", "--distill", "--teacher", "base"], "a teacher the velocity along the way: leave one of the"),
        (["--pairs", "."], ". holds no shards *.tar: give the folder that d2f pairs wrote"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_pairs_are_refused(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not Path("d2f-output").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the filter of data.images
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_palette.png", "no_palette.png: the palette is missing: replace the image"),
        ("grey16_bomb.png", "(11585x11585 pixels, more than 67108864): replace it"),
    ],
)
def test_hostile_image_ends_the_run_in_one_line(name, sentence, train, images, tmp_path, capsys):
    shutil.copy(HOSTILE / name, images / name)
    (images / name).with_suffix(".txt").write_text("abc")
    assert train(tmp_path / "run", "--max_train_steps", "9", "--checkpointing_steps", "0") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"d2f: {images / name}") and sentence in last
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert saved == (["checkpoint-1"] if last.endswith("; step 1 is saved") else [])


def test_finished_run_is_not_replaced_by_another(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--checkpointing_steps", "0") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    assert train(tmp_path / "run", "--checkpointing_steps", "0", "--seed", "1") == 2
    assert "pytorch_lora_weights.safetensors of a finished run, and no checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_full_finetuning_is_refused_before_it_starts_when_its_pipeline_exists(images, tiny_folder, tmp_path, capsys):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    command = ["train", "--train_data_dir", str(images), "--pretrained_model_name_or_path", str(tiny_folder)]
    assert main([*command, "--adapter", "full", "--output_dir", str(tmp_path / "run")]) == 2
    assert "pipeline exists: continue its run with --resume_from_checkpoint latest" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pipeline"]


def test_finished_full_finetuning_is_extended_in_place(train, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--adapter", "full", "--learning_rate", "0.01"]
    assert train(output, *options) == 0
    extended = [*options, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    assert "going on from" not in capsys.readouterr().err
    assert train(output, *extended) == 0
    said = capsys.readouterr().err
    assert f"d2f: going on from {output / 'checkpoint-2'}: step 2 of 3 is done\n" in said
    assert "was taken before" not in said
    assert train(output, *extended) == 0
    assert "d2f: step 3 was taken before: raise max_train_steps to go on\n" in capsys.readouterr().err
    saved = StableDiffusionPipeline.from_pretrained(output / "pipeline").unet.state_dict()
    average, _ = read_tensors(output / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(tensor, average[f"shadow.{name}"]) for name, tensor in saved.items())
    (output / "pipeline" / "d2f.json").unlink()
    capsys.readouterr()
    assert train(output, *extended) == 2
    assert "pipeline is not the result of a run, and is not replaced: move it away" in capsys.readouterr().err


def test_model_options_are_printed_recorded_and_must_match_on_resume(train, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
    assert train(output, *options) == 0
    lines = capsys.readouterr().err.splitlines()
    ours = [line for line in lines if line.startswith("d2f: ")]
    assert ours[1] == (
        f"d2f: Model {tiny_folder}: a UNet other than SD1.x, SD2.x and SDXL, v-prediction (option --prediction_type),"
        " zero terminal SNR (option --rescale_betas_zero_snr)"
    )
    config = json.loads((output / "config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    (row,) = json.loads((output / "metrics.json").read_text())["results"]
    assert row["model"]["prediction_type"] == "v_prediction" and row["model"]["zero_snr"]
    resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    for changed, sentence in (
        (["--prediction_type", "sample", options[2]], "prediction_type was 'v_prediction' and is now 'sample'"),
        ([*options[:2], "--no_rescale_betas_zero_snr"], "rescale_betas_zero_snr was True and is now False"),
    ):
        assert train(output, *resumed, *changed) == 2
        assert sentence in capsys.readouterr().err
    assert train(output, *resumed, *options) == 0


@pytest.fixture(scope="module")
def run_to_continue(tmp_path_factory, tiny_folder):
    """Folder of images and a run of two steps on them, with a checkpoint. No test may change them."""
    root = tmp_path_factory.mktemp("run_to_continue")
    (root / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text("abc")
    assert main(["train", *continued(root, tiny_folder), "--max_train_steps", "2"]) == 0
    return root


def continued(root, model, *options):
    paths = ["--train_data_dir", str(root / "images"), "--output_dir", str(root / "run")]
    sizes = ["--train_batch_size", "2", "--rank", "2", *([] if "--resolution" in options else ["--resolution", "16"])]
    return [*paths, "--pretrained_model_name_or_path", str(model), *sizes, *options]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--learning_rate 1e-3", "learning_rate was 0.0001 and is now 0.001: resume with the options of the"),
        ("--train_batch_size 3", "global_batch_size was 2 and is now 3"),
        ("--mixed_precision bf16", "mixed_precision was 'no' and is now 'bf16'"),
        ("--objective fm", "objective was 'diff2flow' and is now 'fm'"),
        ("--resolution 32", "resolution was 16 and is now 32"),
        ("--prediction_type sample", "prediction_type was 'epsilon' and is now 'sample'"),
        ("--max_train_steps 1", "checkpoint-2 is past max_train_steps 1: raise max_train_steps"),
        ("--resume_from_checkpoint checkpoint-7", "checkpoint-7 is not a checkpoint in "),
        ("--lr_scheduler cosine", "lr_scheduler was 'constant' and is now 'cosine'"),
        ("", ""),
        ("--learning_rate 1e-4 --caption_dropout 0.1 --loss_weighting flow --max_train_steps 9", ""),
        ("--train_batch_size 1 --gradient_accumulation_steps 2", ""),
    ],
)
def test_continuation_with_other_settings_is_refused_before_the_model_is_loaded(
    options, sentence, run_to_continue, tiny_folder, capsys
):
    given = ["--resume_from_checkpoint", "latest", *options.split(), "--dry_run"]
    assert main(["train", *continued(run_to_continue, tiny_folder, *given)]) == 2 * bool(sentence)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stated", "options", "sentence"),
    [
        ({}, "--objective diff2flow", "objective diff2flow needs a base model that predicts noise, v or clean latents"),
        ({}, "--fm_form published", "fm_form published does not fit this base model, which predicts the flow in the"),
        ({"fm_form": "published"}, "--fm_form diffusers", "in the form published: leave --fm_form out"),
        ({}, "--loss_weighting min_snr", "loss_weighting must be flow with the objective fm, got min_snr"),
        ({}, "--rescale_betas_zero_snr", "has no effect with a model that predicts the flow (scheduler_config.json)"),
        ({"prediction_type": "noise"}, "", "scheduler_config.json: prediction_type must be epsilon, "),
        ({}, "--prediction_type epsilon --objective diff2flow", ""),
        ({}, "", ""),
    ],
)
def test_method_that_the_model_does_not_take_is_refused_before_it_is_loaded(
    stated, options, sentence, images, tiny_folder, tmp_path, capsys
):
    model = shutil.copytree(tiny_folder, tmp_path / "model", copy_function=os.link)
    path = model / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "flow_prediction"} | stated
    path.unlink()
    path.write_text(json.dumps(config))
    paths = ["--train_data_dir", str(images), "--pretrained_model_name_or_path", str(model)]
    given = ["--output_dir", str(tmp_path / "run"), *options.split(), "--resolution", "16", "--dry_run"]
    assert main(["train", *paths, *given]) == 2 * bool(sentence)
    assert sentence in capsys.readouterr().err


def test_noise_schedule_of_the_model_is_refused_where_the_flow_is_trained(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--objective", "fm", "--rescale_betas_zero_snr") == 2
    assert "rescale_betas_zero_snr has no effect with objective fm" in capsys.readouterr().err


def test_model_that_predicts_the_flow_settles_the_objective_without_an_option(train, tmp_path, capsys):
    stated = ["--prediction_type", "flow_prediction", "--flow_shift", "2.5", "--sampling_shift", "6"]
    output = tmp_path / "run"
    assert train(output, *stated) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("d2f: objective fm: naive flow")]
    assert len(lines) == 1 and lines[0].endswith("learns noise - latents); the base model predicts flow_prediction")
    (row,) = json.loads((output / "metrics.json").read_text())["results"]
    assert (row["objective"], row["fm_form"]) == ("fm", "diffusers")
    saved = json.loads((output / "config.json").read_text())
    assert (saved["objective"], saved["fm_form"], saved["prediction_type"]) == ("fm", "diffusers", "flow_prediction")
    header = read_tensors(output / "pytorch_lora_weights.safetensors")[1]
    assert (header["d2f.training_shift"], header["d2f.shift"]) == ("2.5", "6.0")
    assert header["d2f.prediction_type"] == "flow_prediction"
    assert train(tmp_path / "other", *stated, "--objective", "diff2flow") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("d2f: objective diff2flow needs a base model that predicts noise, v or clean latents; this")
    assert error.endswith("there is no diffusion prediction to align: leave --objective out")


@pytest.mark.parametrize(
    ("options", "weighting"),
    [
        (["--snr_gamma", "5"], "min_snr"),
        (["--snr_gamma", "5", "--objective", "diffusion"], "min_snr"),
        (["--objective", "diffusion"], "native"),
    ],
    ids=["flow", "diffusion", "diffusion without it"],
)
def test_giving_snr_gamma_turns_min_snr_on(train, tmp_path, options, weighting):
    assert train(tmp_path / "run", *options) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["loss_weighting"], saved["snr_gamma"]) == (weighting, 5.0 if weighting == "min_snr" else None)
    _, tags = read_tensors(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert tags["d2f.loss_weighting"] == weighting


def test_resolution_is_that_of_the_model_unless_it_is_given(images, tiny_folder, tmp_path, capsys):
    command = ["train", "--train_data_dir", str(images), "--pretrained_model_name_or_path", str(tiny_folder)]
    options = ["--max_train_steps", "1", "--rank", "2", "--train_batch_size", "1"]
    assert main([*command, *options, "--output_dir", str(tmp_path / "run")]) == 0
    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    vae = json.loads((tiny_folder / "vae" / "config.json").read_text())
    side = config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    error = capsys.readouterr().err
    assert f"trained at {side} x {side} pixels (the model's own size)\n" in error and "d2f: resolution" not in error
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resolution"] == side
    assert main([*command, *options, "--output_dir", str(tmp_path / "given"), "--resolution", "40"]) == 0
    error = capsys.readouterr().err
    assert "trained at 40 x 40 pixels (option --resolution)\n" in error
    assert f"d2f: resolution 40 is more than twice the size that the model was made for, {side} x {side}" in error


def test_repeats_and_cut_captions_are_said_before_the_training(train, images, tmp_path, capsys):
    (images / "10_cat").mkdir()
    for suffix in (".png", ".txt"):
        (images / f"0{suffix}").rename(images / "10_cat" / f"0{suffix}")
    (images / "2.txt").write_text("a b " * 500)
    assert train(tmp_path / "run", "--lr_scheduler", "cosine", "--lr_warmup_steps", "4") == 0
    error = capsys.readouterr().err
    assert "d2f: lr_warmup_steps 4 is not shorter than the run: the learning rate only reaches 50% of 0.0001\n" in error
    assert (
        "d2f: 3 image files count as 12 images, because the numbers of folders repeat them: 10_cat 10 times\n"
        "d2f: 12 images, 2 per step: an epoch has 6 steps, and 2 steps are 0.3333 epochs\n"
    ) in error
    assert ("d2f: 1 of 2 captions is longer than the ") in error
    assert f"which does not see the rest; the first is that of {images / '2.png'}\n" in error


def test_run_names_the_teacher_and_refuses_one_that_does_not_fit(train, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--objective", "fm", "--teacher", "base", "--teacher_guidance_scale", "3") == 0
    printed = capsys.readouterr().err
    assert "d2f: target: velocity of the teacher base (epsilon, guidance 3); the base's weights serve both" in printed
    (row,) = json.loads((output / "metrics.json").read_text())["results"]
    assert (row["objective"], row["teacher"], row["teacher_guidance_scale"]) == ("fm", "base", 3.0)
    options = json.loads((output / "config.json").read_text())
    assert (options["teacher"], options["teacher_guidance_scale"]) == ("base", 3.0)
    assert "(TEXT, sigmas=[1, 0.75, 0.5, 0.25], guidance_scale=1, " in (output / "README.md").read_text()
    for given, sentence in (
        (["--teacher", "miniature"], "teacher miniature is the miniature (text width 128), and the base model a UNet"),
        (["--teacher", "old.ckpt"], "teacher: old.ckpt is a pickle, which can run code"),
        (["--teacher", "base"], "teacher base has nothing to teach with the objective diff2flow"),
        (["--distill"], "distill needs --pairs, whose noise and latents are the two ends of the jump, or --task depth"),
        (["--teacher_guidance_scale", "2"], "teacher_guidance_scale needs a teacher: add --teacher"),
    ):
        assert train(tmp_path / "refused", *given) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "refused" / "config.json").exists()


def test_loss_on_held_out_images_is_logged_and_shown_in_the_card(train, images, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--validation_steps", "1", "--validation_data_dir", str(images)) == 0
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 1, 2]
    (row,) = json.loads((output / "metrics.json").read_text())["results"]
    assert len(row["validation_losses"]) == 8
    assert "| loss on held-out samples | " in (output / "README.md").read_text()
    for given, sentence in (
        (["--validation_steps", "1"], "validation_steps needs something to validate with: add --validation_prompts, "),
        (["--validation_data_dir", "x"], "held-out samples need --validation_steps, how often their loss is measured"),
        (["--validation_steps", "1", "--validation_data_dir", "x"], "validation_data_dir: x is not a folder"),
        (["--validation_steps", "1", "--validation_pairs", "x"], "x: there is no such folder or shard"),
    ):
        capsys.readouterr()
        assert train(tmp_path / "refused", *given) == 2
        assert sentence in capsys.readouterr().err


def test_lora_of_another_size_is_sampled_at_it_unless_a_size_is_given(images, tiny_folder, tmp_path, capsys):
    output, model = tmp_path / "run", str(tiny_folder)
    command = ["train", "--train_data_dir", str(images), "--pretrained_model_name_or_path", model, "--rank", "2"]
    command += ["--max_train_steps", "1", "--output_dir", str(output)]
    assert main([*command, "--resolution", "24", "32"]) == 0
    assert "d2f: trained at 24 x 32 pixels (height x width; option --resolution)\n" in capsys.readouterr().err
    assert read_tensors(output / "pytorch_lora_weights.safetensors")[1]["d2f.resolution"] == "24x32"
    assert "| resolution | 24x32 px |" in (output / "README.md").read_text()
    sample = ["sample", "--model", model, "--lora", str(output), "--prompts", "ab", "--num_inference_steps", "1"]
    sizes = []
    for number, more in enumerate(([], ["--height", "16"], ["--height", "40", "--width", "16"])):
        assert main([*sample, "--output_dir", str(tmp_path / f"{number}"), *more]) == 0
        with Image.open(tmp_path / f"{number}" / "000.png") as image:
            sizes.append(image.size)
    assert sizes == [(32, 24), (32, 16), (16, 40)]  # width and height


def test_model_that_was_trained_at_another_size_is_trained_further_at_it(images, tiny_folder, tmp_path, capsys):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "d2f.json").write_text(json.dumps({"d2f.resolution": "24x32"}))
    command = ["train", "--pretrained_model_name_or_path", str(model), "--rank", "2", "--max_train_steps", "1"]
    assert main([*command, "--train_data_dir", str(images), str(images), "--output_dir", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "d2f: trained at 24 x 32 pixels (height x width; the model's own size)\n" in error
    assert AlignedTrainer.from_pretrained(model).config.resolution == (24, 32)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--resolution", "24", "32", "32"], "resolution must be one number for squares, or pairs of a height and a w"),
        (["--resolution", "24", "33"], "resolution must be a multiple of 8, got 33"),
        (["--resolution", "24", "32", "32", "32"], "resolution: 4 numbers for 1 data set: give one number for a squar"),
        (["x", "--resolution", "24", "32"], "resolution: 2 numbers for 2 data sets: give one number for squares of on"),
    ],
)
def test_size_that_no_run_can_have_is_refused(more, sentence, images, tiny_folder, tmp_path, capsys):
    more = [str(images) if word == "x" else word for word in more]
    model = ["--pretrained_model_name_or_path", str(tiny_folder)]
    assert main(["train", *model, "--output_dir", str(tmp_path / "run"), "--train_data_dir", str(images), *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
