"""Text classification: one label per text. The model is an LSTM, a transformer or a Hugging Face encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lepton_ray.errors import UsageError, shown
from lepton_ray.tasks import model_folder, text_tokens
from lepton_ray.tasks.classifying import ClassifiesByLabels, LabelAnswer
from lepton_ray.tasks.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import torch

MAX_TEXT = 100_000
"""Characters of a text in a request at most."""
MAX_CLASSES = 10_000
"""More different labels than this are no classes but, say, numbers to predict."""
FOLDER = "task.options.folder"


class TextClassificationOptions(BaseModel):
    """Options of the task."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    network: Literal["lstm", "transformer", "huggingface"] = "transformer"
    """`lstm`: a bidirectional LSTM; `transformer`: an encoder; `huggingface`: the encoder that `folder` describes."""
    folder: str | None = None
    """For `huggingface`: the path of a model folder (config.json, tokenizer.json), or `owner/model` on the hub. It
    gives architecture and tokenizer; name it in `training.initial.weights` too for its weights."""
    classes: Annotated[int, Field(ge=2, le=MAX_CLASSES)] | None = None
    """Number of different labels, where it should be checked."""
    max_length: Annotated[int, Field(ge=1, le=8192)] = 64
    """Tokens of a text that are looked at; what comes after is cut off."""
    vocabulary: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """Most frequent words that are told apart (not for `huggingface`)."""
    min_count: Annotated[int, Field(ge=1)] = 2
    """How often a word must occur in the training rows to be told apart (not for `huggingface`)."""
    width: Annotated[int, Field(ge=1, le=8192)] = 128
    """Values per token (not for `huggingface`)."""
    layers: Annotated[int, Field(ge=1, le=128)] = 4
    """Layers of the LSTM or blocks of the transformer."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Attention heads of the transformer; they divide `width`."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of activations dropped in training (for `huggingface`: before the head)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.network == "transformer" and self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.network == "huggingface" and not self.folder:
            raise ValueError("network huggingface needs folder: a folder with config.json, tokenizer.json and "
                             "model.safetensors, or owner/model on the hub")  # fmt: skip
        if self.network != "huggingface" and self.folder:
            raise ValueError(f"folder goes with network huggingface, not {self.network}; leave one of them out")
        return self


class TextRequest(BaseModel):
    """One text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class TextClassification(ClassifiesByLabels, Task[TextClassificationOptions, TextRequest]):
    """One of a fixed number of labels for each text.

    Rows: `text` (string), `label` (whole numbers or strings; the classes are those of the training rows).
    """

    name: ClassVar[str] = "text_classification"
    Options: ClassVar[type[BaseModel]] = TextClassificationOptions
    Request: ClassVar[type[BaseModel]] = TextRequest
    Answer: ClassVar[type[BaseModel]] = LabelAnswer
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    decides: ClassVar[tuple[str, Literal["max", "min"]]] = ("accuracy", "max")
    directions: ClassVar[Mapping[str, Literal["max", "min"]]] = {"loss": "min", **CLASSIFICATION}

    def fit(self, rows: pa.Table) -> dict[str, Any]:
        """The labels, sorted, and the vocabulary, or config and tokenizer of the model folder."""
        if rows.num_rows == 0:
            raise UsageError("training rows: there are none; ingest a table with rows")
        texts, labels = _texts(rows), sorted(set(_labels(rows)))
        options = self.options
        if not 2 <= len(labels) <= MAX_CLASSES or (options.classes or len(labels)) != len(labels):
            wanted = f"{options.classes}" if options.classes else f"2 to {MAX_CLASSES}"
            raise UsageError(
                f"label has {len(labels)} different values ({shown(labels)}): expected {wanted}; clean the table or "
                "set task.options.classes"
            )
        if options.network == "huggingface":
            return {"labels": labels, **self._from_folder()}
        words = text_tokens.learn_words(texts, most=options.vocabulary, at_least=options.min_count)
        if not words:
            raise UsageError(
                f"training rows: no word occurs {options.min_count} times in {rows.num_rows} texts; "
                "lower task.options.min_count or give more texts"
            )
        return {"labels": labels, "words": words}

    def _from_folder(self) -> dict[str, Any]:
        folder = model_folder.find_folder(self.options.folder or "", FOLDER)
        config = model_folder.read_config(folder, FOLDER)
        longest = config.get("max_position_embeddings")
        if isinstance(longest, int) and 0 < longest < self.options.max_length:
            raise UsageError(
                f"task.options.max_length is {self.options.max_length}: the model of {shown(folder)} takes at most "
                f"{longest} tokens; lower it"
            )
        tokenizer = model_folder.read_tokenizer(folder, FOLDER)
        text_tokens.check_tokenizer(tokenizer, config, f"{FOLDER} {shown(folder)}")
        import torch

        from lepton_ray.tasks.text_networks import make_encoder

        with torch.device("meta"):  # a config of a wrong kind is told here, not by every rank
            make_encoder(config)
        return {"config": config, "tokenizer": tokenizer}

    def build(self, transforms: Mapping[str, Any]) -> torch.nn.Module:
        """The chosen network, with random weights; it takes nothing from the model folder any more."""
        from lepton_ray.tasks import text_networks

        options, classes = self.options, len(transforms["labels"])
        if options.network == "huggingface":
            return text_networks.FolderClassifier(config=transforms["config"], classes=classes, dropout=options.dropout)
        vocabulary = text_tokens.vocabulary_size(transforms["words"])
        if options.network == "lstm":
            return text_networks.LstmClassifier(
                vocabulary=vocabulary, classes=classes, width=options.width, layers=options.layers,
                dropout=options.dropout,
            )  # fmt: skip
        return text_networks.TransformerClassifier(
            vocabulary=vocabulary, classes=classes, width=options.width, layers=options.layers, heads=options.heads,
            dropout=options.dropout, max_length=options.max_length,
        )  # fmt: skip

    def check_rows(self, rows: pa.Table, transforms: Mapping[str, Any]) -> None:
        """UsageError for a row without text or with a label that the training rows do not have."""
        _texts(rows)
        known = set(transforms["labels"])
        wrong = next((label for label in _labels(rows) if label not in known), None)
        if wrong is not None:
            raise UsageError(
                f"label is {shown(wrong)}: the model knows {shown(transforms['labels'])}; clean the table, or give the "
                "training rows some of it"
            )

    def inputs(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Token numbers as int32 `[rows, max_length]`, 0 is padding."""
        import torch

        texts, longest = _texts(rows), self.options.max_length
        if self.options.network == "huggingface":
            return torch.from_numpy(text_tokens.tokenizer_ids(texts, transforms["tokenizer"], longest))
        return torch.from_numpy(text_tokens.word_ids(texts, transforms["words"], longest))

    def targets(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Places of the labels among the sorted labels, as int64 `[rows]`."""
        import torch

        self.check_rows(rows, transforms)
        places = {label: place for place, label in enumerate(transforms["labels"])}
        return torch.from_numpy(np.array([places[label] for label in _labels(rows)], np.int64))

    def rows_of(self, requests: Sequence[TextRequest], transforms: Mapping[str, Any]) -> pa.Table:
        """Texts as rows."""
        return pa.table({"text": pa.array([request.text for request in requests], pa.string())})

    def example(self, transforms: Mapping[str, Any]) -> TextRequest:
        """A short sentence."""
        return TextRequest(text="An example of a text.")


def _texts(rows: pa.Table) -> list[str]:
    """The text column. Raises UsageError naming the first row without one."""
    column = rows["text"]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UsageError(f"column text holds {column.type}: expected strings; ingest it as text")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UsageError(f"text of row {row} is null: expected a string in every row; clean the table")
    return column.to_pylist()  # type: ignore[no-any-return]


def _labels(rows: pa.Table) -> list[Any]:
    """The label column, all whole numbers or all strings. Raises UsageError."""
    column = rows["label"]
    kind = column.type
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"column label holds {kind}: expected whole numbers or strings, one per class")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UsageError(f"label of row {row} is null: expected a label in every row; clean the table")
    return column.to_pylist()  # type: ignore[no-any-return]
