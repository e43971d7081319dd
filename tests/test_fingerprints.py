"""Fingerprints of the shipped recipes: what moves them is seen, and a new key with a default moves none.

Run as a program (`make golden`) it accepts today's as golden, unless a default changed and its kind's VERSION did not.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.configs import CONFIGS, Parallelism, TokenizerConfig, TrlRL, default_of, identity, option
from launcher.inputs import Inputs, resolve_inputs
from launcher.plan import build_plan
from launcher.recipe.load import load_recipes
from launcher.spec import encode
from launcher.stages import kinds

CHECKOUT = Path(__file__).resolve().parents[1]
GOLDEN = CHECKOUT / "tests" / "golden" / "fingerprints.json"
RECIPES = ("demo", "prism/granite-3.3-8b-long-context", "prism/llama-3.1-8b", "prism/nemotron-h-8b")


def planned(recipe: str) -> dict[str, str]:
    """Fingerprint by stage, the same on every machine: without facts of the interpreter."""
    (loaded,) = load_recipes(CHECKOUT / "recipes" / f"{recipe}.yaml")
    inputs = resolve_inputs(loaded)
    stages = build_plan(loaded, Inputs(inputs.checkpoints, {}, inputs.absent))
    return {s.spec.stage: s.spec.fingerprint for s in stages}


def parts_of(hint: Any) -> Iterator[type]:
    """The dataclasses that a type mentions."""
    if is_dataclass(hint):
        yield typing.cast(type, hint)
    for arg in typing.get_args(hint):
        yield from parts_of(arg)


def defaults(cls: type) -> dict[str, Any]:
    """Every default that can stand for a value in a fingerprint, by class and key."""
    found = {}
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if f.metadata.get("identity", True) and default_of(f) is not MISSING:
            found[f"{cls.__name__}.{f.name}"] = encode(default_of(f))
        for part in parts_of(hints[f.name]):
            found |= defaults(part)
    return found


def now() -> dict[str, Any]:
    return {
        "kinds": {
            kind: {
                "version": kinds()[kind].VERSION,
                "defaults": {key: value for cls in parts_of(hint) for key, value in defaults(cls).items()},
            }
            for kind, hint in CONFIGS.items()
        },
        "recipes": {name: planned(name) for name in RECIPES},
    }


def unversioned(golden: dict[str, Any], today: dict[str, Any]) -> list[str]:
    """Defaults that changed under the same VERSION: a finished artifact would pass for one of another meaning."""
    return [
        f"{kind}: {key} was {before}, is {today['kinds'][kind]['defaults'][key]}: raise VERSION in stages/{kind}.py"
        for kind, was in golden["kinds"].items()
        for key, before in was["defaults"].items()
        if today["kinds"][kind]["version"] == was["version"]
        and today["kinds"][kind]["defaults"].get(key, before) != before
    ]


def test_every_shipped_recipe_is_golden() -> None:
    there = {str(p.relative_to(CHECKOUT / "recipes").with_suffix("")) for p in (CHECKOUT / "recipes").rglob("*.yaml")}
    assert {n for n in there if not n.startswith(("mixtures/", "models/"))} == set(RECIPES)


def test_fingerprints_are_the_golden_ones() -> None:
    golden, today = json.loads(GOLDEN.read_text()), now()
    assert unversioned(golden, today) == []
    for name, stages in golden["recipes"].items():
        assert today["recipes"][name] == stages, f"{name}: finished artifacts would be made anew; if meant: make golden"
    assert today["kinds"] == golden["kinds"], "other keys or versions than before; if that is meant: make golden"


def test_a_changed_default_without_a_version_is_seen() -> None:
    golden = json.loads(GOLDEN.read_text())
    today = json.loads(json.dumps(golden))
    today["kinds"]["rl"]["defaults"]["TrlRL.beta"] = 0.1
    assert unversioned(golden, today) == ["rl: TrlRL.beta was 0.0, is 0.1: raise VERSION in stages/rl.py"]
    today["kinds"]["rl"]["version"] += 1
    assert unversioned(golden, today) == []


RL = {"backend": "trl", "checkpoint": "mid", "prompts": "prepare/rl", "max_steps": 3}


def test_a_new_key_at_its_default_moves_nothing() -> None:
    grown = make_dataclass(
        "Grown", [("critic_init", str | None, option(None, "."))], bases=(TrlRL,), frozen=True, kw_only=True
    )
    assert identity(grown(**RL)) == identity(TrlRL(**RL)) == RL
    assert identity(grown(**RL, critic_init="base")) == {**RL, "critic_init": "base"}


@pytest.mark.parametrize("key, value", [("beta", 0.05), ("num_generations", 16), ("num_iterations", 2), ("lr", 1e-5)])
def test_what_differs_from_its_default_counts(key: str, value: Any) -> None:
    assert identity(TrlRL(**RL, **{key: value})) == {**RL, key: encode(value)}


def test_parts_count_by_their_own_defaults() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Outer:
        tokenizer: TokenizerConfig = option(TokenizerConfig(vocab_size=300), ".")
        layout: Parallelism = option(Parallelism(), ".")

    assert identity(Outer()) == {}
    assert identity(Outer(tokenizer=TokenizerConfig())) == {"tokenizer": {}}
    assert identity(Outer(tokenizer=TokenizerConfig(vocab_size=400))) == {"tokenizer": {"vocab_size": 400}}


def accept() -> None:
    """Write the golden file anew."""
    today = now()
    wrong = unversioned(json.loads(GOLDEN.read_text()), today) if GOLDEN.exists() else []
    if wrong:
        sys.exit("\n".join(wrong))
    GOLDEN.write_text(json.dumps(today, indent=1, sort_keys=True) + "\n")
    print(f"{GOLDEN}: written; look at the difference before you commit it")


if __name__ == "__main__":
    accept()
