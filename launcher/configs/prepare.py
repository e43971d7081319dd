"""Tokenizers, sources of text and problem sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.configs.option import ITEM_NAME, option, refuse_wrong

_HALF = "holds half a character, which UTF-8 cannot"


#: The padding and end tokens of a trained tokenizer, and the special tokens that text may spell.
PAD, END = "<pad>", "<eos>"


ALLOWED_SPECIAL = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: one that exists (`path`), or a byte-level BPE trained on the stage's own sources."""

    path: str | None = option(None, "A folder with tokenizer.json, or hf:ORG/NAME. None: train one.")
    vocab_size: int = option(512, "Size of a trained vocabulary.")
    special_tokens: tuple[str, ...] = option(("<think>", "</think>"), "Added to a trained tokenizer.")
    allowed_special: tuple[str, ...] = option(
        ALLOWED_SPECIAL, "Special tokens that become tokens where a text spells them; all others stay text."
    )

    def __post_init__(self) -> None:
        names = ("special_tokens", "allowed_special")
        refuse_wrong(
            *(("" in getattr(self, name), name, "holds an empty token") for name in names),
            *(
                (any("\ud800" <= c <= "\udfff" for token in getattr(self, name) for c in token), name, _HALF)
                for name in names
            ),
        )

    @property
    def too_small(self) -> str | None:
        """What is wrong where a trained vocabulary has no room for all bytes and the special tokens."""
        least = 256 + len({PAD, END, *self.special_tokens})
        if self.path is not None or self.vocab_size >= least:
            return None
        return f"{self.vocab_size} is below the {least} that bytes and specials take"


@dataclass(frozen=True, kw_only=True)
class ProblemSetConfig:
    """What every set of reasoning problems with checked answers says."""

    count: int = option(..., "Problems wanted; fewer are an error.")
    exclude: tuple[str, ...] = option((), "Sets whose problems (by normalised text) are left out of this one.")

    def __post_init__(self) -> None:
        refuse_wrong((self.count < 1, "count", f"must be at least 1, got {self.count}"))


@dataclass(frozen=True, kw_only=True)
class PublishedSet(ProblemSetConfig):
    """Published set: problems as they are published."""

    path: str = option(..., "Its file or folder.")


@dataclass(frozen=True, kw_only=True)
class GeneratedSet(ProblemSetConfig):
    """Generated set: problems by the reasoning-gym library."""

    task: str = option("chain_sum", "Name of the reasoning-gym task.")
    seed_offset: int = option(0, "Added to the stage's seed, so that sets differ.")
    settings: Mapping[str, Any] = option({}, "Arguments of the reasoning-gym task.")
    totals: tuple[int, int] | None = option(None, "chain_sum: keep problems whose running totals stay within.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every source of training text says; it is tokenised into NAME.bin and NAME.idx."""

    kind: str = option(..., "Where the text comes from.")
    share: tuple[float, float] = option((0.0, 1.0), "Part of the documents, shuffled by the seed, from and to.")
    max_bytes: int | None = option(None, "Stop after this much text.")

    def __post_init__(self) -> None:
        low, high = self.share
        refuse_wrong(
            (not 0 <= low < high <= 1, "share", f"must be two rising numbers within 0..1, got [{low}, {high}]"),
            (
                self.max_bytes is not None and self.max_bytes < 1,
                "max_bytes",
                f"must be at least 1, got {self.max_bytes}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class StdlibSource(SourceConfig):
    """The running interpreter's library, as a corpus that every machine has."""

    kind: Literal["python-stdlib"] = option(..., "Where the text comes from.")


@dataclass(frozen=True, kw_only=True)
class FilesSource(SourceConfig):
    """Files of text, or of jsonl with the key `text`."""

    kind: Literal["files"] = option(..., "Where the text comes from.")
    path: str = option(..., "A file or folder, .txt, .py, .md, .jsonl or .json (key `text`), each also as .gz.")


@dataclass(frozen=True, kw_only=True)
class ProblemsSource(SourceConfig):
    """A problem set of this stage, each problem with its trace."""

    kind: Literal["problems"] = option(..., "Where the text comes from.")
    problems: str = option(..., "Name of the problem set.")
    terse_share: float = option(0.0, "Share written with the answer alone in place of a worked trace.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_wrong((not 0 <= self.terse_share <= 1, "terse_share", f"must be within 0..1, got {self.terse_share}"))


@dataclass(frozen=True, kw_only=True)
class DatasetSource(SourceConfig):
    """A published data set as it is published."""

    kind: Literal["dataset"] = option(..., "Where the text comes from.")
    path: str = option(..., "Its folder.")
    layout: Literal["text", "question-answer", "chat"] = option(
        "text", "What a row holds. Question and answer are joined by one line break; turns name the speaker."
    )


#: A source is told by its `kind`, a published problem set from a generated one by its `path`.
AnySource = StdlibSource | FilesSource | ProblemsSource | DatasetSource


AnyProblemSet = PublishedSet | GeneratedSet


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenizer, token files and problem sets: ports `tokenizer`, `tokens` and `prompts`."""

    folder: str | None = option(
        None, "Folder that paths of sources and problem sets start from; default: the recipe's.", identity=False
    )
    tokenizer: TokenizerConfig = option(TokenizerConfig(), "The tokenizer.")
    sources: Mapping[str, AnySource] = option(..., "Training text by name.")
    problems: Mapping[str, AnyProblemSet] = option({}, "Problem sets by name.")

    def __post_init__(self) -> None:
        known = ", ".join(self.problems) or "none"
        refuse_wrong(
            *(
                (not ITEM_NAME.fullmatch(name), f"{key}.{name}", "a name is letters, digits and . _ -, at most 60")
                for key, named in (("sources", self.sources), ("problems", self.problems))
                for name in named
            ),
            *(
                (True, f"sources.{name}.problems", f"no problem set {s.problems}; there is {known}")
                for name, s in self.sources.items()
                if isinstance(s, ProblemsSource) and s.problems not in self.problems
            ),
            *(
                (True, f"problems.{name}.exclude", f"no problem set {other}; there is {known}")
                for name, p in self.problems.items()
                for other in p.exclude
                if other not in self.problems
            ),
        )
