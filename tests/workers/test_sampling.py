"""Completions from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worker_stages import WorkerStage

from launcher.workers.checkpoints import load_model, quiet
from launcher.workers.problems import read_problems
from launcher.workers.sampling import Completion, completion, sample

HOW = {"max_new_tokens": 24, "seed": 3}


@pytest.fixture(scope="module")
def loaded(models: dict[str, Path], taught: Path) -> dict[str, tuple[Any, Any]]:
    quiet()
    return {"taught": load_model(taught), "nemotron": load_model(models["nemotron"])}


@pytest.fixture(scope="module")
def prompts(prepared: WorkerStage) -> list[str]:
    """Prompts of four lengths."""
    rows = read_problems(prepared.file("prompts", "reasoning.jsonl"))[:10]
    return [p["prompt"] for p in rows] + ["1 + 1 =\n", "x", "2 + 2 =\n"]


def by_hand(model: Any, tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """Greedy ids, one full forward a token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found: list[int] = []
    with torch.no_grad():
        while len(found) < longest and found[-1:] != [tokenizer.eos_token_id]:
            found.append(int(model(torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize(("name", "count", "longest"), [("taught", 13, 24), ("nemotron", 5, 8)])
def test_temperature_0_is_argmax_whatever_the_batch(
    loaded: dict, prompts: list[str], name: str, count: int, longest: int
) -> None:
    model, tokenizer = loaded[name]
    chosen = prompts[-count:]
    wanted = [completion(tokenizer, by_hand(model, tokenizer, p, longest)) for p in chosen]
    for batch_size in (1, 3, 64):
        how = {**HOW, "max_new_tokens": longest, "batch_size": batch_size}
        assert sample(model, tokenizer, chosen, temperature=0, **how) == wanted
    # The test would say nothing if all completions were the same, or if none ended before the limit.
    assert len({c.text for c in wanted}) > count / 2
    assert any(c.ended for c in wanted) or name == "nemotron"


def test_sampling_is_seeded_and_follows_the_temperature(loaded: dict, prompts: list[str]) -> None:
    model, tokenizer = loaded["taught"]

    def texts(seed: int, temperature: float) -> list[str]:
        how = {**HOW, "seed": seed, "temperature": temperature, "batch_size": 8}
        return [c.text for c in sample(model, tokenizer, prompts, **how)]

    assert texts(1, 1.0) == texts(1, 1.0)
    assert texts(1, 1.0) != texts(2, 1.0)
    assert texts(1, 1e-4) == texts(2, 1e-4) == texts(1, 0)


def test_first_tokens_are_drawn_from_the_models_distribution(loaded: dict) -> None:
    model, tokenizer = loaded["taught"]
    prompt, draws = "3 + 4 =\n", 2000
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    how = {"temperature": 1.5, "max_new_tokens": 1, "seed": 0, "batch_size": 500}
    counts: dict[str, int] = {}
    for c in sample(model, tokenizer, [prompt] * draws, **how):
        counts[c.text] = counts.get(c.text, 0) + 1
    best = wanted.topk(3)
    for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        found = counts.get(completion(tokenizer, [token]).text, 0) / draws
        assert abs(found - share) < 5 * (share * (1 - share) / draws) ** 0.5 + 1e-9
    assert len(counts) > 50  # neither top-k nor top-p cuts the tail


def test_progress_is_told_after_each_batch(loaded: dict, prompts: list[str]) -> None:
    done: list[int] = []
    model, tokenizer = loaded["taught"]
    sample(model, tokenizer, prompts, temperature=0, batch_size=4, after_batch=done.append, **HOW)
    assert done == sorted(set(done))
    assert done[-1] == len(prompts)


def test_completion_is_cut_at_the_end_token(loaded: dict) -> None:
    _, tokenizer = loaded["taught"]
    ids = tokenizer("<think>1</think>2", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert completion(tokenizer, [*ids, end, 50, end]) == Completion("<think>1</think>2", True, len(ids) + 1)
    assert completion(tokenizer, ids) == Completion("<think>1</think>2", False, len(ids))
    assert completion(tokenizer, [end]) == Completion("", True, 1)
    # A padding token is text like any other until the end token came: the reward must see it.
    assert completion(tokenizer, [*ids, tokenizer.pad_token_id, end]).text == "<think>1</think>2<pad>"
