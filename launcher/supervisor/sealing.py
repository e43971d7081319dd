"""Before an attempt: its inputs are whole, its place is clear. After it: the artifact gets its receipt and its name."""

from __future__ import annotations

import getpass
import shutil
import time
from pathlib import Path
from typing import Any

from launcher import store
from launcher.errors import UserError, WorldError
from launcher.progress import RECORD
from launcher.spec import StageSpec, encode
from launcher.store import Owner, Receipt

#: In an unfinished artifact: what its attempts have cost so far.
COST = "cost.json"


def check_inputs(root: Path, spec: StageSpec) -> None:
    """Refuse inputs that are gone or no longer whole. Raises UserError with all of them."""
    problems = []
    for port, found in spec.inputs.items():
        path = root / found.path  # an absolute path stays itself
        if Path(found.path).is_absolute():
            if not path.exists():
                problems.append(f"{path}: input {port} is gone")
        elif store.read_receipt(root, str(Path(found.path).parent)) is None:
            problems.append(f"{path.parent}: input {port} is not whole; `prism-launch run` makes it anew")
    if problems:
        raise UserError(problems)


def clear_outputs(root: Path, spec: StageSpec) -> None:
    """Remove what a cut-off attempt left in the ports; what it left under `progress/` stays."""
    for output in spec.outputs.values():
        shutil.rmtree(store.working_path(root, spec.artifact, output.path), ignore_errors=True)


def add_cost(root: Path, spec: StageSpec, seconds: float, cpu_seconds: float, peak_memory_bytes: float) -> None:
    """Add an attempt to what the artifact has cost."""
    path = store.partial_dir(root, spec.artifact) / COST
    old: dict[str, Any] = store.read_json(path) or {}
    cost = {
        "seconds": old.get("seconds", 0.0) + seconds,
        "cpu_seconds": old.get("cpu_seconds", 0.0) + cpu_seconds,
        "peak_memory_bytes": int(max(old.get("peak_memory_bytes", 0), peak_memory_bytes)),
        "attempts": old.get("attempts", 0) + 1,
    }
    store.write_json(path, cost)


def finish_interrupted(root: Path, spec: StageSpec) -> bool:
    """Give an artifact its name if its maker was killed between writing the receipt and doing that."""
    receipt = store.read_unsealed(root, spec.artifact)
    if receipt is None or receipt.fingerprint != spec.fingerprint:
        (store.partial_dir(root, spec.artifact) / store.RECEIPT).unlink(missing_ok=True)
        return False
    store.seal(root, spec.artifact, receipt)
    return True


def seal(root: Path, spec: StageSpec, owner: Owner) -> None:
    """Make the artifact whole. Raises WorldError where a worker that said it had finished left a port empty."""
    partial = store.partial_dir(root, spec.artifact)
    for port, output in spec.outputs.items():
        folder = store.working_path(root, spec.artifact, output.path)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise WorldError(
                f"{folder}: port {port} is empty although the worker finished; this is a fault of its code"
            )
    record = store.read_json(partial / RECORD) or {}
    cost = store.read_json(partial / COST) or {}
    files = {name: facts for name, facts in store.list_files(partial).items() if name not in (RECORD, COST)}
    receipt = Receipt(
        kind=spec.kind,
        kind_version=spec.kind_version,
        stage=spec.stage,
        run=spec.run,
        fingerprint=spec.fingerprint,
        config=spec.config,
        seed=spec.seed,
        inputs=encode(spec.inputs),
        outputs=encode(spec.outputs),
        files=files,
        record=record,
        created=time.time(),
        made_by=_user(),
        made_on=owner.host,
        image=next((step.image for step in spec.steps if step.image), None),
        **cost,
    )
    store.sync_tree(partial)  # before the receipt: it must not outlive a power cut that its files do not
    store.write_json(partial / store.RECEIPT, encode(receipt))
    for name in (RECORD, COST):  # once their content stands in the receipt
        (partial / name).unlink(missing_ok=True)
    store.seal(root, spec.artifact, receipt)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that no passwd file knows
        return ""
