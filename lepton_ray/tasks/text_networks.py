"""Networks for text: a bidirectional LSTM, a transformer encoder, and any encoder of a Hugging Face model folder.

All take token numbers int32 `[rows, tokens]` with 0 as padding and give logits `[rows, classes]`. A row's logits depend
on that row alone, whatever it is batched with, so the result is the same however a batch is cut over ranks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lepton_ray.errors import UsageError, shown
from lepton_ray.tasks.text_tokens import PADDING


def real_tokens(ids: torch.Tensor) -> torch.Tensor:
    """True where a token is no padding, `[rows, tokens]`; the first place of each row counts as real always.

    Without that a row of padding alone would divide by zero and poison its batch.
    """
    real = ids != PADDING
    real[:, 0] = True
    return real


def trimmed(ids: torch.Tensor) -> torch.Tensor:
    """The batch without the columns that are padding in every row.

    Only on the CPU, where it saves most of the time on short texts: a GPU would have to be waited for, and a compiled
    model wants one shape.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.shape[0] == 0:
        return ids
    return ids[:, : max(1, int((ids != PADDING).sum(1).max()))]


def mean_over(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of `states` `[rows, tokens, width]` over the real tokens, `[rows, width]`."""
    weights = real.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


class LstmClassifier(nn.Module):
    """Word embeddings, a bidirectional LSTM, the maximum over the text, a linear head (Conneau et al. 2017, 3.2.2)."""

    def __init__(self, *, vocabulary: int, classes: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        # texts are packed, so the backward direction starts at the last word and not in the padding
        self.lstm = nn.LSTM(
            width, width, layers, batch_first=True, bidirectional=True, dropout=dropout if layers > 1 else 0.0
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)
        with torch.no_grad():
            self.embedding.weight.normal_(std=0.1)[PADDING].zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, classes]` of token numbers `[rows, tokens]`."""
        ids = trimmed(ids)
        real = real_tokens(ids)
        words = self.dropout(self.embedding(ids))
        packed = nn.utils.rnn.pack_padded_sequence(words, real.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])
        strongest = states.masked_fill(~real.unsqueeze(-1), float("-inf")).amax(1)
        logits: torch.Tensor = self.head(self.dropout(strongest))
        return logits


class Block(nn.Module):
    """One layer of the encoder: attention and a feed-forward part, each on normalised input (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `[rows, tokens, width]` to states; `mask` `[rows, 1, 1, tokens]` is True where to look."""
        normal = self.attention_norm(states)
        rows, tokens, width = normal.shape
        query, key, value = (
            part(normal).view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.rate if self.training else 0.0
        )
        states = states + self.dropout(self.output(seen.transpose(1, 2).reshape(rows, tokens, width)))
        fed: torch.Tensor = self.contract(functional.gelu(self.expand(self.feed_norm(states))))
        made: torch.Tensor = states + self.dropout(fed)
        return made


class TransformerClassifier(nn.Module):
    """Word and position embeddings, `layers` blocks, the mean over the text, a linear head (Vaswani et al. 2017)."""

    def __init__(
        self, *, vocabulary: int, classes: int, width: int, layers: int, heads: int, dropout: float, max_length: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            self.embedding.weight.normal_(std=0.02)[PADDING].zero_()
            self.positions.weight.normal_(std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, classes]` of token numbers `[rows, tokens]`, at most `max_length` tokens."""
        ids = trimmed(ids)
        real = real_tokens(ids)
        mask = real[:, None, None, :]
        states = self.dropout(self.embedding(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            states = block(states, mask)
        logits: torch.Tensor = self.head(self.dropout(mean_over(self.norm(states), real)))
        return logits


class FolderClassifier(nn.Module):
    """The encoder that a Hugging Face `config.json` describes, the mean over the text, a linear head.

    The encoder's weights are random until `training.initial` fills them; its own dropout is what the config says.
    """

    def __init__(self, *, config: Mapping[str, Any], classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = make_encoder(config)
        self.padding = int(self.encoder.config.pad_token_id or 0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, classes]` of tokenizer numbers plus 1 `[rows, tokens]`."""
        ids = trimmed(ids)
        real = real_tokens(ids)
        numbers = torch.where(ids == PADDING, self.padding, ids - 1)
        states = self.encoder(input_ids=numbers, attention_mask=real.long()).last_hidden_state
        logits: torch.Tensor = self.head(self.dropout(mean_over(states, real)))
        return logits


def make_encoder(config: Mapping[str, Any]) -> Any:
    """The bare encoder of a `config.json`, in fp32 with random weights, without a pooler (which would learn nothing).

    Raises UsageError for a config that `transformers` has no encoder for. Code in a model folder is never run.
    """
    try:
        # not by `import`: a type checker would read all of it, which takes minutes
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "task.options.network is 'huggingface': needs package transformers; install it with "
            "pip install 'lepton-ray[text]'"
        ) from error
    kind = config.get("model_type")
    fields = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    try:
        made = transformers.AutoConfig.for_model(kind, **fields)
        if made.is_encoder_decoder:
            raise ValueError("an encoder with a decoder")  # noqa: TRY301 - one sentence for all that does not fit
        encoder = transformers.AutoModel.from_config(made, dtype=torch.float32, trust_remote_code=False)
        int(made.hidden_size)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise UsageError(
            f"task.options.folder: config.json with model_type {shown(kind)} is no encoder that transformers has "
            f"({shown(str(error))}); take the folder of an encoder such as BERT, RoBERTa or DistilBERT"
        ) from error
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder
