"""RL backends, one module each; `launcher.rl.backend.Backend` is what a module says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args, get_type_hints

from launcher.configs import AnyRL, RLConfig
from launcher.errors import UserError
from launcher.models.families import FAMILIES
from launcher.rl import nemo_aligner, nemo_rl, trl
from launcher.rl.backend import Backend

#: Every algorithm and backend that a recipe may name.
ALGORITHMS: tuple[str, ...] = get_args(get_type_hints(RLConfig)["algorithm"])
BACKENDS: tuple[str, ...] = tuple(b for cls in get_args(AnyRL) for b in get_args(get_type_hints(cls)["backend"]))
_BUILT: Mapping[str, Backend] = {"trl": trl, "nemo-aligner": nemo_aligner, "nemo-rl": nemo_rl}


def backends() -> Mapping[str, Backend]:
    """The backends that can be planned, by name."""
    return _BUILT


def backend(name: str) -> Backend:
    """A backend's module. Raises UserError, naming those there are, for one that is not planned yet."""
    if name not in _BUILT:
        raise UserError(f"backend {name} is not built yet; there is {', '.join(_BUILT)}")
    return _BUILT[name]


def refusals(name: str, algorithm: str, family: str | None) -> Iterator[tuple[str, str]]:
    """Why a backend cannot train a family (None: not known) by an algorithm: (key, message with what can)."""
    module = backend(name)
    if algorithm not in module.ALGORITHMS:
        why = f": {module.ELSEWHERE[algorithm]}" if algorithm in module.ELSEWHERE else ""
        yield "algorithm", f"backend {name} runs {', '.join(module.ALGORITHMS)}, not {algorithm}{why}"
    if family is not None and family not in module.TRAINS:
        able = ", ".join(n for n, m in backends().items() if family in m.TRAINS) or "none"
        yield "backend", f"backend {name} cannot train {family}: {_why_not(module, family)}; backends that can: {able}"


def _why_not(module: Backend, family: str) -> str:
    return module.UNTRAINED.get(family, "it was not tried with it")


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
    if family not in module.TRAINS:
        return "no", _why_not(module, family)
    return ("rendered", f"to be built: {module.NOT_BUILT}") if module.NOT_BUILT else ("works", "")
