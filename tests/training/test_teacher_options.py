"""Options of a teacher: what is refused without torch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.configs import MINIATURE_FOLDER, ModelConfigs
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.teacher_options import TeacherOptions, check_fits_base, check_teacher_files


@pytest.mark.parametrize(
    "given",
    [{"teacher_guidance_scale": 1.0}, {"teacher_lora": ("a",)}, {"teacher_prediction_type": "epsilon"}],
    ids=str,
)
def test_option_of_a_teacher_needs_a_teacher(given: dict[str, object]) -> None:
    (name,) = given
    with pytest.raises(RefusedInputError, match=f"{name} needs a teacher: add --teacher, or leave {name} out"):
        TeacherOptions(**given)  # type: ignore[arg-type]


def test_guidance_that_is_built_in_settles_the_caption_dropout() -> None:
    def dropout(config: TrainingConfig, teacher: str | None, scale: float | None) -> float | None:
        return TeacherOptions(teacher, scale).settle(config).caption_dropout

    assert dropout(TrainingConfig(), None, None) is None
    assert [dropout(TrainingConfig(), "base", scale) for scale in (None, 0.0, 1.0, 2.0)] == [0.1, 0.1, 0.1, 0.0]
    assert dropout(TrainingConfig(caption_dropout=0.2), "base", 2.0) == 0.2


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ("./model.ckpt", "teacher: model.ckpt is a pickle"),
        ("./nothing", "teacher: ./nothing does not exist"),
        ("./nothing.safetensors", "teacher: ./nothing.safetensors: no such file"),
    ],
)
def test_teacher_without_a_usable_file_is_refused(teacher: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        check_teacher_files(TeacherOptions(teacher), "miniature", ModelOptions())


def test_teacher_of_another_task_is_refused(tmp_path: Path) -> None:
    folder, lora = tmp_path / "pipeline", tmp_path / "lora.safetensors"
    shutil.copytree(MINIATURE_FOLDER, folder)
    tags = {"d2f.task": "image_to_image"}
    (folder / "d2f.json").write_text(json.dumps(tags))
    save_file({"a": np.zeros(1, "f4")}, lora, tags)
    sentence = "was trained with --task image_to_image, and a run with a teacher learns a flow from noise"
    for options, base in (
        (TeacherOptions(str(folder)), "miniature"),
        (TeacherOptions("base"), str(folder)),
        (TeacherOptions("base", teacher_lora=(f"{lora}:0.5",)), "miniature"),
    ):
        with pytest.raises(ModelError, match=f"^teacher(_lora)? .*{sentence}"):
            check_teacher_files(options, base, ModelOptions())


def test_teacher_of_another_family_is_refused_by_its_configuration(tiny_folder: Path) -> None:
    check_teacher_files(TeacherOptions("miniature"), "miniature", ModelOptions())
    check_teacher_files(TeacherOptions("base"), "miniature", ModelOptions())
    with pytest.raises(ModelError, match=r"\(text width 16\), and the base model .*: give a teacher of the same f"):
        check_teacher_files(TeacherOptions(str(tiny_folder)), "miniature", ModelOptions())


def test_teacher_of_other_latents_is_refused() -> None:
    base = ModelConfigs({"cross_attention_dim": 768}, {"scaling_factor": 0.18215})
    check_fits_base("t", base, base, ModelOptions())
    wide = ModelConfigs({"cross_attention_dim": 768, "in_channels": 16}, base.vae)
    with pytest.raises(
        ModelError, match="teacher t has in_channels 16, and the base model 4: give a teacher of the same"
    ):
        check_fits_base("folder/t", wide, base, ModelOptions())
    other = ModelConfigs(base.unet, {"scaling_factor": 0.1406})
    with pytest.raises(ModelError, match=r"latents of the scale 0\.1406, and the base model 0\.18215"):
        check_fits_base("t", other, base, ModelOptions())
    check_fits_base("t", other, base, ModelOptions(vae_custom_scale=0.1406))
