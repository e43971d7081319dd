"""prepare: problem sets, tokenizer and token files. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.configs import PrepareConfig
from launcher.errors import UserError
from launcher.progress import StageJob, Stopped, run_worker
from launcher.store import sha256_of


def main(job: StageJob) -> None:
    """Fill the ports `prompts`, `tokenizer` and `tokens`."""
    config: PrepareConfig = job.config(PrepareConfig)
    total = len(config.problems) + len(config.sources) + 1
    problems = _draw_all(job, config, total)
    texts = {}
    from launcher.workers.text import read_source

    for name, source in config.sources.items():
        texts[name] = read_source(name, source, problems, job.spec.seed)
    tokenizer, end_id = _tokenizer(job, config, {name: text.documents for name, text in texts.items()})
    job.beat(len(problems) + 1, total)
    sources = []
    for name, text in texts.items():
        sources.append(_write_source(job, name, text, tokenizer, end_id, config.sources[name].kind))
        job.beat(len(problems) + 1 + len(sources), total, tokens=sources[-1]["tokens"])
        _stop_if_asked(job)
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


def _draw_all(job: StageJob, config: PrepareConfig, total: int) -> dict[str, list[dict[str, Any]]]:
    """Every problem set, each after those that it excludes, written to SET.jsonl."""
    from launcher.workers.problems import draw_problems, normalised

    drawn: dict[str, list[dict[str, Any]]] = {}
    for name in _after_excluded(config):
        excluded = {normalised(row["prompt"]) for other in config.problems[name].exclude for row in drawn[other]}
        drawn[name] = draw_problems(name, config.problems[name], job.spec.seed, excluded)
        job.beat(len(drawn), total, problems=len(drawn[name]))
        _stop_if_asked(job)
        lines = [json.dumps(row, sort_keys=True) for row in drawn[name]]
        (job.output("prompts") / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    job.output("prompts")
    return drawn


def _after_excluded(config: PrepareConfig) -> list[str]:
    order: list[str] = []
    waiting = dict(config.problems)
    while waiting:
        ready = [n for n, p in waiting.items() if set(p.exclude) <= set(order)]
        if not ready:
            raise UserError(f"problems: sets exclude one another in a circle: {', '.join(waiting)}")
        order += ready
        waiting = {n: p for n, p in waiting.items() if n not in ready}
    return order


def _tokenizer(job: StageJob, config: PrepareConfig, texts: Mapping[str, Sequence[str]]) -> tuple[Any, int]:
    """The tokenizer and the id of its end token; its files are in the port `tokenizer`."""
    from tokenizers import Tokenizer

    from launcher.workers.tokens import END, save_tokenizer, train_tokenizer

    folder = job.output("tokenizer")
    if config.tokenizer.path is None:
        tokenizer = train_tokenizer(_sample(texts), config.tokenizer)
        save_tokenizer(tokenizer, folder)
        return tokenizer, tokenizer.token_to_id(END)
    source = Path(config.tokenizer.path).expanduser()
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source}: holds no tokenizer.json; name a folder that AutoTokenizer saved")
    for path in source.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer, _end_id(folder, tokenizer)


def _end_id(folder: Path, tokenizer: Any) -> int:
    path = folder / "tokenizer_config.json"
    token = json.loads(path.read_text()).get("eos_token") if path.exists() else None
    content = token.get("content") if isinstance(token, dict) else token
    end_id = tokenizer.token_to_id(content) if content else None
    if end_id is None:
        raise UserError(f"{path}: names no eos_token that the tokenizer knows")
    return int(end_id)


def _sample(texts: Mapping[str, Sequence[str]], documents: int = 1500, characters: int = 6000) -> list[str]:
    """What a tokenizer is trained on: the beginning of the first documents of each source."""
    return [text[:characters] for source in texts.values() for text in source[:documents]]


def _write_source(job: StageJob, name: str, text: Any, tokenizer: Any, end_id: int, kind: str) -> dict[str, Any]:
    from launcher.workers.tokens import encode_documents, token_dtype, write_indexed

    prefix = job.output("tokens") / name
    ids = encode_documents(tokenizer, text.documents, end_id)
    documents, tokens = write_indexed(prefix, ids, token_dtype(tokenizer.get_vocab_size()))
    facts = {
        "name": name,
        "kind": kind,
        "documents": documents,
        "tokens": tokens,
        "bytes": sum(len(d.encode()) for d in text.documents),
        "sha256": sha256_of(prefix.with_name(f"{name}.bin")),
        "origin": dict(text.origin),
    }
    prefix.with_name(f"{name}.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts


if __name__ == "__main__":
    run_worker(main)
