"""Which backend trains what: the table, and refusals that name what can."""

from __future__ import annotations

import pytest

from launcher.errors import UserError
from launcher.models.families import FAMILIES
from launcher.rl import ALGORITHMS, BACKENDS, backend, backends, matrix, refusals


def test_the_table_has_every_combination_once_and_says_why_not() -> None:
    rows = list(matrix())
    assert len({row[:3] for row in rows}) == len(rows) == len(BACKENDS) * len(ALGORITHMS) * len(FAMILIES)
    for name, algorithm, family, state, reason in rows:
        assert state in ("works", "rendered", "no")
        assert (state == "works") == (reason == ""), (name, algorithm, family)


def test_every_family_has_a_backend_that_works_and_hybrids_one_at_scale() -> None:
    states = {(b, f): s for b, _, f, s, _ in matrix() if s != "no"}
    assert all(states["trl", family] == "works" for family in FAMILIES)
    assert states["nemo-rl", "nemotron_h"] == "rendered" and ("nemo-aligner", "nemotron_h") not in states
    assert states["nemo-aligner", "llama"] == "rendered"


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_aligner_refuses_hybrids_and_names_who_can(family: str) -> None:
    ((key, message),) = refusals("nemo-aligner", "reinforce", family)
    assert key == "backend" and f"cannot train {family}" in message and "Mamba" in message
    able = [name for name, module in backends().items() if family in module.TRAINS]
    assert message.endswith(f"backends that can: {', '.join(able)}") and "trl" in able


def test_an_algorithm_of_another_backend_is_refused_with_the_nearest() -> None:
    ((key, message),) = refusals("nemo-aligner", "grpo", "llama")
    assert key == "algorithm" and "reinforce" in message and "no release" in message
    ((key, message),) = refusals("trl", "ppo", None)
    assert (key, message) == ("algorithm", "backend trl runs grpo, not ppo")


def test_all_reasons_at_once_and_none_where_the_family_is_not_known() -> None:
    assert [key for key, _ in refusals("nemo-aligner", "ppo", "nemotron_h")] == ["algorithm", "backend"]
    assert list(refusals("nemo-aligner", "reinforce", None)) == []


def test_a_backend_that_is_not_planned_is_named() -> None:
    with pytest.raises(UserError, match="open-instruct is not built yet; there is trl, nemo-aligner, nemo-rl"):
        backend("open-instruct")
