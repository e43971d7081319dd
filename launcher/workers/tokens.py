"""Token files in the layout of Megatron's IndexedDataset: NAME.bin, NAME.idx; and the tokenizer that fills them.

Source of the layout: megatron/core/datasets/indexed_dataset.py. Byte-identical to its IndexedDatasetBuilder, written
from whole arrays.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from launcher.configs import END, PAD, TokenizerConfig
from launcher.errors import UserError

#: Ids of a text as they lie on disk.
Ids: TypeAlias = npt.NDArray[numpy.uint16 | numpy.int32]

_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[numpy.dtype[numpy.uint16 | numpy.int32], int] = {numpy.dtype(numpy.uint16): 8, numpy.dtype(numpy.int32): 4}


def token_dtype(vocab_size: int) -> numpy.dtype[numpy.uint16 | numpy.int32]:
    """The type of ids on disk: 16 bits where they are enough, as Megatron's DType.optimal_dtype chooses."""
    return numpy.dtype(numpy.uint16 if vocab_size < 65500 else numpy.int32)


def write_indexed(
    prefix: Path, documents: Iterable[Sequence[int]], dtype: numpy.dtype[numpy.uint16 | numpy.int32]
) -> tuple[int, int]:
    """Write PREFIX.bin and PREFIX.idx, one sequence a document; returns (documents, tokens).

    The .idx is renamed into place last, so that its presence means that both are whole.
    """
    arrays = [numpy.asarray(document, dtype=dtype) for document in documents]
    lengths = numpy.array([len(a) for a in arrays], dtype=numpy.int32)
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        file.write(numpy.concatenate(arrays).tobytes() if arrays else b"")
    pointers = numpy.zeros(len(arrays), dtype=numpy.int64)
    numpy.cumsum(lengths[:-1].astype(numpy.int64) * dtype.itemsize, out=pointers[1:])
    boundaries = numpy.arange(len(arrays) + 1, dtype=numpy.int64)
    header = _MAGIC + struct.pack("<QBQQ", 1, _CODES[dtype], len(arrays), len(boundaries))
    temporary = prefix.with_name(prefix.name + ".idx.partial")
    temporary.write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
    os.replace(temporary, prefix.with_name(prefix.name + ".idx"))
    return len(arrays), int(lengths.sum(dtype=numpy.int64))


def read_indexed(prefix: Path) -> list[Ids]:
    """The sequences of PREFIX.bin, by PREFIX.idx. Raises UserError where they are no such files."""
    index = prefix.with_name(prefix.name + ".idx")
    try:
        content = index.read_bytes()
    except OSError as error:
        raise UserError(f"{index}: {error.strerror}") from None
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    if content[:9] != _MAGIC or len(content) < 34 or content[17] not in dtypes:
        raise UserError(f"{index}: not an index of Megatron's indexed dataset with 16 or 32 bit ids")
    sequences = struct.unpack("<Q", content[18:26])[0]
    lengths = numpy.frombuffer(content, dtype=numpy.int32, count=sequences, offset=34)
    tokens = numpy.fromfile(prefix.with_name(prefix.name + ".bin"), dtype=dtypes[content[17]])
    if lengths.sum(dtype=numpy.int64) != len(tokens):
        raise UserError(f"{index}: counts other tokens than {prefix.name}.bin holds")
    documents: list[Ids] = numpy.split(tokens, numpy.cumsum(lengths, dtype=numpy.int64)[:-1])
    return documents


def check_vocab_size(config: TokenizerConfig) -> None:
    """Raises UserError where the vocabulary has no room for all bytes and the special tokens."""
    if config.too_small:
        raise UserError(f"tokenizer.vocab_size: {config.too_small}")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE, digits one by one, special tokens of the config last.

    It has `vocab_size` ids, or fewer where the texts are too short to merge so many pairs.
    """
    check_vocab_size(config)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    room = config.vocab_size - len(set(config.special_tokens) - {PAD, END})
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=room, special_tokens=[PAD, END], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(config.special_tokens))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what AutoTokenizer loads: tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], end_id: int) -> list[list[int]]:
    """Ids of every text, the end token after each."""
    return [[*e.ids, end_id] for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
