"""Text to token numbers: words by frequency for the networks of our own, a model folder's tokenizer for the others.

What is learnt or read is kept as text in the transforms, so a rank or a replica needs nothing but them. Number 0 is
always padding.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lepton_ray.errors import UsageError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN = 0, 1
"""Numbers that stand for no word and for a word that is not in the vocabulary."""
FIRST = 2
"""Number of the most frequent word."""
MAX_WORD = 100
"""Characters of a word that are looked at: what is longer is cut."""
_WORD = re.compile(r"\w+|[^\w\s]")

TokenIds = npt.NDArray[np.int32]


def words_of(text: str) -> list[str]:
    """The lower-case words of a text; every punctuation mark is a word of its own."""
    return [word[:MAX_WORD] for word in _WORD.findall(text.lower())]


def learn_words(texts: Iterable[str], *, most: int, at_least: int) -> str:
    """The `most` most frequent words that occur `at_least` times, most frequent first, joined by spaces.

    Words of one frequency are in alphabetical order, so the same texts in any order give the same vocabulary. A word
    left out is what the number of unknown words is learnt from.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    kept = sorted((word for word, count in counts.items() if count >= at_least), key=lambda w: (-counts[w], w))
    return " ".join(kept[:most])


def word_ids(texts: Sequence[str], words: str, max_length: int) -> TokenIds:
    """Numbers of the words of each text, `[texts, max_length]`, cut or padded; no row is without a word."""
    numbers = _numbers(words)
    rows = [[numbers.get(word, UNKNOWN) for word in words_of(text)[:max_length]] or [UNKNOWN] for text in texts]
    return _padded(rows, max_length)


def vocabulary_size(words: str) -> int:
    """Rows of an embedding for these words, padding and unknown included."""
    return FIRST + len(_numbers(words))


def tokenizer_ids(texts: Sequence[str], tokenizer: str, max_length: int) -> TokenIds:
    """Numbers that a `tokenizer.json` gives each text, each plus 1 so that 0 is padding, `[texts, max_length]`.

    Special tokens are added as the tokenizer says, and counted in the length.
    """
    encoded = _tokenizer(tokenizer, max_length).encode_batch_fast(list(texts))
    return _padded([[number + 1 for number in one.ids] or [UNKNOWN] for one in encoded], max_length)


def check_tokenizer(tokenizer: str, config: Mapping[str, Any], where: str) -> None:
    """Raise UsageError where the text is no tokenizer, or makes numbers that the model of `config` does not have."""
    made = _tokenizer(tokenizer, 8, where)
    most = max(made.get_vocab(with_added_tokens=True).values(), default=-1)
    known = config.get("vocab_size")
    if not isinstance(known, int) or most >= known:
        raise UsageError(
            f"{where}: its tokenizer.json has tokens up to {most}, but vocab_size in config.json is {shown(known)}; "
            "take both files from one model"
        )


@functools.lru_cache(maxsize=8)
def _numbers(words: str) -> dict[str, int]:
    return {word: FIRST + index for index, word in enumerate(words.split(" ") if words else [])}


@functools.lru_cache(maxsize=4)
def _tokenizer(text: str, max_length: int, where: str = "transforms") -> Tokenizer:
    """A replica asks for every batch of requests: made once."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "task.options.network is 'huggingface': needs package tokenizers; install it with "
            "pip install 'lepton-ray[text]'"
        ) from error
    try:
        made = Tokenizer.from_str(text)
        made.no_padding()
        made.enable_truncation(max_length)
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{where}: its tokenizer.json cannot be used ({shown(str(error))}); fetch it anew") from error
    return made


def _padded(rows: Sequence[Sequence[int]], max_length: int) -> TokenIds:
    made = np.full((len(rows), max_length), PADDING, np.int32)
    for index, row in enumerate(rows):
        made[index, : len(row)] = row[:max_length]
    return made
