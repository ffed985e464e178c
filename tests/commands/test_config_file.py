"""The configuration file of `--config`: the values it gives, and the files that are refused."""

from pathlib import Path

import pytest

from d2f_fast.commands.config_file import MAX_CONFIG_BYTES
from d2f_fast.commands.main import main, parse
from d2f_fast.errors import RefusedInputError

HOSTILE = Path(__file__).parents[1] / "hostile"
TRAIN = ["train", "--train_data_dir", "x"]


@pytest.fixture
def options(tmp_path):
    """Function that returns the training options of a configuration file."""

    def read(text: str):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return parse([*TRAIN, "--config", str(path)]).options

    return read


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("rank: 7", 7),
        ("learning_rate: 3.0e-5", 3e-5),
        ("learning_rate: 3e-5", 3e-5),
        ("flow_shift: 3", 3.0),
        ("center_crop: true", True),
        ("cache_latents: false", False),
        ("mixed_precision: no", "no"),
        ("mixed_precision: 'no'", "no"),
        ("mixed_precision: null", None),
        ("compile: true", "full"),
        ("compile: off", "off"),
        ("compile: regional", "regional"),
        ("checkpoints_total_limit: null", None),
        ("lora_alpha: 32", 32.0),
        ("cache_dir: some folder", "some folder"),
        ("target_modules: [to_q, to_k]", ("to_q", "to_k")),
    ],
)
def test_value_has_the_type_of_its_option(line, value, options):
    got = getattr(options(line), line.partition(":")[0])
    assert got == value and type(got) is type(value)


def test_list_gives_prompts(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("prompts:\n- two words\n- b\n")
    assert parse(["sample", "--config", str(config)]).prompts == ("two words", "b")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("seed: '7'", "seed must be a whole number, got '7': correct the value"),
        ("seed: 7.0", "seed must be a whole number, got 7.0"),
        ("seed: true", "seed must be a whole number, got True"),
        ("seed: null", "seed must be a whole number, got None"),
        ("learning_rate: '1e-4'", "learning_rate must be a number, got '1e-4'"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("flow_shift: 1" + "0" * 400, "flow_shift must be a number, got 1000"),
        ("center_crop: 1", "center_crop must be true or false, got 1"),
        ("cache_dir: 5", "cache_dir must be text or null, got 5"),
        ("objective: other", "objective must be diff2flow or fm or diffusion or null, got 'other'"),
        ("objective: [fm]", "objective must be diff2flow or fm or diffusion or null, got ['fm']"),
        ("target_modules: to_q", "target_modules must be a list of text or null, got 'to_q'"),
        ("target_modules: [to_q, 3]", "target_modules must be a list of text or null, got ['to_q', 3]"),
        ("lora_alpha: {a: 1}", "lora_alpha must be a number or null, got {'a': 1}"),
        ("rnak: 3", "rnak is not an option of d2f train: the nearest is --rank (d2f train --help lists all)"),
        ("config: other.yaml", "config is not an option of d2f train"),
        ("3: 3", "3 is not an option of d2f train"),
    ],
)
def test_wrong_key_or_type_is_refused_with_file_and_key(line, sentence, options, tmp_path):
    with pytest.raises(RefusedInputError) as error:
        options(line)
    assert str(error.value).startswith(f"--config {tmp_path / 'c.yaml'}: {sentence}")


def test_value_out_of_range_is_refused(options):
    with pytest.raises(RefusedInputError, match="rank must be at least 1, got 0"):
        options("rank: 0")


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- 3\n", "must hold `option: value` lines"),
        (b"", "must hold `option: value` lines"),
        (b"rank\n", "must hold `option: value` lines"),
        (b"rank: [\n", "cannot be read as YAML; correct it: "),
        (b"rank: 3\n---\nrank: 4\n", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"rank: !!python/object/apply:os.system [ls]\n", "cannot be read as YAML"),
        (b"[a, b]: 3\n", "cannot be read as YAML"),
        (b"target_modules: " + b"[" * 5000 + b"]" * 5000, "cannot be read as YAML"),
        (b"rank: 3\nlogging_steps: 1\nrank: 4\n", "gives rank more than once: keep one of the lines"),
        (b"a0: &a0 [x]\n" + LAUGHS.encode(), "line 2 uses the alias *a0; write its value out"),
        ((HOSTILE / "alias_bomb.yaml").read_bytes(), "line 1 uses the alias *c0; write its value out"),
        (b"target_modules: " + b"[" * 30_000, "line 1 is nested more than 10 deep; no option is"),
        (b"#" * (MAX_CONFIG_BYTES + 1), "is larger than 32 KiB"),
    ],
    ids=[
        *("list", "empty", "word", "syntax", "two documents", "not text", "code", "key", "deep", "twice", "alias"),
        *("alias bomb", "very deep", "large"),
    ],
)
def test_unusable_file_is_refused_in_one_line_with_exit_code_2(content, sentence, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_bytes(content)
    assert main([*TRAIN, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"d2f: --config {config}") and sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(("name", "reason"), [("none.yaml", "No such file or directory"), ("", "Is a directory")])
def test_path_that_cannot_be_read_is_refused(name, reason, tmp_path, capsys):
    assert main([*TRAIN, "--config", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"d2f: --config {tmp_path / name} cannot be read ({reason}): check the path\n"
