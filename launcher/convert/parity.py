"""The same prompts through transformers' model and through megatron-core's, which a conversion made of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import WorldError
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape

#: Largest difference of logits over the largest logit, in fp32: sums in another order, nothing more.
TOLERANCE = 1e-4
PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "If 3x + 5 = 20, then x equals 5, because 20 - 5 = 15 and",
    "<think>\nFirst add the tens, then the ones: 40 + 30 = 70, 7 + 5 =",
)
_TOKENS = 64


def compare(hf: Path, megatron: Path, config: Path | None = None) -> dict[str, Any]:
    """Logits of both models, in fp32, on `PROMPTS`, or on random tokens where there is no tokenizer.

    `config`: the folder with config.json and tokenizer where that is not `hf`. Loads both models whole, one after the
    other. transformers keeps Mamba's dt above a bound that megatron-core does
    not have; it is taken off, and its effect told apart. Raises WorldError where the logits differ by more than
    `TOLERANCE`.
    """
    config = config or hf
    shape = shape_of(json.loads((config / "config.json").read_text(encoding="utf-8")))
    rows, source = _tokens(config, shape)
    theirs, clamped = _hf_logits(hf, config, rows)
    ours = _megatron_logits(megatron, shape, rows)
    figures: dict[str, Any] = {
        "prompts": len(rows),
        "tokens": sum(len(row) for row in rows),
        "prompts_are": source,
        "largest_relative_difference": difference(ours, theirs),
        "top1_agreement": agreement(ours, theirs),
        "tolerance": TOLERANCE,
        "precision": "fp32",
    }
    if clamped is not None:
        figures["dt_clamp"] = "transformers' lower bound of dt was taken off; megatron-core has none"
        figures["largest_relative_difference_with_dt_clamp"] = difference(ours, clamped)
    if not figures["largest_relative_difference"] <= TOLERANCE:
        raise WorldError(
            f"parity: logits of {hf} and {megatron} differ by {figures['largest_relative_difference']:.2g} of the "
            f"largest, and at most {TOLERANCE:g} is rounding; top-1 agreement {figures['top1_agreement']:.1%}"
        )
    return figures


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """max |a - b| / max |b| over all prompts."""
    largest = max(float(y.abs().max()) for y in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / largest


def agreement(a: list[Tensor], b: list[Tensor]) -> float:
    """Share of the positions at which the largest logit is that of the same token."""
    same = torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in zip(a, b, strict=True)])
    return float(same.float().mean())


def _tokens(hf: Path, shape: ModelShape) -> tuple[list[list[int]], str]:
    """Token ids of each prompt, no longer than a sliding window: attention on a CPU has none."""
    most = min(_TOKENS, shape.max_position_embeddings, shape.window_size or _TOKENS)
    if any((hf / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
        rows = [[i for i in tokenizer.encode(text) if i < shape.vocab_size][:most] for text in PROMPTS]
        if all(rows) and len({i for row in rows for i in row}) > len(PROMPTS):
            return rows, "text"
    random = torch.Generator().manual_seed(0)
    return [torch.randint(shape.vocab_size, (most,), generator=random).tolist() for _ in PROMPTS], "random tokens"


def _hf_logits(folder: Path, config: Path, rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Logits without a lower bound of dt, and with it where the model has one."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=AutoConfig.from_pretrained(config, local_files_only=True),
        generation_config=GenerationConfig(),  # else it is looked for in `folder`
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
    ).eval()

    def logits() -> list[Tensor]:
        with torch.no_grad():
            return [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]

    mixers = [m for m in model.modules() if getattr(m, "time_step_limit", (0.0,))[0] > 0]
    if not mixers:
        return logits(), None
    clamped = logits()
    for mixer in mixers:
        mixer.time_step_limit = (0.0, float("inf"))
    return logits(), clamped


def _megatron_logits(folder: Path, shape: ModelShape, rows: list[list[int]]) -> list[Tensor]:
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.model import build_model
    from launcher.workers.megatron.parallel import process_groups

    with process_groups(), torch.no_grad():
        model = build_model(shape).eval()
        checkpoint.load_weights(folder, model)
        found = []
        for row in rows:
            ids = torch.tensor([row])
            found.append(model(ids, torch.arange(len(row))[None], None)[0, :, : shape.vocab_size])
    return found
