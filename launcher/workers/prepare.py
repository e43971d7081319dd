"""prepare: problem sets, tokenizer and token files. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.configs import PrepareConfig
from launcher.errors import UserError
from launcher.models.side_files import is_tokenizer_file
from launcher.progress import StageJob, Stopped, run_worker
from launcher.references import is_on_hub
from launcher.store import sha256_of, write_atomic


def main(job: StageJob) -> None:
    """Fill the ports `prompts`, `tokenizer` and `tokens`. Raises UserError with all problems seen at once."""
    from launcher.workers.text import read_source

    config: PrepareConfig = job.config(PrepareConfig)
    check(config)
    total = len(config.problems) + len(config.sources) + 1
    problems = _draw_all(job, config, total)
    texts = {name: read_source(name, source, problems, job.spec.seed) for name, source in config.sources.items()}
    tokenizer, end_id = _tokenizer(job, config, [text.documents for text in texts.values()])
    job.beat(len(problems) + 1, total)
    sources = []
    for name, text in texts.items():
        _stop_if_asked(job)
        sources.append(_write_source(job, name, text, tokenizer, end_id, config.sources[name].kind))
        job.beat(len(problems) + 1 + len(sources), total, tokens=sources[-1]["tokens"])
    job.record(
        sources=sources,
        problems={name: len(rows) for name, rows in problems.items()},
        tokenizer={"vocab_size": tokenizer.get_vocab_size(), "trained": config.tokenizer.path is None},
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
    from launcher.workers.tokens import check_vocab_size

    def tokenizer() -> None:
        if config.tokenizer.path is None:
            check_vocab_size(config.tokenizer)
        else:
            _find_tokenizer(config.tokenizer.path)

    _all_problems(
        [
            lambda: _after_excluded(config),
            *(lambda n=n, p=p: open_task(n, p, 0) for n, p in config.problems.items()),
            *(lambda s=s: read_documents(s) for s in config.sources.values() if s.kind != "problems"),
            tokenizer,
        ]
    )


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
        wanted = config.problems[name]
        if not set(wanted.exclude) <= set(drawn):
            return  # what it must exclude could not be drawn, which is reported
        excluded = {normalised(row["prompt"]) for other in wanted.exclude for row in drawn[other]}
        drawn[name] = draw_problems(name, wanted, job.spec.seed, excluded)
        lines = (json.dumps(row, sort_keys=True) for row in drawn[name])
        write_atomic(job.output("prompts") / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        job.beat(len(drawn), total, problems=len(drawn[name]))
        _stop_if_asked(job)

    _all_problems(lambda name=name: draw(name) for name in _after_excluded(config))
    return drawn


def _find_tokenizer(path: str) -> Path:
    """The folder of a tokenizer that exists. Raises UserError where it is none."""
    if is_on_hub(path):
        raise UserError(
            f"tokenizer.path: {path}: fetching from a hub is not built yet; download it and name its folder"
        )
    folder = Path(path).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path: {folder}: holds no tokenizer.json; name a folder that AutoTokenizer saved")
    _end_token(folder)
    return folder


def _end_token(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no tokenizer's settings: {error}") from None
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise UserError(f"{path}: names no eos_token, which ends every document")
    return content


def _tokenizer(job: StageJob, config: PrepareConfig, texts: Iterable[Sequence[str]]) -> tuple[Any, int]:
    """The tokenizer and the id of its end token; its files are in the port `tokenizer`."""
    from tokenizers import Tokenizer

    from launcher.workers.tokens import END, save_tokenizer, train_tokenizer

    folder = job.output("tokenizer")
    if config.tokenizer.path is None:
        tokenizer = train_tokenizer(_sample(texts), config.tokenizer)
        save_tokenizer(tokenizer, folder)
        return tokenizer, tokenizer.token_to_id(END)
    source = _find_tokenizer(config.tokenizer.path)
    for path in sorted(p for p in source.iterdir() if is_tokenizer_file(p.name) and p.is_file()):
        shutil.copyfile(path, folder / path.name)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{source / 'tokenizer.json'}: not a tokenizer: {error}") from None
    end = _end_token(folder)
    end_id = tokenizer.token_to_id(end)
    if end_id is None:
        raise UserError(f"{source / 'tokenizer_config.json'}: eos_token {end} is not in tokenizer.json")
    return tokenizer, int(end_id)


def _sample(texts: Iterable[Sequence[str]], documents: int = 1500, characters: int = 6000) -> list[str]:
    """What a tokenizer is trained on: the beginning of the first documents of each source."""
    return [text[:characters] for source in texts for text in source[:documents]]


def _write_source(job: StageJob, name: str, text: Any, tokenizer: Any, end_id: int, kind: str) -> dict[str, Any]:
    from launcher.workers.tokens import encode_documents, token_dtype, write_indexed

    prefix = job.output("tokens") / name
    ids = encode_documents(tokenizer, text.documents, end_id)
    documents, tokens = write_indexed(prefix, ids, token_dtype(max(tokenizer.get_vocab().values()) + 1))
    facts: Mapping[str, Any] = {
        "name": name,
        "kind": kind,
        "documents": documents,
        "tokens": tokens,
        "bytes": sum(len(d.encode()) for d in text.documents),
        "sha256": sha256_of(prefix.with_name(f"{name}.bin")),
        "origin": dict(text.origin),
    }
    write_atomic(prefix.with_name(f"{name}.json"), json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return dict(facts)


if __name__ == "__main__":
    run_worker(main)
