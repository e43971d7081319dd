"""Planned stages as the text of their sbatch scripts: submitit's own text, with the steps to be read in it. Pure.

One script a stage; the parts of a stage that fans out share one, as elements of a job array.
"""

from __future__ import annotations

import itertools
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Private; pyproject.toml pins the version, golden files hold it.
from submitit.slurm.slurm import _as_sbatch_flag, _make_sbatch_string

from launcher import store
from launcher.cluster import Profile, code_folder, listed
from launcher.configs import Resources
from launcher.containers import RUNTIMES
from launcher.errors import UserError
from launcher.run_record import PlannedStage
from launcher.spec import StageSpec
from launcher.steps import (
    ARRAY_VARIABLES,
    ELEMENT,
    ELEMENT_STAGE,
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
#: Options of a profile's `sbatch:` that are lists of names.
_LISTS = ("clusters", "exclude", "licenses", "nodelist", "reservation")


@dataclass(frozen=True)
class Script:
    """One sbatch script: that of a stage, or of a job array whose element of index i is `stages[i]`."""

    name: str
    stages: tuple[PlannedStage, ...]
    is_array: bool = False

    def text(self, profile: Profile, root: Path) -> str:
        """The script for stages placed on the profile's cluster."""
        if self.is_array:
            return array_text(self.stages, profile, root)
        return sbatch_text(self.stages[0], profile, root)

    def folder(self, root: Path) -> Path:
        """Where the script and the logs of its jobs lie: the stage's folder, or that of the stage it is a part of."""
        stage = self.stages[0]
        return store.stage_dir(root, stage.spec.run, stage.part_of or stage.spec.stage)

    def indexes(self, stages: Iterable[PlannedStage]) -> list[int]:
        """The elements that stand for these stages. They stay the same when only some are submitted again."""
        wanted = {s.spec.stage for s in stages}
        return [i for i, s in enumerate(self.stages) if s.spec.stage in wanted]


def scripts_of(stages: Iterable[PlannedStage], profile: Profile) -> Iterator[Script]:
    """The scripts of a plan, in its order; an array has at most `max_array` elements.

    Stages that are continued by chains of jobs are not put into arrays.
    """
    names: dict[str, int] = {}
    for (part_of, _), group in itertools.groupby(stages, lambda s: (s.part_of, s.resources)):
        members = tuple(group)
        if part_of is None or members[0].spec.limits.continuation == "chain":
            yield from (Script(stage.spec.stage, (stage,)) for stage in members)
            continue
        for first in range(0, len(members), profile.max_array):
            number = names[part_of] = names.get(part_of, -1) + 1
            name = f"{part_of}.{number}" if number else part_of
            yield Script(name, members[first : first + profile.max_array], is_array=True)


def array_option(indexes: Sequence[int], profile: Profile) -> str:
    """The value of sbatch's --array: `0-3,7%2`."""
    runs: list[list[int]] = []
    for i in sorted(indexes):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{text}%{profile.max_array_running}" if profile.max_array_running else text


def array_text(stages: Sequence[PlannedStage], profile: Profile, root: Path) -> str:
    """The script of a job array, as `sbatch_text`; each element becomes the supervisor of one of the stages.

    They differ in their names and `stage.json` alone: what they ask and what they run is the same.
    """
    spec = stages[0].spec
    parent = stages[0].part_of or spec.stage
    above = store.stage_dir(root, spec.run, parent).parent
    folder = f'{shlex.quote(str(above))}/"{ELEMENT_STAGE}"'
    return _text(
        stages[0],
        profile,
        name=parent,
        folder=above / parent,
        lines=[
            "# The stage of each element.",
            "stages=(",
            *(f"    {shlex.quote(s.spec.stage)}" for s in stages),
            ")",
            "stage=${stages[${SLURM_ARRAY_TASK_ID:?submit this with --array}]:?there is no such element}",
            *_setup(spec, profile, root, folder),
            *_shown_steps(replace(stages[0], spec=replace(spec, stage=ELEMENT_STAGE)), profile, root, ELEMENT),
        ],
        stage_json=f"{folder}/stage.json",
        array=array_option(range(len(stages)), profile),
    )


def sbatch_text(stage: PlannedStage, profile: Profile, root: Path, module: str = "launcher.supervisor") -> str:
    """The script that runs one attempt after another of a stage placed on the profile's cluster (`place_stage`).

    It becomes the supervisor, or another `module` that takes the path of stage.json, which starts the steps. `root` is
    the store as the nodes see it. Raises UserError for values that neither sbatch nor the container runtime can quote.
    """
    spec = stage.spec
    folder = store.stage_dir(root, spec.run, spec.stage)
    return _text(
        stage,
        profile,
        name=spec.stage,
        folder=folder,
        lines=[
            "# What a job that submits this from within an array hands on.",
            f"unset {' '.join(ARRAY_VARIABLES)}",
            *_setup(spec, profile, root, _quoted(str(folder))),
            *_shown_steps(stage, profile, root, SlurmAttempt()),
        ],
        stage_json=shlex.quote(str(folder / "stage.json")),
        module=module,
    )


def _text(
    stage: PlannedStage,
    profile: Profile,
    *,
    name: str,
    folder: Path,
    lines: list[str],
    stage_json: str,
    array: str | None = None,
    module: str = "launcher.supervisor",
) -> str:
    """submitit's text with our lines before its command; `stage_json` stands in it as it is."""
    spec = stage.spec
    named = {name.replace("_", "-"): value for name, value in profile.sbatch.items()}
    further = {name: (name in _LISTS and listed(str(value))) or value for name, value in named.items()}
    main, *others = (_resources(part, profile) for part in stage.job_parts.values())
    header = {**main, "job_name": f"{spec.run}.{name}"}
    for values in (header, *others):
        _refuse_unquotable({**values, **further, "output": str(folder)})
    interpreter = shlex.quote(profile.host_python or profile.python)
    text: str = _make_sbatch_string(
        # `exec`: Slurm signals the process of the batch script, which must be the supervisor and not bash.
        command=f"exec {interpreter} -u -m {module} {stage_json}",
        folder=folder,
        **header,
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        map_count=1 if array else None,  # lets %A_%a name the logs; the elements are ours, below
        setup=[*(line for part in others for line in _job_part({**part, **further})), *lines],
        additional_parameters={
            "signal": f"B:USR2@{profile.signal_lead_s}",
            "requeue" if spec.limits.continuation == "requeue" else "no-requeue": True,
            "kill-on-invalid-dep": "yes",
            **({"array": array} if array else {}),
            **further,
        },
    )
    return text.replace("\n", "\n" + "".join(f"# {line}\n" for line in _obstacles(stage)), 1)


def _obstacles(stage: PlannedStage) -> Iterator[str]:
    """What a reader must know first of a script that cannot be run as it is."""
    if stage.obstacles:
        yield "Rendered to be read. This cannot be run as it is:"
        yield from (_shown(f"  {why}") if _REFUSED.search(why) else f"  {why}" for why in stage.obstacles)


def _job_part(values: dict[str, Any]) -> Iterator[str]:
    """The options of a further part of a heterogeneous job; sbatch reads on up to the first command."""
    yield "#SBATCH hetjob"
    for name, value in sorted(values.items()):
        if value is not None:
            yield _as_sbatch_flag(name, value)


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
        "partition": listed(profile.partition_of(resources)),
        "account": resources.account or profile.account,
        "qos": listed(resources.qos or profile.qos),
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


def _setup(spec: StageSpec, profile: Profile, root: Path, folder: str) -> Iterator[str]:
    """What the shell does before it becomes the supervisor; `folder`, the stage's, is quoted."""
    runtime = RUNTIMES[profile.runtime.container]
    leaks = (*runtime.leaks, *profile.runtime.env_unset)
    yield "# What options of sbatch and the shell that submits would make of every step; steps state their own."
    yield from (f"unset {names}" for names in textwrap.wrap(" ".join(SRUN_DEFAULTS), 114))
    if leaks:
        yield "# What a shell that submits might carry into the steps unseen."
        yield "unset " + " ".join(f'"${{!{name[:-1]}@}}"' if name.endswith("*") else name for name in leaks)
    if runtime.wants_user:
        yield 'export USER="${USER:-$(id -un)}"  # ch-run insists on it'
    yield from profile.setup
    code = code_folder(spec, profile, root)
    ours = {**({"PYTHONPATH": code} if code else {}), "PRISM_ROOT": str(root)}
    for name, value in {**profile.env, **ours}.items():
        yield f"export {name}={_quoted(value)}"
    if profile.share_group:
        yield "umask 007"
    # Python puts the working directory before PYTHONPATH: not one that might hold another `launcher`.
    yield f"cd -- {folder} || exit 1"


def _quoted(value: str) -> str:
    if "\0" in value:
        raise UserError(f"{value!r} holds a NUL character, which no shell can take")
    return shlex.quote(value)


def _shown_steps(stage: PlannedStage, profile: Profile, root: Path, attempt: SlurmAttempt) -> Iterator[str]:
    """Every step's srun command as comments: what the supervisor runs, with references for what it learns late."""
    spec, nodes = stage.spec, stage.job_parts[None].nodes
    place = slurm_place(spec, root, profile.python, attempt)
    shown = replace(spec, stage="-") if spec.stage == ELEMENT_STAGE else spec
    # Its words differ from the references' where something is known late.
    late = SlurmAttempt("0", "0", "-", hosts={step.name: "-" for step in spec.steps})
    example = slurm_place(shown, root, profile.python, late)
    yield ""
    yield "# The supervisor starts on the first node and runs:"
    for step in preflight_steps(spec, nodes, profile.host_python or profile.python):
        there, sample = (preflight_place(p, a.node, a) for p, a in ((place, attempt), (example, late)))
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
