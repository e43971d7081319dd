"""analyze: weight change and representation similarity of pairs of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.configs import LEAST_TEXTS, AnalyzeConfig
from launcher.errors import UserError
from launcher.progress import StageJob, Stopped, run_worker
from launcher.references import item_of, port_of
from launcher.store import write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from launcher.workers.tokens import Ids


def main(job: StageJob) -> None:
    """Fill the port `analysis`: analysis.json."""
    from launcher.workers.weight_diff import module_rows, rows, weight_change

    config: AnalyzeConfig = job.config(AnalyzeConfig)
    names = list(dict.fromkeys(name for pair in config.pairs for name in pair))
    total = len(config.pairs) + len(names)
    weights: list[dict[str, Any]] = []
    modules: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for number, (a, b) in enumerate(config.pairs):
        _beat(job, number, total)
        whole, parts = weight_change(job.input(a), job.input(b), config.thresholds, notes.setdefault)
        head = {"from": a, "to": b}
        weights += rows(whole, head)
        modules += module_rows(parts, head)
    set_aside: dict[str, list[str]] = {}
    cka = _cka(job, config, names, total, set_aside)
    body = {"weights": weights, "weights_by_module": modules, "cka": cka, "dtypes": _dtypes(job, names)}
    write_json(job.output("analysis") / "analysis.json", body)
    job.record(versions=_versions(), settings={"added_to_every_text": None, "set_aside": set_aside}, notes=list(notes))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


def _beat(job: StageJob, done: int, total: int) -> None:
    if job.stop_requested:
        raise Stopped("stopped before the end; a later attempt starts this stage anew")
    job.beat(done, total)


def _dtypes(job: StageJob, names: Sequence[str]) -> dict[str, list[str]]:
    """The types of the tensors on disk: a change below bf16's step cannot be seen in bf16 files."""
    from safetensors import safe_open

    found: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        for path in job.input(name).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found[name] |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return {name: sorted(types) for name, types in found.items()}


def _cka(
    job: StageJob, config: AnalyzeConfig, names: Sequence[str], total: int, set_aside: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Rows of every pair on problem texts and, as a control, on the source; `set_aside` is filled by checkpoint."""
    from launcher.workers.checkpoints import load_checkpoint, quiet
    from launcher.workers.cka import cka_rows, pooled_states

    quiet()
    states: dict[tuple[str, str], Tensor] = {}
    for number, name in enumerate(names):
        loaded = load_checkpoint(job.input(name))
        model, tokenizer, set_aside[name] = loaded.model, loaded.tokenizer, list(loaded.set_aside)
        for label, texts in _texts(job, config, tokenizer).items():
            _beat(job, len(config.pairs) + number, total)
            states[name, label] = pooled_states(model, tokenizer, texts)
    labels = list(dict.fromkeys(label for _, label in states))
    return [
        row
        for a, b in config.pairs
        for label in labels
        for row in cka_rows(states[a, label], states[b, label], {"from": a, "to": b, "texts": label})
    ]


def _texts(job: StageJob, config: AnalyzeConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    from launcher.workers.problems import problem_text, read_problems
    from launcher.workers.tokens import read_indexed

    prompts = job.input(port_of(config.problems, "prompts"))
    problems = read_problems(prompts / f"{item_of(config.problems)}.jsonl")[: config.num_texts]
    found = {"problems": [problem_text(p) for p in problems]}
    if config.source:
        prefix = job.input(port_of(config.source, "tokens")) / item_of(config.source)
        pieces = text_pieces(read_indexed(prefix), config.num_texts)
        found["source"] = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in pieces]
    for label, texts in found.items():
        if len(texts) < LEAST_TEXTS:
            where = config.problems if label == "problems" else config.source
            raise UserError(f"{where}: only {len(texts)} texts for CKA; at least {LEAST_TEXTS} are needed")
    return found


def text_pieces(documents: Sequence[Ids], count: int, length: int = 128) -> list[Ids]:
    """At most `count` runs of `length` tokens, spread evenly over the documents; no end tokens."""
    pieces = [
        doc[i : i + length] for doc in (d[:-1] for d in documents) for i in range(0, len(doc) - length + 1, length)
    ]
    chosen = min(count, len(pieces))
    return [pieces[i * len(pieces) // chosen] for i in range(chosen)]


if __name__ == "__main__":
    run_worker(main)
