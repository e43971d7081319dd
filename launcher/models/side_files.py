"""Files of a Hugging Face folder that travel with a model's weights. Standard library only."""

from __future__ import annotations

from fnmatch import fnmatchcase

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)
_CONFIGS = ("config.json", "generation_config.json")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of that name is part of a tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)


def is_side_file(name: str) -> bool:
    """Whether a file of that name is carried along: neither weights nor code."""
    return name in _CONFIGS or is_tokenizer_file(name)
