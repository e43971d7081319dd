"""RL backends, one module each: the checkpoint formats it accepts, what it cannot do, and the components it runs."""

from __future__ import annotations

from types import ModuleType

from launcher.errors import UserError


def backends() -> dict[str, ModuleType]:
    """The backends that are built, by name."""
    from launcher.rl import trl

    return {"trl": trl}


def backend(name: str) -> ModuleType:
    """A backend's module. Raises UserError, naming those that are built, for one that is not."""
    found = backends()
    if name not in found:
        raise UserError(f"backend {name} is not built yet; there is {', '.join(found)}")
    return found[name]
