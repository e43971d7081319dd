"""Linear CKA of mean-pooled hidden states, layer by layer, between two checkpoints.

PRISM, section 10: ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) on 200 prompts, centred; that is `value`. It is biased upwards
where there are fewer texts than dimensions, so `debiased` (unbiased HSIC; Song et al. 2012) stands beside it. Neither
sees through a few massive activations that all texts share: read them with a control text and the weight change.

By hand: `python -m launcher.workers.cka A B --texts FILE [--json]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.errors import UserError
from launcher.files import MOST_ROWS, read_bytes
from launcher.user_json import decode
from launcher.workers.sampling import AS_TEXT
from launcher.workers.weight_diff import run_by_hand

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256


def pooled_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Mean over tokens of every layer's hidden states, the embedding first: [layers + 1, texts, hidden]."""
    found = []
    for text in texts:
        ids = tokenizer(text, **AS_TEXT, return_tensors="pt")["input_ids"][:, :MAX_TOKENS]
        with torch.no_grad():
            states = model(input_ids=ids.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
        found.append(torch.stack([state[0].double().mean(0).cpu() for state in states]))
    return torch.stack(found, dim=1)


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Biased linear CKA of [texts, width] matrices; None where one of them is constant or not finite."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    cross, own, other = (y.T @ x).norm() ** 2, (x.T @ x).norm(), (y.T @ y).norm()
    return _finite(cross / (own * other))


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


def debiased_cka(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """CKA with the unbiased estimator of HSIC; may be slightly negative, needs at least four texts. None as above."""
    grams = [m.double() @ m.double().T for m in (x - x.mean(0), y - y.mean(0))]
    for gram in grams:
        gram.fill_diagonal_(0)
    k, m = grams
    return _finite(_hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt())


def _hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    n = len(k)
    trace = (k * m).sum()
    ends = k.sum() * m.sum() / ((n - 1) * (n - 2))
    middle = 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return (trace + ends - middle) / (n * (n - 3))


def cka_rows(before: torch.Tensor, after: torch.Tensor, head: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer; layer 0 is the embedding."""
    if before.shape[0] != after.shape[0]:
        raise UserError(f"{len(before) - 1} layers against {len(after) - 1}: not checkpoints of one architecture")
    return [
        {**head, "layer": layer, "value": linear_cka(x, y), "debiased": debiased_cka(x, y), "n": x.shape[0]}
        for layer, (x, y) in enumerate(zip(before, after, strict=True))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """`cka A B --texts FILE [--json]`."""
    from launcher.workers.checkpoints import load_checkpoint, quiet

    parser = argparse.ArgumentParser(prog="prism-launch cka", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    texts = read_texts(args.texts)
    quiet()
    states = []
    for folder in (args.before, args.after):
        loaded = load_checkpoint(folder)
        for setting in loaded.set_aside:
            print(f"{folder}: counts for nothing: {setting}", file=sys.stderr)
        states.append(pooled_states(loaded.model, loaded.tokenizer, texts))
    found = cka_rows(states[0], states[1], {"from": str(args.before), "to": str(args.after), "texts": str(args.texts)})
    if args.json:
        print(json.dumps({"cka": found}, indent=2))
        return 0
    print(f"linear CKA on {len(texts)} texts (debiased in brackets)")
    for row in found:
        value, debiased = ("undefined" if row[k] is None else f"{row[k]:.4f}" for k in ("value", "debiased"))
        print(f"  layer {row['layer']:>3}: {value} ({debiased})")
    return 0


def read_texts(path: Path) -> list[str]:
    """One text a line. Raises UserError where there are fewer than four."""
    try:
        text = decode(read_bytes(path, MOST_ROWS, piped=True), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    texts = [line for line in text.split("\n") if line.strip()]
    if len(texts) < 4:
        raise UserError(f"{path}: {len(texts)} texts; CKA needs at least 4, and means little below a hundred")
    return texts


if __name__ == "__main__":
    sys.exit(run_by_hand(main))
