"""The grammar of a reference, by which a recipe names what a stage reads. Standard library only.

`STAGE` is what another stage makes, `STAGE/ITEM` one source or problem set of it. Where a checkpoint is read, a
reference may also name one outside the store: a path that begins with `/`, `./`, `../` or `~`, or `hf:ORG/NAME` on a
hub.
"""

from __future__ import annotations

import os
from pathlib import Path


def split_ref(ref: str) -> tuple[str, str | None]:
    """`STAGE/ITEM` as its two parts; the item is None where there is none."""
    stage, slash, item = ref.partition("/")
    return stage, item if slash else None


def port_of(ref: str, what: str) -> str:
    """The input port of `stage.json` that holds the item which `ref` names, `what` being tokens or prompts."""
    return f"{split_ref(ref)[0]}.{what}"


def item_of(ref: str) -> str:
    """The item of `STAGE/ITEM`; empty where there is none."""
    return split_ref(ref)[1] or ""


def is_on_hub(ref: str) -> bool:
    """Whether a reference names a repository on a hub."""
    return ref.startswith("hf:")


def is_external(ref: str) -> bool:
    """Whether a checkpoint reference names a path or a hub model and not a stage."""
    return is_on_hub(ref) or ref.startswith(("/", "./", "../", "~"))


def checkpoint_path(ref: str, relative_to: Path) -> Path:
    """The full path that a checkpoint reference names; `relative_to` is the recipe's folder."""
    return Path(os.path.abspath(relative_to / os.path.expanduser(ref)))
