"""Tokenising: the prepare stage's path against one call and one `add_document` a document, on the same text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import Row

RUNS = 3
BUDGET = 20.0


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of the per-document paths over ours. Raises RuntimeError where files differ in any byte."""
    from launcher.configs import END, TokenizerConfig
    from launcher.workers.tokens import save_tokenizer, token_dtype, train_tokenizer

    texts = {"library text": _library_text(), "short problems": _problems()}
    tokenizer = train_tokenizer([t[:6000] for t in texts["library text"][:300]], TokenizerConfig(vocab_size=8192))
    save_tokenizer(tokenizer, scratch)
    end, dtype = tokenizer.token_to_id(END), token_dtype(tokenizer.get_vocab_size())
    megatron = _megatron_tokenizer(scratch)
    rows = []
    for name, documents in texts.items():
        ours, by_library, by_megatron = (scratch / f"{name.split()[0]}-{kind}" for kind in ("ours", "library", "core"))
        paths: dict[Path, Callable[[], int]] = {
            ours: lambda p=ours, d=documents: _ours(p, d, tokenizer, end, dtype),  # type: ignore[misc]
            by_library: lambda p=by_library, d=documents: _each(  # type: ignore[misc]
                p, d, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end, dtype
            ),
            by_megatron: lambda p=by_megatron, d=documents: _each(p, d, megatron, end, dtype),  # type: ignore[misc]
        }
        seconds, tokens = _time(paths)
        _compare(ours, by_library, by_megatron)
        size = sum(len(d.encode()) for d in documents)
        what = f"{name}: {len(documents)} documents, {size / 1e6:.1f} MB, {tokens} tokens, 8192 ids; identical files"
        rows += [
            Row(f"tokenising, {name}: ours", _per_million(seconds[ours], tokens), "s CPU/M tokens", what),
            Row(
                f"tokenising, {name}: megatron-core's tokenizer / ours",
                _ratios(seconds[by_megatron], seconds[ours]),
                "x",
                "megatron-core's Hugging Face tokenizer and IndexedDatasetBuilder, one call each a document",
                BUDGET,
                "higher",
            ),
            Row(
                f"tokenising, {name}: tokenizers, document by document / ours",
                _ratios(seconds[by_library], seconds[ours]),
                "x",
                "tokenizers' own encode in place of megatron-core's tokenizer: the most that can be said for it",
                BUDGET,
                "higher",
            ),
        ]
    return rows


def _library_text() -> list[str]:
    from launcher.configs import StdlibSource
    from launcher.workers.text import read_source

    return list(read_source("bench", StdlibSource(kind="python-stdlib", max_bytes=1_500_000), {}, 0).documents)


def _problems() -> list[str]:
    from launcher.configs import GeneratedSet
    from launcher.workers.problems import draw_problems, problem_text

    return [problem_text(row) for row in draw_problems("bench", GeneratedSet(count=2500), 0, set())]


def _megatron_tokenizer(folder: Path) -> Callable[[str], Sequence[int]]:
    """Megatron-core's own wrapper of a Hugging Face tokenizer, fast and with the call that it makes for whole ids."""
    import launcher.workers.megatron  # noqa: F401  must come before megatron.core

    # isort: split
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    encode: Callable[[str], Sequence[int]] = HuggingFaceTokenizer(
        str(folder), use_fast=True, include_special_tokens=True
    ).text_to_ids
    return encode


def _ours(prefix: Path, documents: Sequence[str], tokenizer: Any, end: int, dtype: Any) -> int:
    from launcher.workers.tokens import encode_documents, write_indexed

    return write_indexed(prefix, encode_documents(tokenizer, documents, end), dtype)[1]


def _each(prefix: Path, documents: Sequence[str], encode: Callable[[str], Sequence[int]], end: int, dtype: Any) -> int:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    tokens = 0
    for text in documents:
        ids = [*encode(text), end]
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def _time(paths: dict[Path, Callable[[], int]]) -> tuple[dict[Path, tuple[float, ...]], int]:
    """CPU seconds of all threads, the paths in turn, and the number of tokens."""
    found: dict[Path, list[float]] = {path: [] for path in paths}
    tokens = set()
    for _ in range(RUNS):
        for path, work in paths.items():
            began = time.process_time()
            tokens.add(work())
            found[path].append(time.process_time() - began)
    if len(tokens) != 1:
        raise RuntimeError(f"the paths do not agree on the number of tokens: {sorted(tokens)}")
    return {path: tuple(values) for path, values in found.items()}, tokens.pop()


def _compare(ours: Path, *others: Path) -> None:
    for other in others:
        for ending in ("bin", "idx"):
            if Path(f"{ours}.{ending}").read_bytes() != Path(f"{other}.{ending}").read_bytes():
                raise RuntimeError(f"{other.name}.{ending} is not byte-identical to {ours.name}.{ending}")


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(theirs, ours, strict=True))


def _per_million(seconds: Sequence[float], tokens: int) -> tuple[float, ...]:
    return tuple(s / tokens * 1e6 for s in seconds)
