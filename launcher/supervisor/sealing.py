"""Before an attempt: its inputs are whole, its place is clear. After it: the artifact gets its receipt and its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher import store
from launcher.errors import UserError, WorldError
from launcher.progress import RECORD
from launcher.spec import StageSpec, encode
from launcher.store import Owner, Receipt
from launcher.supervisor.beats import RunningTime
from launcher.users import user_name

#: In an unfinished artifact: what its attempts have cost so far.
COST = "cost.json"


def check_secrets(spec: StageSpec) -> None:
    """Refuse to start without the secrets that the stage needs. Raises UserError with their names."""
    absent = [name for name in spec.secrets if not os.environ.get(name)]
    if absent:
        raise UserError(
            f"{', '.join(absent)} not set in the job: export it in the shell that submits; "
            "if it is, sbatch does not pass the environment on here (--export)"
        )


def check_inputs(root: Path, spec: StageSpec, stopped: Callable[[], bool] = lambda: False) -> None:
    """Refuse inputs that are gone or no longer whole. Raises UserError with all of them.

    What is not there is waited for, for as long as this file system may hide what another node has written.
    """
    clock = RunningTime()
    while _unseen(root, spec) and clock() < spec.limits.visibility_s and not stopped():
        time.sleep(0.5)
    problems = []
    for port, found in spec.inputs.items():
        path = root / found.path  # an absolute path stays itself
        if Path(found.path).is_absolute():
            problems += _outside_problems(port, path, found.fingerprint)
        else:
            problems += _artifact_problems(root, port, str(Path(found.path).parent))
    if problems:
        raise UserError(problems)


def _unseen(root: Path, spec: StageSpec) -> bool:
    """Whether an input of the store is not there, or not whole."""
    artifacts = {str(Path(i.path).parent) for i in spec.inputs.values() if not Path(i.path).is_absolute()}
    for artifact in artifacts:
        with contextlib.suppress(OSError):
            os.listdir((root / artifact).parent)  # opening a folder makes an NFS client ask anew what is in it
    return any(store.read_receipt(root, artifact) is None for artifact in artifacts)


#: Artifacts up to this many bytes are checked by content before they are used; larger ones by the files' sizes alone.
_CHECKED_BYTES = 256 << 20


def _outside_problems(port: str, path: Path, fingerprint: str) -> list[str]:
    if not path.exists():
        return [f"{path}: input {port} is gone"]
    if store.tree_fingerprint(path) != fingerprint:
        return [f"{path}: input {port} has changed since the run was planned; `prism-launch run` plans anew"]
    return []


def _artifact_problems(root: Path, port: str, artifact: str) -> list[str]:
    receipt = store.read_receipt(root, artifact)
    if receipt is None:
        return [f"{root / artifact}: input {port} is not whole; `prism-launch run` makes it anew"]
    if sum(size for size, _ in receipt.files.values()) > _CHECKED_BYTES:
        return []
    damaged = store.damaged_files(root, artifact, receipt)
    return [f"{root / artifact / name}: changed since it was made; remove {root / artifact}" for name in damaged[:1]]


def clear_outputs(root: Path, spec: StageSpec) -> None:
    """Remove what a cut-off attempt left in the ports or half-written; what it left under `progress/` stays."""
    for leftover in store.partial_dir(root, spec.artifact).glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    for output in spec.outputs.values():
        shutil.rmtree(store.working_path(root, spec.artifact, output.path), ignore_errors=True)


def add_cost(root: Path, spec: StageSpec, seconds: float, cpu_seconds: float, peak_memory_bytes: float) -> None:
    """Add an attempt to what the artifact has cost."""
    path = store.partial_dir(root, spec.artifact) / COST
    old = _read_cost(path)
    cost = {
        "seconds": old["seconds"] + seconds,
        "cpu_seconds": old["cpu_seconds"] + cpu_seconds,
        "peak_memory_bytes": int(max(old["peak_memory_bytes"], peak_memory_bytes)),
    }
    store.write_json(path, cost)


def _read_cost(path: Path) -> dict[str, Any]:
    """What attempts have cost; nothing where that is not written down, or damaged."""
    data = store.read_json(path)
    known = data if isinstance(data, dict) else {}
    found = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_bytes": 0}
    return {k: v if isinstance(v := known.get(k), (int, float)) and 0 <= v < 1e18 else z for k, z in found.items()}


def finish_interrupted(root: Path, spec: StageSpec) -> bool:
    """Give an artifact its name if its maker was killed between writing the receipt and doing that."""
    receipt = store.read_unsealed(root, spec.artifact)
    if receipt is None or receipt.fingerprint != spec.fingerprint:
        (store.partial_dir(root, spec.artifact) / store.RECEIPT).unlink(missing_ok=True)
        return False
    store.seal(root, spec.artifact, receipt)
    return True


def seal(root: Path, spec: StageSpec, owner: Owner, made_in: int) -> None:
    """Make the artifact whole; `made_in` counts the attempts it took.

    Raises WorldError where a worker that said it had finished left a port empty, or the claim is another's by now.
    """
    partial = store.partial_dir(root, spec.artifact)
    if store.claim_holder(store.claim_dir(root, spec.artifact)) != owner:
        raise WorldError(f"{partial}: another process has taken the claim meanwhile; nothing was sealed")
    for port, output in spec.outputs.items():
        folder = store.working_path(root, spec.artifact, output.path)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise WorldError(
                f"{folder}: port {port} is empty although the worker finished; this is a fault of its code"
            )
    record, cost = store.read_json(partial / RECORD), _read_cost(partial / COST)
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
        record=record if isinstance(record, dict) else {},
        created=time.time(),
        made_by=user_name(),
        made_on=owner.host,
        image=next((step.image for step in spec.steps if step.image), None),
        attempts=made_in,
        **cost,
    )
    store.sync_tree(partial)  # before the receipt: it must not outlive a power cut that its files do not
    store.write_json(partial / store.RECEIPT, encode(receipt))
    for name in (RECORD, COST):  # once their content stands in the receipt
        (partial / name).unlink(missing_ok=True)
    store.seal(root, spec.artifact, receipt)
