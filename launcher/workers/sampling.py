"""Completions from a checkpoint: batches of prompts of equal length, so that there is no padding; seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

#: How a text is made into tokens: nothing is added to it, and special tokens that it spells are text.
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}


@dataclass(frozen=True)
class Completion:
    """The text after a prompt without the end token, whether that came, and the number of tokens with it."""

    text: str
    ended: bool
    tokens: int


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, at most `size` together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, group in groupby(order, key=lambda i: lengths[i]):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    after_batch: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion a prompt, in the prompts' order; temperature 0 is greedy, otherwise plain sampling."""
    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [tokenizer(p, **AS_TEXT)["input_ids"] for p in prompts]
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        use_cache=True,
        **({"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}),
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
    )
    found: list[Completion | None] = [None] * len(prompts)
    done = 0
    for batch in _batches([len(i) for i in ids], batch_size):
        start = torch.tensor([ids[i] for i in batch], device=model.device)
        with torch.no_grad():
            output = model.generate(input_ids=start, attention_mask=torch.ones_like(start), generation_config=how)
        for i, row in zip(batch, output[:, start.shape[1] :].tolist(), strict=True):
            found[i] = completion(tokenizer, row)
        done += len(batch)
        after_batch(done)
    return [c for c in found if c is not None]


def completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Completion:
    """A completion from its ids, cut at the end token."""
    end = tokenizer.eos_token_id
    ended = end in ids
    kept = list(ids[: list(ids).index(end)]) if ended else list(ids)
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Completion(text, ended, len(kept) + ended)
