"""A tokenizer and a prepare stage in miniature, for tests of what users' files may hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "workers"))

from worker_stages import WorkerStage, make_stage

PAD, END = "<pad>", "<eos>"


def write_tokenizer(folder: Path, **settings: Any) -> Path:
    """A byte-level tokenizer of 300 tokens or fewer; `settings` go to tokenizer_config.json, None takes one out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    byte_level = pre_tokenizers.ByteLevel
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = byte_level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[PAD, END], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    made.train_from_iterator(["some words of some text, and another line of it"], trainer)
    made.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, **settings}
    kept = {key: value for key, value in named.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def prepare(
    root: Path,
    tokenizer: Path,
    texts: Sequence[str] | Path,
    settings: Mapping[str, Any] | None = None,
) -> WorkerStage:
    """A prepare stage, done in this process: source `text`, of these documents or of the files at a path."""
    from launcher.workers import prepare as worker

    root.mkdir(parents=True, exist_ok=True)
    path = texts if isinstance(texts, Path) else root / "text.jsonl"
    if not isinstance(texts, Path):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {
        "tokenizer": {"path": str(tokenizer), **(settings or {})},
        "sources": {"text": {"kind": "files", "path": str(path)}},
    }
    stage = make_stage(root / "root", "prepare", config)
    worker.main(stage.job())
    return stage


def token_file(stage: WorkerStage) -> bytes:
    """The tokens of its source."""
    return stage.file("tokens", "text.bin").read_bytes()
