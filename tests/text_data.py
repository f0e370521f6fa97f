"""Text for tests: a few sentences, a tiny Hugging Face model folder made on the spot, and the real samples."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa

SCRIPT = Path(__file__).parents[1] / "scripts" / "text_samples.py"
GOOD = ("a good film", "what a good and warm story", "good fun for all", "warm and good")
BAD = ("a bad film", "what a bad and cold story", "bad fun for none", "cold and bad")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in GOOD + BAD for word in text.split()})]


def sentences(copies: int = 4) -> pa.Table:
    """Rows that any text model can tell apart."""
    texts = [*GOOD, *BAD] * copies
    return pa.table({"text": texts, "label": (["good"] * len(GOOD) + ["bad"] * len(BAD)) * copies})


def tiny_folder(folder: Path, *, seed: int = 0, shards: bool = False) -> Path:
    """A BERT of 2 layers with random weights, as `save_pretrained` writes it, and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    words.save(str(folder / "tokenizer.json"))
    return folder


def change_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; None removes one."""
    made = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in made.items() if value is not None}))


def samples() -> ModuleType:
    """scripts/text_samples.py as a module: `snippets()` and `encoder()`."""
    name = "text_samples"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
