"""Reading a config.json, of transformers 4 or 5, with every problem named at once. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from launcher.errors import UserError

T = TypeVar("T")

#: What megatron-core's RotaryEmbedding has built in for llama3 scaling; other values would be ignored without a word.
LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: What megatron-core's MambaMixer gives the norm inside it, whatever the model's epsilon is.
MAMBA_NORM_EPSILON = 1e-5


class Config:
    """A config.json being read: values asked for by name, problems collected until `done`."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A value that must be there."""
        value = self.values.get(name)
        self.refuse(value is None, f"{name} is missing")
        return value

    def must(self, name: str, wanted: Any) -> None:
        """Refuse any other value than the one that the conversion and the trainer know."""
        value = self.get(name, wanted)
        self.refuse(value != wanted, f"{name} is {value}; only {wanted} is covered")

    def refuse(self, wrong: bool, message: str) -> None:
        """Note a problem."""
        if wrong and message not in self.problems:
            self.problems.append(message)

    def done(self, build: Callable[[], T]) -> T:
        """The value, or UserError with every problem."""
        value = None
        try:
            value = build()
        except (TypeError, ValueError, KeyError, ArithmeticError):
            self.refuse(not self.problems, "config.json has values of an unexpected type")
        if self.problems or value is None:
            raise UserError([f"model type {self.get('model_type')}: {p}" for p in self.problems])
        return value


def common(c: Config) -> dict[str, Any]:
    """The fields of every family."""
    heads = c.need("num_attention_heads")
    width = c.need("hidden_size")
    return {
        "hidden_size": width,
        "ffn_hidden_size": c.need("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": c.get("num_key_value_heads", heads),
        "kv_channels": c.get("head_dim") or width // heads,
        "vocab_size": c.need("vocab_size"),
        "max_position_embeddings": c.need("max_position_embeddings"),
        "share_embeddings_and_output_weights": bool(c.get("tie_word_embeddings", False)),
    }


def mamba_steps(c: Config) -> None:
    """Refuse a lower bound of dt: megatron-core has none."""
    c.refuse((c.get("time_step_limit") or [0.0])[0] != 0.0, "time_step_limit above 0 is not covered")


def mamba_norm(c: Config, name: str) -> None:
    """Refuse an epsilon that the norm inside a Mamba layer would not have in Megatron."""
    value = c.need(name)
    c.refuse(
        value not in (None, MAMBA_NORM_EPSILON),
        f"{name} is {value}; megatron-core has {MAMBA_NORM_EPSILON} built in for the norm inside Mamba layers",
    )


def rope(c: Config) -> dict[str, Any]:
    """RoPE's base and scaling, as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) says them."""
    new = c.get("rope_parameters")
    old = c.get("rope_scaling") or {}
    spellings = "rope_parameters and rope_scaling are both there and differ; leave the one that is meant"
    c.refuse(bool(new) and any(dict(new).get(key) != value for key, value in dict(old).items()), spellings)
    values = dict(new) if new else {"rope_theta": c.get("rope_theta", 10000.0), **old}
    kind = values.get("rope_type", values.get("type", "default"))
    base = float(values.get("rope_theta", c.get("rope_theta", 10000.0)))
    part = values.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    c.refuse(part != 1.0, "RoPE over a part of each head is not covered")
    nested = any(isinstance(value, Mapping) for value in values.values())
    c.refuse(nested, "RoPE with other values for each kind of layer is not covered")
    if kind == "default":
        return {"rotary_base": base}
    c.refuse(kind != "llama3", f"RoPE of type {kind} is not covered; only default and llama3 are")
    if kind == "llama3":
        c.refuse("factor" not in values, "RoPE's factor is missing")
        for name, wanted in LLAMA3_FIXED.items():
            c.refuse(
                values.get(name) != wanted, f"RoPE's {name} is {values.get(name)}; megatron-core has {wanted} built in"
            )
    return {"rotary_base": base, "rope_scaling": values}
