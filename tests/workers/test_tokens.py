"""Token files and the tokenizer that fills them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from launcher.configs import TokenizerConfig
from launcher.errors import UserError
from launcher.workers.tokens import (
    encode_documents,
    read_indexed,
    save_tokenizer,
    token_dtype,
    train_tokenizer,
    write_indexed,
)

TEXTS = [
    "def f(x):\n    return x + 12345\n",
    "über 3 und 40 – naïve <think>6+2=8</think>8",
    "while True:\n\tpass\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 130000])
def test_bytes_are_those_of_megatrons_builder(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    rng = random.Random(vocab_size)
    documents = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 300))] for _ in range(40)]
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    assert write_indexed(tmp_path / "ours", documents, dtype) == (40, sum(map(len, documents)))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(40)] == documents
    assert [d.tolist() for d in read_indexed(tmp_path / "ours")] == documents


def test_files_that_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.idx"):
        read_indexed(tmp_path / "absent")
    write_indexed(tmp_path / "a", [[1, 2], [3]], token_dtype(300))
    index = (tmp_path / "a.idx").read_bytes()
    for content in (b"", b"something else", index[:20], index[:17] + b"\7" + index[18:]):
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(UserError, match="not an index"):
            read_indexed(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(b"\1\0")
    with pytest.raises(UserError, match="counts other tokens"):
        read_indexed(tmp_path / "a")


def test_text_survives_tokens_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    for text in [*TEXTS[:3], "\u2603 \x01 \r\n  tail ", "987654321"]:
        (ids,) = encode_documents(tokenizer, [text], 1)
        assert ids[-1] == tokenizer.token_to_id("<eos>") == 1
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text
    assert len(tokenizer.encode("987654321").ids) == 9
    specials = [tokenizer.token_to_id(t) for t in ("<think>", "</think>")]
    assert specials == [298, 299]
    assert set(specials) <= set(encode_documents(tokenizer, [TEXTS[1]], 1)[0])


def test_transformers_reads_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 300)
    for text, ids in zip(TEXTS[:3], encode_documents(tokenizer, TEXTS[:3], 1), strict=True):
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids[:-1]
        assert loaded.decode(ids[:-1]) == text


def test_vocabulary_without_room() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: 259 is below the 260 "):
        train_tokenizer(TEXTS, TokenizerConfig(vocab_size=259))
    assert train_tokenizer(TEXTS, TokenizerConfig(vocab_size=260)).get_vocab_size() == 260
    assert train_tokenizer(["aa"], TokenizerConfig(vocab_size=400)).get_vocab_size() < 400
