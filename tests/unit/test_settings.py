"""The settings tree and its loading: every wrong key and value is told, nothing is guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.settings import Settings, load_settings
from lepton_ray.settings.loading import MAX_CONFIG_BYTES, parse_yaml

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_config_gives_the_defaults() -> None:
    assert load_settings(None) == Settings()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_settings(path).publish.model is not None


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {epochs: 3, workers: 4}\n")
    settings = load_settings(path, ["training.epochs=5", "training.epochs=7", "data.split.by=hash"])
    assert (settings.training.epochs, settings.training.workers, settings.data.split.by) == (7, 4, "hash")


def test_a_float_setting_takes_a_whole_number(tmp_path: Path) -> None:
    assert (
        load_settings(write(tmp_path, "training: {optimizer: {learning_rate: 1}}")).training.optimizer.learning_rate
        == 1
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainin.epochs=2"], ["trainin", "did you mean 'training'"]),
        (["training.worker=2"], ["training.worker", "did you mean 'workers'"]),
        (["training.optimizer.lerning_rate=1"], ["training.optimizer.lerning_rate", "learning_rate"]),
        (["training.epochs=two"], ["training.epochs", "'two'", "integer"]),
        (["training.epochs=2.5"], ["training.epochs", "2.5"]),
        (["training.epochs=0"], ["training.epochs", "0", "greater than or equal to 1"]),
        (["training.workers=1e9"], ["training.workers", "1000000000"]),
        (["training.workers=nan"], ["training.workers", "nan"]),
        (["training.workers=٣"], ["training.workers", "\\u0663"]),
        (["training.gpu=yes"], ["training.gpu", "'yes'", "boolean"]),
        (["run=../../etc/passwd"], ["run", "'../../etc/passwd'", "1 to 63"]),
        (["run=Upper"], ["run", "'Upper'"]),
        (["training=5"], ["training", "5"]),
        (["serving.min_replicas=3"], ["serving", "min_replicas 3 is above max_replicas 2"]),
        (["epochs"], ["epochs", "key.path=value"]),
        (["training.epochs=2", "training.epochs.more=2"], ["training.epochs.more=2", "epochs holds 2"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_with_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_all_faults_are_told_in_one_go() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(None, ["training.epochs=x", "training.wrkers=2", "run=A"])
    assert all(key in str(caught.value) for key in ("training.epochs", "training.wrkers", "run is 'A'"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {epochs: 1}\ntraining: {epochs: 2}\n", "line 2: key 'training' stands twice"),
        ("training: {epochs: 1, epochs: 2}\n", "'epochs' stands twice"),
        ("run: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: &x [1]\nb: *x\n", "aliases are not accepted"),
        ("run: [unclosed\n", "line 2"),
        ("just words\n", "expected keys"),
        ("- 1\n- 2\n", "expected keys"),
        ("1: 2\n", "is not text"),
        ("training: {epochs: 012}\n", "'012'"),
        ("training: {epochs: 1:30}\n", "'1:30'"),
        ("training: {epochs: 1_000}\n", "'1_000'"),
        ("training: {gpu: on}\n", "'on'"),
        ("run: no\n", None),
    ],
)
def test_yaml_is_strict_and_guesses_nothing(tmp_path: Path, text: str, words: str | None) -> None:
    """YAML 1.1's surprises are text: `no` is a fine run name, `012` is no number."""
    if words is None:
        assert load_settings(write(tmp_path, text)).run == "no"
        return
    with pytest.raises(UsageError) as caught:
        load_settings(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(2 * 2**30)
    cases = {
        tmp_path: "a folder",
        tmp_path / "missing.yaml": "No such file",
        tmp_path / "fifo": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "latin.yaml": "not UTF-8",
        tmp_path / "huge.yaml": f"at most {MAX_CONFIG_BYTES}",
    }
    for path, words in cases.items():
        with pytest.raises(UsageError, match=words):
            load_settings(path)


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: mine\r\ntraining: {epochs: 2}\r\n")
    assert load_settings(path).training.epochs == 2


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(write(tmp_path, 'run: "\\e[31mred\\u202e"\n'))
    assert str(caught.value).isprintable()
    assert "\\x1b" in str(caught.value)


def test_deep_nesting_is_one_line_not_a_crash() -> None:
    with pytest.raises(UsageError):
        parse_yaml("[" * 100_000, "config")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().training.epochs = 3  # type: ignore[misc]
