"""Small Hugging Face checkpoints of every family, as transformers itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from real_models import REAL, twin

REPOSITORY = Path(__file__).resolve().parent.parent
_BASE = {
    "vocab_size": 300,  # no multiple of 128: padding rows are made and cut
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def _recipe(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes" / "models" / f"{name}.yaml").read_text())["config"]
    return config


#: Name to config.json; the keys that are absent get transformers' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama"},
    "llama-tied": {**_BASE, "model_type": "llama", "head_dim": 16, "tie_word_embeddings": True},
    **{name: twin(name) for name in REAL},
    **{name: _recipe(name) for name in ("llama-tiny", "granite-tiny", "nemotron-h-tiny")},
}


def save_checkpoint(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """A model with random weights and a tokenizer of its vocabulary's size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_weight(name, parameter.shape))
    model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", ".D")):  # exponents, which trainers keep in full precision
            parameter.data = parameter.data.float()
    model.save_pretrained(folder)
    word_tokenizer(config["vocab_size"]).save_pretrained(folder)


def _random_weight(name: str, size: Any) -> Any:
    """A weight of which a wrong place, order or scale shows in the logits: nothing is 0, 1 or constant."""
    import torch

    if name.endswith("A_log"):
        return torch.empty(size).uniform_(1.0, 16.0).log()
    if name.endswith("dt_bias"):
        return torch.empty(size).uniform_(-6.0, 1.0)  # below -7 lies transformers' clamp of dt, which is its own test
    if len(size) == 1 and not name.endswith("bias"):
        return 1 + 0.2 * torch.randn(size)
    return 0.2 * torch.randn(size)


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of the words t2, t3 … beside <pad> and <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
