"""prepare: problem sets, tokenizer and token files. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.configs import AnyProblemSet, GeneratedSet, PrepareConfig, ProblemsSource
from launcher.errors import UserError
from launcher.models.side_files import copy_tokenizer
from launcher.models.tokenizer_files import end_of, read_tokenizer_files
from launcher.progress import StageJob, Stopped, run_worker
from launcher.references import is_on_hub
from launcher.store import sha256_of, write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from launcher.workers.text import Source


def main(job: StageJob) -> None:
    """Fill the ports `prompts`, `tokenizer` and `tokens`. Raises UserError with all problems seen at once."""
    from launcher.workers.text import read_source

    config: PrepareConfig = job.config(PrepareConfig)
    check(config)
    total = len(config.problems) + len(config.sources) + 1
    problems = _draw_all(job, config, total)
    texts = {name: read_source(name, source, problems, job.spec.seed) for name, source in config.sources.items()}
    tokenizer, end_id, settings = _tokenizer(job, config, [text.documents for text in texts.values()])
    job.beat(len(problems) + 1, total)
    sources = []
    for name, text in texts.items():
        _stop_if_asked(job)
        sources.append(_write_source(job, config, name, text, tokenizer, end_id))
        job.beat(len(problems) + 1 + len(sources), total, tokens=sources[-1]["tokens"])
    job.record(
        sources=sources,
        problems={name: len(rows) for name, rows in problems.items()},
        tokenizer={"vocab_size": tokenizer.get_vocab_size(), "trained": config.tokenizer.path is None},
        settings=settings,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("reasoning_gym", "tokenizers", "numpy")},
        },
    )


def _stop_if_asked(job: StageJob) -> None:
    if job.stop_requested:
        raise Stopped("stopped before the end; a later attempt starts this stage anew")


def _all_problems(actions: Iterable[Callable[[], object]]) -> None:
    """Run all; raise one UserError with the problems of those that failed."""
    problems: list[str] = []
    for action in actions:
        try:
            action()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def check(config: PrepareConfig) -> None:
    """See, before the long work, that sets, sources and tokenizer can be made. Raises UserError with all problems."""
    from launcher.workers.problems import open_task
    from launcher.workers.text import read_documents
    from launcher.workers.tokenizer import build
    from launcher.workers.tokens import check_vocab_size

    def tokenizer() -> None:
        check_vocab_size(config.tokenizer)
        if config.tokenizer.path is not None:
            build(read_tokenizer_files(_find_tokenizer(config.tokenizer.path)), config.tokenizer.allowed_special)

    _all_problems(
        [
            lambda: _after_excluded(config),
            *(partial(open_task, name, _generated(problems), 0) for name, problems in config.problems.items()),
            *(partial(read_documents, s) for s in config.sources.values() if not isinstance(s, ProblemsSource)),
            tokenizer,
        ]
    )


def _generated(problems: AnyProblemSet) -> GeneratedSet:
    """A problem set of a stage that is planned."""
    assert isinstance(problems, GeneratedSet), "`launcher.stages.prepare` refuses published ones"
    return problems


def _after_excluded(config: PrepareConfig) -> list[str]:
    """The problem sets, each after those that it excludes."""
    order: list[str] = []
    waiting = dict(config.problems)
    while waiting:
        ready = [n for n, p in waiting.items() if set(p.exclude) <= set(order)]
        if not ready:
            raise UserError(
                f"problems: sets exclude one another in a circle: {', '.join(waiting)}; take one `exclude` out"
            )
        order += ready
        waiting = {n: p for n, p in waiting.items() if n not in ready}
    return order


def _draw_all(job: StageJob, config: PrepareConfig, total: int) -> dict[str, list[dict[str, Any]]]:
    """Every problem set, written to SET.jsonl."""
    from launcher.workers.problems import draw_problems, normalised

    drawn: dict[str, list[dict[str, Any]]] = {}

    def draw(name: str) -> None:
        wanted = _generated(config.problems[name])
        if not set(wanted.exclude) <= set(drawn):
            return  # what it must exclude could not be drawn, which is reported
        excluded = {normalised(row["prompt"]) for other in wanted.exclude for row in drawn[other]}
        drawn[name] = draw_problems(name, wanted, job.spec.seed, excluded)
        lines = (json.dumps(row, sort_keys=True) for row in drawn[name])
        write_atomic(job.output("prompts") / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        job.beat(len(drawn), total, problems=len(drawn[name]))
        _stop_if_asked(job)

    _all_problems(partial(draw, name) for name in _after_excluded(config))
    return drawn


def _find_tokenizer(path: str) -> Path:
    """The folder of a tokenizer that exists. Raises UserError where it is none."""
    if is_on_hub(path):
        raise UserError(
            f"tokenizer.path: {path}: fetching from a hub is not built yet; download it and name its folder"
        )
    folder = Path(path).expanduser()
    end_of(read_tokenizer_files(folder))
    return folder


def _tokenizer(
    job: StageJob, config: PrepareConfig, texts: Iterable[Sequence[str]]
) -> tuple[Tokenizer, int, dict[str, Any]]:
    """The tokenizer, the id of its end token and what the receipt says; its files are in the port `tokenizer`."""
    from launcher.workers import tokenizer
    from launcher.workers.tokens import save_tokenizer, train_tokenizer

    folder = job.output("tokenizer")
    if config.tokenizer.path is None:
        save_tokenizer(train_tokenizer(_sample(texts), config.tokenizer), folder)
    else:
        copy_tokenizer(_find_tokenizer(config.tokenizer.path), folder)
    files = read_tokenizer_files(folder)
    allowed = config.tokenizer.allowed_special
    made = tokenizer.build(files, allowed)
    return made, end_of(files)[1], tokenizer.facts(made, allowed, files.set_aside)


def _sample(texts: Iterable[Sequence[str]], documents: int = 1500, characters: int = 6000) -> list[str]:
    """What a tokenizer is trained on: the beginning of the first documents of each source."""
    return [text[:characters] for source in texts for text in source[:documents]]


def _write_source(
    job: StageJob, config: PrepareConfig, name: str, text: Source, tokenizer: Tokenizer, end_id: int
) -> dict[str, Any]:
    from launcher.workers.tokenizer import spelled
    from launcher.workers.tokens import encode_documents, token_dtype, write_indexed

    prefix = job.output("tokens") / name
    try:
        ids = encode_documents(tokenizer, text.documents, end_id)
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"sources.{name}: the tokenizer cannot cut its text into tokens: {error}") from None
    documents, tokens = write_indexed(prefix, ids, token_dtype(max(tokenizer.get_vocab().values()) + 1))
    special = spelled(tokenizer, text.documents, config.tokenizer.allowed_special)
    if special["as_text"]:
        counts = ", ".join(f"{token} ×{count}" for token, count in special["as_text"].items())
        print(f"sources.{name}: special tokens that it spells are text: {counts}")
    facts = {
        "name": name,
        "kind": config.sources[name].kind,
        "documents": documents,
        "tokens": tokens,
        "bytes": sum(len(d.encode()) for d in text.documents),
        "special_tokens": special,
        "sha256": sha256_of(prefix.with_name(f"{name}.bin")),
        "origin": dict(text.origin),
    }
    write_atomic(prefix.with_name(f"{name}.json"), json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts


if __name__ == "__main__":
    run_worker(main)
