"""A planned stage as the text of its sbatch script: submitit's own text, with the steps to be read in it. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string  # private; pyproject.toml pins the version, golden files hold it

from launcher import store
from launcher.cluster import Profile, code_folder
from launcher.configs import Resources
from launcher.containers import LEAKS
from launcher.errors import UserError
from launcher.run_record import PlannedStage
from launcher.spec import StageSpec
from launcher.steps import (
    REFERENCE,
    SRUN_DEFAULTS,
    SlurmAttempt,
    preflight_argv,
    preflight_place,
    preflight_steps,
    slurm_place,
    srun_argv,
)
from launcher.units import parse_duration, slurm_duration

#: In an #SBATCH line a new line ends the directive and starts a command, and sbatch reads a backslash itself.
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\]")


def sbatch_text(stage: PlannedStage, profile: Profile, root: Path) -> str:
    """The script that runs one attempt after another of a stage placed on the profile's cluster (`place_stage`).

    It becomes the supervisor, which starts the steps. `root` is the store as the nodes see it. Raises UserError for
    values that neither sbatch nor the container runtime can quote.
    """
    spec = stage.spec
    folder = store.stage_dir(root, spec.run, spec.stage)
    further = {name.replace("_", "-"): value for name, value in profile.sbatch.items()}
    header = {**_resources(stage.resources, profile), "job_name": f"{spec.run}.{spec.stage}"}
    _refuse_unquotable({**header, **further, "output": str(folder)})
    interpreter = shlex.quote(profile.host_python or profile.python)
    text: str = _make_sbatch_string(
        # `exec`: Slurm signals the process of the batch script, which must be the supervisor and not bash.
        command=f"exec {interpreter} -u -m launcher.supervisor {shlex.quote(str(folder / 'stage.json'))}",
        folder=folder,
        **header,
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        setup=[*_setup(spec, profile, root), *_shown_steps(spec, stage.resources.nodes, profile, root)],
        additional_parameters={
            "signal": f"B:USR2@{profile.signal_lead_s}",
            "requeue" if spec.limits.continuation == "requeue" else "no-requeue": True,
            "kill-on-invalid-dep": "yes",
            **further,
        },
    )
    return text


def _resources(resources: Resources, profile: Profile) -> dict[str, Any]:
    """submitit's parameters for what a stage asks; None leaves an option out."""
    gpus = resources.gpus_per_node
    typed = f"{profile.gpu_type}:{gpus}" if profile.gpu_type else str(gpus)
    return {
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ntasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": typed if gpus and profile.gpu_request == "gpus_per_node" else None,
        "gres": f"gpu:{typed}" if gpus and profile.gpu_request == "gres" else None,
        "mem": resources.mem or profile.mem,
        "time": slurm_duration(parse_duration(profile.time_of(resources))),
        "partition": profile.partition_of(resources),
        "account": resources.account or profile.account,
        "qos": resources.qos or profile.qos,
        "constraint": profile.constraint,
        "exclusive": profile.exclusive or None,
    }


def _refuse_unquotable(values: dict[str, Any]) -> None:
    problems = [f"{k}: {v!r} cannot stand in an sbatch script" for k, v in values.items() if _REFUSED.search(str(v))]
    if REFERENCE.search(values["output"]):
        problems.append(f"output: {values['output']!r} looks like a variable of Slurm; choose another --root")
    if "%" in values["output"]:
        problems.append(
            f"output: {values['output']!r} holds a %, which sbatch replaces; choose another --root or --name"
        )
    if problems:
        raise UserError(problems)


# ------------------------------------------------------------------------------------------------------------- lines


def _setup(spec: StageSpec, profile: Profile, root: Path) -> Iterator[str]:
    """What the shell does before it becomes the supervisor."""
    leaks = (*LEAKS[profile.runtime.container], *profile.runtime.env_unset)
    yield "# Every step states its own counts; srun would take these for defaults."
    yield f"unset {' '.join(SRUN_DEFAULTS)}"
    if leaks:
        yield "# What a shell that submits might carry into the steps unseen."
        yield "unset " + " ".join(f"${{!{name[:-1]}@}}" if name.endswith("*") else name for name in leaks)
    yield from profile.setup
    code = code_folder(spec, profile, root)
    ours = {**({"PYTHONPATH": code} if code else {}), "PRISM_ROOT": str(root)}
    for name, value in {**profile.env, **ours}.items():
        yield f"export {name}={_quoted(value)}"
    # Python puts the working directory before PYTHONPATH: not one that might hold another `launcher`.
    yield f"cd -- {_quoted(str(store.stage_dir(root, spec.run, spec.stage)))} || exit 1"


def _quoted(value: str) -> str:
    if "\0" in value:
        raise UserError(f"{value!r} holds a NUL character, which no shell can take")
    return shlex.quote(value)


#: Its words differ from the references' where something is known late.
_EXAMPLE = SlurmAttempt("0", "0", "-")


def _shown_steps(spec: StageSpec, nodes: int, profile: Profile, root: Path) -> Iterator[str]:
    """Every step's srun command as comments: what the supervisor runs, with references for what it learns late."""
    place = slurm_place(spec, root, profile.python)
    example = slurm_place(spec, root, profile.python, _EXAMPLE)
    yield ""
    yield "# The supervisor starts on the first node and runs:"
    for step in preflight_steps(spec, nodes, profile.host_python or profile.python):
        there, sample = (preflight_place(p, a.node, a) for p, a in ((place, SlurmAttempt()), (example, _EXAMPLE)))
        yield from _shown_step(*(preflight_argv(step, p, spec.runtime) for p in (there, sample)))
    for step in spec.steps:
        yield from _shown_step(*(srun_argv(step, p, spec.runtime) for p in (place, example)))


def _shown_step(argv: tuple[str, ...], example: tuple[str, ...]) -> Iterator[str]:
    yield "#"
    yield from (f"# {line}" for line in readable(argv, set(argv) - set(example)))


def readable(argv: tuple[str, ...], late: Set[str]) -> list[str]:
    """A command as lines of shell, one option or variable a line; it could be pasted into the batch script.

    The references in the `late` words stay open; everything else is quoted.
    """
    lines: list[str] = []
    alone = True
    for word in argv:
        shown = _shown_late(word) if word in late else _shown(word)
        is_option = word.startswith("--") or "=" in word
        if alone or is_option:
            lines.append(shown)
        else:
            lines[-1] += f" {shown}"
        alone = is_option
    return [("    " if i else "") + line + (" \\" if i < len(lines) - 1 else "") for i, line in enumerate(lines)]


def _shown_late(word: str) -> str:
    parts = re.split(f"({REFERENCE.pattern})", word)  # text and references by turns
    return "".join(part if i % 2 else _shown(part) for i, part in enumerate(parts) if part)


def _shown(text: str) -> str:
    """Text quoted for bash on one line."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        return "$'" + "".join(_escaped(c) for c in text) + "'"
    name, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return f"{name}={shlex.quote(value) if value else ''}"
    return shlex.quote(text)


def _escaped(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    return char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in char.encode())
