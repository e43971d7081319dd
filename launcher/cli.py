"""The command line: what each command takes, and the one place that prints errors and chooses the exit code.

Exit codes: 0 done, 1 the work failed, 2 the user's input is wrong, 130 interrupted. Imports little, so that `--help` is
quick on a login node; what a command does stands in `launcher.commands`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher import __version__
from launcher.errors import MOST_SHOWN, PrismError, UserError
from launcher.terminal import let_output_go, plain_output, raw_output

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


#: Characters of a problem: a value that is wrong may be of any length.
_LONGEST = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with plain_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with raw_output() if getattr(args, "raw", False) else contextlib.nullcontext():
            code = int(run_command(args) or 0)
        sys.stdout.flush()  # here, where a reader that has gone is no failure, and not when the interpreter ends
        return code
    except PrismError as error:
        problems = [_bounded(line) for line in (error.problems if isinstance(error, UserError) else (str(error),))]
        for line in problems[:MOST_SHOWN]:
            print(f"prism-launch: {line}" if len(problems) == 1 else line, file=sys.stderr)
        if len(problems) > 1:
            first = f", the first {MOST_SHOWN} shown" if len(problems) > MOST_SHOWN else ""
            print(f"prism-launch: {len(problems)} problems{first}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        let_output_go()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "" if _in_a_folder() else "the current folder is gone: "
        mend = "; free some room, then run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"prism-launch: {where}{error.strerror or error}{mend}", file=sys.stderr)
        return 1


def _bounded(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}... ({len(line):,} characters)"


def _in_a_folder() -> bool:
    """Whether the shell's folder still exists."""
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def run_command(args: argparse.Namespace) -> int | None:
    """Call the command's function, `launcher.commands.MODULE.NAME`."""
    module = importlib.import_module(f"launcher.commands.{args.module}")
    result: int | None = getattr(module, args.command.replace("-", "_"))(args)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="prism-launch",
        description="Mid-training and RL pipelines for Slurm clusters, from one YAML recipe.",
        epilog="Start with: prism-launch run demo --cluster local. "
        "Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"prism-launch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_recipe_commands(commands)
    _add_run_commands(commands)
    _add_checkpoint_commands(commands)
    _add_fit_command(commands)
    _add_listing_commands(commands)
    _add_cluster_commands(commands)
    _add_devcluster_commands(commands)
    return parser


def _command(commands: Commands, where: str, text: str, *groups: str) -> argparse.ArgumentParser:
    """The sub-command MODULE.NAME with the option groups that it shares with others."""
    module, _, name = where.partition(".")
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(module=module)
    if "recipe" in groups:
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change one value by its dotted path, such as seed=1 or midtrain.lr=1e-3; may be given again",
        )
        parser.add_argument("--name", help="name of the run; default: the recipe's name and what --set changed")
    if "cluster" in groups:
        parser.add_argument(
            "--cluster", metavar="NAME", default=None, help="cluster profile, by name or path; default: local"
        )
    if "run" in groups:
        parser.add_argument("run", metavar="RUN", nargs="?", help="name of the run; default: the latest")
    if "root" in groups:
        parser.add_argument("--root", metavar="DIR", help="the store; default: PRISM_ROOT, else ./prism-root")
    if "json" in groups:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_recipe_commands(commands: Commands) -> None:
    _command(
        commands,
        "recipes.check",
        "find every problem of a recipe: one line each, with file and line",
        "recipe",
        "cluster",
        "root",
        "json",
    )
    _command(commands, "recipes.plan", "show the stages and what is done already", "recipe", "cluster", "root", "json")
    render = _command(
        commands, "recipes.render", "write the sbatch scripts into a folder", "recipe", "cluster", "root", "json"
    )
    render.add_argument("-o", "--output", metavar="DIR", required=True, help="a new folder, or one rendered before")
    run = _command(
        commands, "runs.run", "run or submit what is not done, and follow it", "recipe", "cluster", "root", "json"
    )
    run.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    run.add_argument("--detach", action="store_true", help="do not follow")


def _add_run_commands(commands: Commands) -> None:
    _command(commands, "watching.status", "what each stage of a run is doing", "run", "root", "json")
    _command(commands, "watching.watch", "follow a run", "run", "root", "json")
    _add_logs_command(commands)
    clean = _command(commands, "watching.clean", "free what nothing needs any more", "root", "json")
    clean.add_argument("run", metavar="RUN", nargs="?", help="only what belongs to this run; default: the whole store")
    clean.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    clean.add_argument("--artifacts", action="store_true", help="also whole artifacts that no run names")
    clean.add_argument("--forget", action="store_true", help="remove the record of RUN itself, with its logs")
    _command(commands, "runs.cancel", "stop a run's stages; they save first", "run", "root", "json")
    resume = _command(commands, "runs.resume", "go on with a run, as it was planned", "run", "root", "json")
    resume.add_argument("--detach", action="store_true", help="do not follow")
    _command(commands, "runs.report", "write the report: one HTML page, JSON and CSV", "run", "root", "json")


def _add_logs_command(commands: Commands) -> None:
    logs = _command(commands, "watching.logs", "print a stage's log", "root")
    logs.add_argument(
        "names",
        metavar="[RUN] [STAGE]",
        nargs="*",
        help="one word: a stage of the latest run, else a run; default: the stage that failed or runs",
    )
    logs.add_argument("--run", metavar="RUN", help="name of the run; default: the latest")
    logs.add_argument("--component", metavar="NAME", help="a component of the stage, or `supervisor`")
    logs.add_argument("--rank", metavar="N", type=int, help="a process of the component; default: 0")
    logs.add_argument("--attempt", metavar="NAME", help="an attempt as `status` names it; default: the newest")
    logs.add_argument("-n", "--lines", type=_count, default=50, help="last lines to print; default: 50")
    logs.add_argument("--raw", action="store_true", help="leave control characters, such as colours, as they are")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, into the next attempts")


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _add_checkpoint_commands(commands: Commands) -> None:
    convert = _command(commands, "checkpoints.convert", "convert a checkpoint, verified", "json")
    convert.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint to read: a folder of Hugging Face's, of Megatron's torch_dist or of NeMo 1, or a .nemo file",
    )
    convert.add_argument("target", metavar="DST", help="folder to write; for --to nemo also a name that ends in .nemo")
    convert.add_argument("--to", required=True, choices=["hf", "megatron", "nemo"], help="format to write")
    convert.add_argument("--config", metavar="DIR", help="folder with config.json and tokenizer, if SRC has none")
    convert.add_argument("--parity", action="store_true", help="compare logits of both models; loads them whole")
    convert.add_argument("--no-verify", action="store_true", help="leave out the round trip")
    convert.add_argument(
        "--fold-multipliers", action="store_true", help="Granite to nemo: multipliers into fp32 weights, for inference"
    )
    convert.add_argument("--cluster", metavar="NAME", help="as a CPU job of this cluster, by name or path of a profile")
    convert.add_argument(
        "--root", metavar="DIR", help="with --cluster: the store; default: PRISM_ROOT, else ./prism-root"
    )
    merge = _command(commands, "checkpoints.merge", "add checkpoints of one model, each times a weight", "json")
    merge.add_argument("sources", metavar="CHECKPOINT", nargs="+", help="two or more, of one model and format")
    merge.add_argument(
        "--weights",
        required=True,
        metavar="W,W",
        help="one a checkpoint, such as 0.15,0.85; --weights=-0.5,1.5 where the first is negative",
    )
    merge.add_argument("-o", "--output", required=True, metavar="DST", help="folder to write")
    merge.add_argument("--no-verify", action="store_true", help="do not read back what was written")
    for name, text in (
        ("diff", "weight change between two Hugging Face checkpoints"),
        ("cka", "representation similarity of two checkpoints, by layer"),
    ):
        parser = _command(commands, f"checkpoints.{name}", text, "json")
        parser.add_argument("a", metavar="A", help="checkpoint before: a folder with config.json and safetensors")
        parser.add_argument("b", metavar="B", help="checkpoint after")
        if name == "cka":
            parser.add_argument("--texts", required=True, metavar="FILE", help="one text a line")


def _add_fit_command(commands: Commands) -> None:
    fit = _command(commands, "fit.fit", "the layouts of a model that fit on some GPUs, best first", "root", "json")
    fit.add_argument("model", metavar="MODEL", help="a model's name, a checkpoint's folder or its config.json")
    fit.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    fit.add_argument(
        "--gpu", default="h100-80gb", metavar="TYPE", help="such as a100-80gb, h200-141gb; default: h100-80gb"
    )
    fit.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="bounds tensor parallelism; default: 8")
    fit.add_argument("--gpu-memory-gib", type=float, metavar="GIB", help="where the type's own figure is wrong")
    fit.add_argument("--seq-length", type=int, default=8192, metavar="N", help="tokens in a sequence; default: 8192")
    fit.add_argument(
        "--global-batch-size", type=int, default=128, metavar="N", help="sequences in a step; default: 128"
    )
    fit.add_argument(
        "--tokens", type=float, default=27e9, metavar="N", help="to train on; default: 27e9, as PRISM has it"
    )
    fit.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of compute; default: bf16")
    fit.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="of the bf16 peak, before what the layout costs; default: that of runs in the store, else of public ones",
    )
    for size in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel", "micro-batch"):
        fit.add_argument(f"--{size}-size", type=int, metavar="N", help="this size alone; default: all that can work")


def _add_listing_commands(commands: Commands) -> None:
    _command(commands, "recipes.recipes", "list the shipped recipes", "json")
    _command(
        commands, "recipes.backends", "which model × algorithm × RL backend works, and why another does not", "json"
    )
    _command(commands, "recipes.schema", "print the recipe's JSON schema, for editors")
    _command(commands, "machine.doctor", "what this machine has and lacks", "root", "json")


def _add_cluster_commands(commands: Commands) -> None:
    parser = _command(commands, "machine.cluster", "cluster profiles: list, make one by looking, prove one")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "list the shipped profiles and your own"
    listing = actions.add_parser("list", help=text, description=text)
    listing.add_argument("--json", action="store_true", help="print JSON")
    text = "write a profile by looking at this site, on a login node"
    init = actions.add_parser("init", help=text, description=text)
    init.add_argument("name", metavar="NAME", nargs="?", help="how --cluster will call it; default: Slurm's own name")
    init.add_argument("-o", "--output", metavar="FILE", help="a .yaml file; default: among your own profiles")
    init.add_argument("--force", action="store_true", help="replace a file that is there")
    text = "submit a five-minute job of two nodes that shows whether a profile is true"
    test = actions.add_parser("test", help=text, description=text)
    test.add_argument("cluster", metavar="NAME", help="cluster profile, by name or path")
    test.add_argument("--partition", metavar="P", help="default: the profile's")
    test.add_argument("--nodes", type=_count, metavar="N", help="nodes; default: 2, or 1 where there is one")
    test.add_argument("--no-wait", action="store_true", help="submit alone; --job shows the result later")
    test.add_argument("--job", metavar="ID", help="show a test that was submitted before")
    test.add_argument("--root", metavar="DIR", help="the store; default: PRISM_ROOT, else ./prism-root")
    test.add_argument("--json", action="store_true", help="print JSON")


def _add_devcluster_commands(commands: Commands) -> None:
    parser = _command(commands, "machine.devcluster", "a real Slurm of several nodes on this machine, to try things on")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("up", "start it, or say that it runs; writes the cluster profile `dev`"),
        ("env", 'print what a shell needs: eval "$(prism-launch devcluster env)"'),
        ("status", "what runs of it"),
        ("down", "stop what `up` started"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--dir", metavar="DIR", help="its folder; default: ~/.local/state/prism-launch/devcluster")
        if name == "up":
            action.add_argument("--nodes", type=int, metavar="N", help="nodes; default: 4")
            action.add_argument("--gpus", type=int, metavar="N", help="fake GPUs of each node; default: 8")
        if name == "status":
            action.add_argument("--json", action="store_true", help="print JSON")


if __name__ == "__main__":
    sys.exit(main())
