"""RL backends, one module each: the formats it reads and makes, what it cannot do, and the components it runs.

Every module has `ACCEPTS` and `MAKES` (checkpoint formats), `ALGORITHMS`, `ELSEWHERE` (why another algorithm is not
among them), `REFUSED` (families that it cannot train, with the reason), `COMPONENTS` (programs beside the main one,
which `resources.components` may size), `NOT_BUILT` (why this version only renders it; None: it runs),
`problems(config, resources)` and `components(config, resources)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import get_args, get_type_hints

from launcher.configs import RLConfig
from launcher.errors import UserError
from launcher.models.families import FAMILIES

_HINTS = get_type_hints(RLConfig)
#: Every algorithm and backend that a recipe may name.
ALGORITHMS: tuple[str, ...] = get_args(_HINTS["algorithm"])
BACKENDS: tuple[str, ...] = get_args(_HINTS["backend"])


def backends() -> dict[str, ModuleType]:
    """The backends that can be planned, by name."""
    from launcher.rl import nemo_aligner, nemo_rl, trl

    return {"trl": trl, "nemo-aligner": nemo_aligner, "nemo-rl": nemo_rl}


def backend(name: str) -> ModuleType:
    """A backend's module. Raises UserError, naming those there are, for one that is not planned yet."""
    found = backends()
    if name not in found:
        raise UserError(f"backend {name} is not built yet; there is {', '.join(found)}")
    return found[name]


def refusals(name: str, algorithm: str, family: str | None) -> Iterator[tuple[str, str]]:
    """Why a backend cannot train a family (None: not known) by an algorithm: (key, message with what can)."""
    module = backend(name)
    if algorithm not in module.ALGORITHMS:
        why = f": {module.ELSEWHERE[algorithm]}" if algorithm in module.ELSEWHERE else ""
        yield "algorithm", f"backend {name} runs {', '.join(module.ALGORITHMS)}, not {algorithm}{why}"
    if family in module.REFUSED:
        able = ", ".join(n for n, m in backends().items() if family not in m.REFUSED)
        yield "backend", f"backend {name} cannot train {family}: {module.REFUSED[family]}; backends that can: {able}"


def matrix() -> Iterator[tuple[str, str, str, str, str]]:
    """Every (backend, algorithm, family, state, reason); state is `works`, `rendered` or `no`."""
    for name in BACKENDS:
        for algorithm in ALGORITHMS:
            for family in FAMILIES:
                yield name, algorithm, family, *_state(name, algorithm, family)


def _state(name: str, algorithm: str, family: str) -> tuple[str, str]:
    if name not in backends():
        return "no", "not built yet"
    module = backend(name)
    if algorithm not in module.ALGORITHMS:
        return "no", module.ELSEWHERE.get(algorithm, f"it runs {', '.join(module.ALGORITHMS)}")
    if family in module.REFUSED:
        return "no", module.REFUSED[family]
    return ("rendered", f"to be built: {module.NOT_BUILT}") if module.NOT_BUILT else ("works", "")
