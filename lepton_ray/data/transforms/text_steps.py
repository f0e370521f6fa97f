"""Text as token numbers, by a tokenizer that is learnt from the training rows or read from a file.

Learning counts words piece by piece, which adds up wherever it was done, and then trains on the counts in one place:
BPE and WordPiece look at nothing but how often each word occurs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton_ray.data.cleaning.steps import Fitting, Pieces, array_of
from lepton_ray.data.transforms.step import Transform, first_missing, replaced, vectors, with_field
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import transforms as settings
from lepton_ray.settings.node import Node

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_WORDS = 5_000_000
"""Different words that are counted."""
MAX_COUNTED = 20_000_000
"""Words that a tokenizer is trained on; more than these are counted in proportion."""
MAX_FILE = 64 * 2**20
"""Bytes of a tokenizer file."""
UNKNOWN = "[UNK]"


class Words(Fitting):
    """How often each word occurs in a column of text; missing texts have none."""

    def __init__(self, column: str, lower: bool) -> None:
        self._column, self._lower = column, lower
        self._counts: Counter[str] = Counter()

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        blank = _blank("bpe", self._lower)
        counts: Counter[str] = Counter()
        for text in array_of(rows, self._column).to_pylist():
            if text is not None:
                cleaned = blank.normalizer.normalize_str(text)
                counts.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(cleaned))
        return {
            "words": pa.table({"word": pa.array(counts, pa.string()), "count": pa.array(counts.values(), pa.int64())})
        }

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for answer in answers:
            words, counts = (answer["words"][name].to_pylist() for name in ("word", "count"))
            self._counts.update(dict(zip(words, counts, strict=True)))
            if len(self._counts) > MAX_WORDS:
                raise UsageError(f"column {shown(self._column)}: more than {MAX_WORDS:,} different words to learn from")
        self.done = True

    def result(self) -> dict[str, int]:
        """See Fitting."""
        return dict(sorted(self._counts.items()))


class Vocabulary(Node):
    """A tokenizer, as `tokenizer.json` has it."""

    tokenizer: str


class Tokenise(Transform[settings.Tokenise]):
    """See `settings.transforms.Tokenise`. A column becomes lists of int32 of one length."""

    Learnt = Vocabulary
    kinds = "text"

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        _library()
        return with_field(schema, self.settings.column, pa.list_(pa.int32(), self.settings.length))

    def fitting(self) -> Fitting | None:
        """See Transform."""
        return Words(self.settings.column, self.settings.lower) if self.settings.kind != "file" else None

    def learn(self, result: Any) -> Vocabulary:
        """See Transform."""
        if self.settings.tokenizer is not None:
            return Vocabulary(tokenizer=self._from_file(self.settings.tokenizer))
        if not result:
            raise UsageError(f"{self.where()}: column {shown(self.settings.column)} has no word to learn from")
        return Vocabulary(tokenizer=trained(result, self.settings))

    def apply(self, rows: pa.Table, learnt: Vocabulary) -> pa.Table:
        """See Transform."""
        texts = array_of(rows, self.settings.column)
        row = first_missing(texts)
        if row is not None:
            raise UsageError(
                f"{self.where()}: {shown(self.settings.column)} of row {row} is missing; expected text: put an impute "
                "step before this one, or clean the table"
            )
        made = np.zeros((len(texts), self.settings.length), np.int32)
        encoded = _tokenizer(learnt.tokenizer, self.settings.length).encode_batch_fast(texts.to_pylist())
        for index, one in enumerate(encoded):
            made[index, : len(one.ids)] = one.ids
            made[index, : len(one.ids)] += 1
        return replaced(rows, self.settings.column, vectors(made))

    def _from_file(self, path: str) -> str:
        where = f"{self.where()}.tokenizer {shown(path)}"
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_FILE + 1)
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}: cannot be read ({shown(str(error), 120)})") from error
        if len(data) > MAX_FILE:
            raise UsageError(f"{where}: more than {MAX_FILE:,} bytes; expected a tokenizer.json")
        _tokenizer(text, self.settings.length, where)
        return text


def vocabulary_size(learnt: Vocabulary) -> int:
    """Rows of an embedding for a tokenizer's numbers, padding included."""
    vocabulary = _tokenizer(learnt.tokenizer, 8).get_vocab(with_added_tokens=True)
    return 2 + max(vocabulary.values(), default=-1)


def trained(counts: Mapping[str, int], told: settings.Tokenise) -> str:
    """A tokenizer trained on words and how often each occurs; the same counts give the same one."""
    from tokenizers import Tokenizer, models, trainers

    made = _blank(told.kind, told.lower)
    if told.kind == "bpe":
        made.train_from_iterator(_repeated(counts), trainers.BpeTrainer(
            vocab_size=told.vocabulary, special_tokens=[UNKNOWN], show_progress=False
        ))  # fmt: skip
        return made.to_str()
    # the library numbers the letters within words in the order of a hash map, and breaks ties by these numbers: given
    # as known tokens they have the same ones each time. They are no special tokens in what is made of the vocabulary.
    within = sorted({f"##{letter}" for word in counts for letter in word[1:]})
    made.train_from_iterator(_repeated(counts), trainers.WordPieceTrainer(
        vocab_size=told.vocabulary, special_tokens=[UNKNOWN, *within], show_progress=False
    ))  # fmt: skip
    learnt = models.WordPiece(vocab=made.get_vocab(with_added_tokens=False), unk_token=UNKNOWN)
    final = Tokenizer(learnt)
    final.normalizer, final.pre_tokenizer = made.normalizer, made.pre_tokenizer
    return final.to_str()


def _repeated(counts: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it occurs, in lines of bounded length."""
    share = min(1.0, MAX_COUNTED / max(1, sum(counts.values())))
    for word, count in counts.items():
        left = max(1, round(count * share))
        while left > 0:
            yield " ".join([word] * min(left, 1000))
            left -= 1000


def _blank(kind: str, lower: bool) -> Tokenizer:
    """A tokenizer that has learnt nothing yet."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN) if kind == "bpe" else models.WordPiece(unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@functools.lru_cache(maxsize=4)
def _tokenizer(text: str, length: int, where: str = "transforms") -> Tokenizer:
    """A replica asks for every batch of requests: made once."""
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(text)
        made.no_padding()
        made.enable_truncation(length)
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{where}: no usable tokenizer.json ({shown(str(error), 120)}); fetch it anew") from error
    return made


def _library() -> None:
    try:
        import tokenizers  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UsageError("step tokenise needs package tokenizers; pip install 'lepton-ray[text]'") from error
