"""Text classification: words to numbers, three networks, labels of any kind, errors that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from text_data import BAD, GOOD, change_json, sentences, tiny_folder

from lepton_ray.errors import UsageError
from lepton_ray.tasks import AnyTask, Predictor, find_task, text_tokens
from lepton_ray.tasks.text_classification import TextRequest

NETWORKS: list[dict[str, Any]] = [
    {"network": "lstm", "width": 16, "layers": 2},
    {"network": "transformer", "width": 16, "layers": 2, "heads": 2},
    {"network": "huggingface"},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def made(folder: Path, **options: Any) -> AnyTask:
    if options.get("network") == "huggingface":
        options["folder"] = str(folder)
    return find_task("text_classification", {"max_length": 12, **options})


def trained(task: AnyTask, rows: pa.Table, transforms: dict[str, Any], steps: int = 40) -> torch.nn.Module:
    torch.manual_seed(0)
    model = task.build(transforms)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = task.inputs(rows, transforms), task.targets(rows, transforms)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(model(inputs), targets, label_smoothing=0.0).mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("options", NETWORKS, ids=lambda options: options["network"])
def test_each_network_learns_and_answers_alone_as_in_a_batch(folder: Path, options: dict[str, Any]) -> None:
    """Every parameter gets a gradient (DDP waits for each), and padding of longer neighbours changes no answer."""
    rows = sentences()
    task = made(folder, **options)
    transforms = task.fit(rows)
    model = trained(task, rows, transforms)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    predictor = Predictor(task, transforms, model)
    assert predictor.evaluate(rows)["accuracy"] == 1.0
    together: list[Any] = predictor.predict([TextRequest(text=text) for text in (*GOOD, *BAD)])
    assert [answer.label for answer in together] == ["good"] * 4 + ["bad"] * 4
    for text, answer in zip((*GOOD, *BAD), together, strict=True):
        alone: Any = predictor.predict([TextRequest(text=text)])[0]
        assert alone.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
        assert alone.probability == max(alone.probabilities)
        assert alone.labels == ["bad", "good"]


@pytest.mark.parametrize("options", NETWORKS, ids=lambda options: options["network"])
def test_a_model_is_built_from_its_transforms_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    """A replica on another machine has no model folder: what JSON holds of the transforms is enough."""
    here = tiny_folder(tmp_path / "here")
    task = made(here, **options)
    transforms = json.loads(json.dumps(task.fit(sentences())))
    for path in here.iterdir():
        path.unlink()
    model = task.build(transforms)
    outputs = Predictor(task, transforms, model).outputs(sentences(1))
    assert outputs.shape == (8, 2)
    assert torch.isfinite(outputs).all()
    with torch.device("meta"):
        names = list(task.build(transforms).state_dict())
    assert names == list(model.state_dict())


@pytest.mark.parametrize("options", NETWORKS, ids=lambda options: options["network"])
def test_texts_of_no_known_word_and_of_none_get_an_answer(folder: Path, options: dict[str, Any]) -> None:
    task = made(folder, **options)
    transforms = task.fit(sentences())
    rows = pa.table({"text": ["", "zzz qqq", "good " * 500, "\u4f60\u597d \U0001f600"]})
    inputs = task.inputs(rows, transforms)
    assert inputs.dtype == torch.int32
    assert inputs.shape == (4, 12)
    outputs = Predictor(task, transforms, task.build(transforms)).outputs(rows)
    assert torch.isfinite(outputs).all()


def test_the_transformer_takes_a_batch_of_padding_alone() -> None:
    """A warm-up or a padded last batch may hold nothing but zeros."""
    task = made(Path(), network="transformer", width=16, layers=1, heads=2)
    model = task.build(task.fit(sentences())).eval()
    assert torch.isfinite(model(torch.zeros(3, 12, dtype=torch.int32))).all()


def test_words_are_numbered_by_frequency_whatever_the_order_of_the_rows() -> None:
    texts = ["The cat, the dog.", "the CAT", "a dog"]
    words = text_tokens.learn_words(texts, most=100, at_least=2)
    assert words == "the cat dog"
    assert words == text_tokens.learn_words(reversed(texts), most=100, at_least=2)
    assert text_tokens.learn_words(texts, most=1, at_least=1) == "the"
    assert text_tokens.word_ids(["Dog the mouse", ""], words, 4).tolist() == [[4, 2, 1, 0], [1, 0, 0, 0]]


def test_a_tokenizer_with_padding_and_cut_of_its_own_is_told_otherwise(tmp_path: Path) -> None:
    """Model folders bring settings for another length; the task's `max_length` counts."""
    from tokenizers import Tokenizer

    here = tiny_folder(tmp_path)
    own = Tokenizer.from_file(str(here / "tokenizer.json"))
    own.enable_padding(length=30, pad_id=0)
    own.enable_truncation(3)
    own.save(str(here / "tokenizer.json"))
    task = made(here, network="huggingface")
    inputs = task.inputs(pa.table({"text": ["a good film and good fun"]}), task.fit(sentences()))
    assert inputs.shape == (1, 12)
    assert int((inputs != 0).sum()) == 8  # six words, and one mark at each end


@pytest.mark.parametrize("labels", [[3, 7], [False, True], ["no", "yes"]])
def test_labels_are_whole_numbers_or_strings(labels: list[Any]) -> None:
    rows = pa.table({"text": ["good good", "bad bad"] * 4, "label": labels * 4})
    task = made(Path(), width=8, heads=2, layers=1)
    transforms = json.loads(json.dumps(task.fit(rows)))
    assert task.targets(rows, transforms).tolist() == [0, 1] * 4
    answer: Any = Predictor(task, transforms, task.build(transforms)).predict([task.example(transforms)])[0]
    assert answer.label in labels


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ({"text": ["a", "a"], "label": [1, 1]}, {}, "label has 1 different values ([1]): expected 2 to 10000"),
        ({"text": ["a", "a"], "label": [1, 2]}, {"classes": 3}, "label has 2 different values ([1, 2]): expected 3"),
        ({"text": ["a", None], "label": [1, 2]}, {}, "text of row 1 is null"),
        ({"text": ["a", "a"], "label": [1, None]}, {}, "label of row 1 is null"),
        ({"text": [1, 2], "label": [1, 2]}, {}, "column text holds int64"),
        ({"text": ["a", "a"], "label": [1.0, 2.0]}, {}, "column label holds double"),
        ({"text": ["a", "b"], "label": [1, 2]}, {}, "no word occurs 2 times in 2 texts"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(rows: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(Path(), **options).fit(pa.table(rows))
    assert words in str(caught.value)


def test_a_label_that_the_training_rows_lack_is_named() -> None:
    task = made(Path())
    transforms = task.fit(sentences())
    with pytest.raises(UsageError, match=r"label is 'mixed': the model knows \['bad', 'good'\]"):
        task.check_rows(pa.table({"text": ["a"], "label": ["mixed"]}), transforms)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 10, "heads": 4}, "heads 4 does not divide width 10"),
        ({"network": "huggingface"}, "needs folder"),
        ({"network": "lstm", "folder": "x"}, "folder goes with network huggingface"),
        ({"network": "gru"}, "task.options.network is 'gru'"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_task("text_classification", options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json in folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json; write it there with"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "its tokenizer.json cannot be used"),
        (lambda folder: (folder / "config.json").write_text("[1"), "is no JSON"),
        (lambda folder: change_json(folder / "config.json", max_position_embeddings=8), "takes at most 8 tokens"),
        (lambda folder: change_json(folder / "config.json", vocab_size=5), "vocab_size in config.json is 5"),
        (lambda folder: change_json(folder / "config.json", model_type="gizmo"), "model_type 'gizmo' is no encoder"),
        (lambda folder: change_json(folder / "config.json", model_type="t5"), "model_type 't5' is no encoder"),
    ],
)
def test_a_model_folder_that_does_not_fit_says_why(tmp_path: Path, break_it: Any, words: str) -> None:
    break_it(tiny_folder(tmp_path))
    with pytest.raises(UsageError) as caught:
        made(tmp_path, network="huggingface").fit(sentences())
    assert words in str(caught.value)


def test_without_folder_and_hub_the_error_says_which_files_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"'owner/model': is no folder here.*folder with config.json, tokenizer.json"):
        find_task("text_classification", {"network": "huggingface", "folder": "owner/model"}).fit(sentences())
    with pytest.raises(UsageError, match=r"'/no/such/place': is no folder; expected a folder with config.json"):
        find_task("text_classification", {"network": "huggingface", "folder": "/no/such/place"}).fit(sentences())


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    """A config may name Python files of its folder (`auto_map`): they are never looked at."""
    here = tiny_folder(tmp_path)
    (here / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\nclass Config: pass\n")
    change_json(here / "config.json", auto_map={"AutoModel": "theirs.Theirs", "AutoConfig": "theirs.Config"})
    task = made(here, network="huggingface")
    task.build(task.fit(sentences()))
    assert not (tmp_path / "ran").exists()
