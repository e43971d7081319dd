"""A look at the nodes before the steps of a stage start: what each one says, and who must be left out."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.progress import PREFLIGHT_LEFT, PREFLIGHT_SEEN
from launcher.spec import Preflight
from launcher.supervisor.beats import RunningTime
from launcher.supervisor.classify import Outcome, outcome
from launcher.supervisor.processes import popen

#: A file that another node has written may take so long to appear here.
_APPEARS_S = 5.0
#: What starts in the stage's image gets this much longer: the first start on a node may fetch or unpack it.
_IMAGE_S = 600.0
#: Problems of one node that are told.
_MOST = 20
#: What srun says of a task that failed.
_COMPLAINT = re.compile(r"srun: error: ([^\s:]+): tasks? [\d,-]+: (.+)")


@dataclass(frozen=True)
class Findings:
    """What the nodes said: problems by node, and facts such as the bus bandwidth of the all-reduce."""

    nodes: tuple[str, ...]
    problems: Mapping[str, Sequence[str]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    common: str = ""
    seconds: float = 0.0
    argv: tuple[tuple[str, ...], ...] = ()


def judge(findings: Findings) -> Outcome | None:
    """How an attempt ends after a preflight; None where it may go on.

    The nodes that failed are left out. Where every one of several failed it is no single node's fault.
    """
    found = [f"{node}: {', '.join(problems)}" for node, problems in findings.problems.items() if problems]
    bad = tuple(node for node, problems in findings.problems.items() if problems)
    if len(bad) == len(findings.nodes) > 1:
        return outcome("preflight", f"every node failed: {'; '.join(found)}", "stop")
    if bad:
        return Outcome("preflight", "; ".join(found), "again", exclude=bad)
    return outcome("preflight", findings.common) if findings.common else None


def look(
    asked: Preflight,
    nodes: tuple[str, ...],
    commands: Sequence[tuple[str, tuple[str, ...]]],
    environment: Mapping[str, str],
    folder: Path,
    stopped: Callable[[], bool],
) -> Findings:
    """Run the preflight's commands (name, srun's argv) one after the other; each one's words go to NAME.log."""
    began = time.monotonic()
    (folder / PREFLIGHT_SEEN).write_text("", encoding="utf-8")
    findings = Findings(nodes, {})
    for name, argv in commands:
        limit_s = asked.deadline_s + (0.0 if name == "preflight" else _IMAGE_S)
        text, ended = _run(name, argv, environment, folder, limit_s, stopped)
        said, refusal = _said(text), _srun_line(text) if ended else ""
        silence = f"({refusal})" if refusal else f"in {limit_s:g} s"
        if name == "preflight":
            findings = Findings(nodes, dict(_node_problems(nodes, said, folder, silence)))
        elif name == "cuda":
            findings = Findings(nodes, {node: _answer(node, said, f"by CUDA {silence}") or [] for node in nodes})
        else:
            findings = _with_all_reduce(findings, asked, said, silence)
        if stopped() or any(findings.problems.values()):
            break
    run = tuple(argv for _, argv in commands)
    return replace(findings, seconds=time.monotonic() - began, argv=run)


def _run(
    name: str,
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    folder: Path,
    limit_s: float,
    stopped: Callable[[], bool],
) -> tuple[str, bool]:
    """What the command said, and whether it ended by itself."""
    path = folder / f"{name}.log"
    with path.open("ab") as log:
        process = popen(argv, environment, folder, log, log)
    clock = RunningTime()  # a job may be suspended meanwhile
    while process.poll() is None and clock() < limit_s and not stopped():
        time.sleep(0.05)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, 9)
        process.wait()
    return path.read_text(errors="replace", encoding="utf-8"), ended


def _srun_line(text: str) -> str:
    """The last thing that srun itself said: why it could not start, perhaps."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("srun: ") and not _COMPLAINT.match(line)]
    return lines[-1][:300] if lines else ""


def _said(text: str) -> list[dict[str, Any]]:
    """What the tasks said, a JSON object a line, and what srun said of those that failed; other lines are noise."""
    found = []
    for line in text.splitlines():
        complaint = _COMPLAINT.match(line)
        if complaint:
            found.append({"node": complaint[1], "problems": [f"the check could not run: {complaint[2]}"]})
        elif line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _node_problems(
    nodes: tuple[str, ...], said: list[dict[str, Any]], folder: Path, silence: str
) -> Iterator[tuple[str, list[str]]]:
    for node in nodes:
        yield node, _answer(node, said, silence) or _invisible(folder / PREFLIGHT_LEFT.format(node=node))


def _answer(node: str, said: list[dict[str, Any]], silence: str) -> list[str]:
    """The problems that a node told; its silence is one."""
    answers = [s for s in said if s.get("node") == node]
    if not answers:
        return [f"no answer {silence}"]
    return [str(p) for s in answers for p in s.get("problems", [])][:_MOST]


def _invisible(left: Path) -> list[str]:
    end = time.monotonic() + _APPEARS_S
    while not left.exists():
        if time.monotonic() > end:
            return [f"what it writes to {left.parent} is not seen from the first node"]
        time.sleep(0.1)
    left.unlink(missing_ok=True)
    return []


def _with_all_reduce(findings: Findings, asked: Preflight, said: list[dict[str, Any]], silence: str) -> Findings:
    assert asked.all_reduce is not None
    measured = next((s for s in said if "bus_gbs" in s), None)
    if measured is None:
        failed = sorted({s["node"] for s in said if "node" in s})
        ended = f"failed on {', '.join(failed)}" if failed else f"gave no answer {silence}"
        return Findings(findings.nodes, findings.problems, common=f"the all-reduce {ended}; see all-reduce.log")
    floor, got = asked.all_reduce.floor_gbs, float(measured["bus_gbs"])
    words = f"all-reduce ({measured['mode']}): {got:.3g} GB/s bus bandwidth, below the floor of {floor:g}"
    if got >= floor:
        return Findings(findings.nodes, findings.problems, measured)
    if len(findings.nodes) == 1:
        return Findings(findings.nodes, {findings.nodes[0]: [words]}, measured)
    return Findings(findings.nodes, findings.problems, measured, f"{words}, over {', '.join(findings.nodes)}")
