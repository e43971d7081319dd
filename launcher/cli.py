"""The command line: what each command takes, and the one place that prints errors and chooses the exit code.

Exit codes: 0 done, 1 the work failed, 2 the user's input is wrong, 130 interrupted. Imports little, so that `--help` is
quick on a login node; what a command does stands in `launcher.commands`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher import __version__
from launcher.errors import PrismError, UserError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return int(run_command(args) or 0)
    except PrismError as error:
        problems = error.problems if isinstance(error, UserError) else (str(error),)
        for line in problems:
            print(f"prism-launch: {line}" if len(problems) == 1 else line, file=sys.stderr)
        if len(problems) > 1:
            print(f"prism-launch: {len(problems)} problems", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): that is no failure, and the interpreter must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        mend = "; free some room, then run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"prism-launch: {where}{error.strerror or error}{mend}", file=sys.stderr)
        return 1


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
    _add_listing_commands(commands)
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
    run = _command(commands, "runs.run", "run or submit what is not done, and follow it", "recipe", "cluster", "root")
    run.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    run.add_argument("--detach", action="store_true", help="do not follow")


def _add_run_commands(commands: Commands) -> None:
    _command(commands, "runs.status", "what each stage of a run is doing", "run", "root", "json")
    _command(commands, "runs.watch", "follow a run", "run", "root")
    logs = _command(commands, "runs.logs", "print a stage's log", "run", "root")
    logs.add_argument("--stage", metavar="STAGE", help="default: the one that failed or runs")
    logs.add_argument("--step", metavar="STEP", help="one component of the stage")
    logs.add_argument("-n", "--lines", type=_count, default=50, help="last lines to print; default: 50")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    _command(commands, "runs.cancel", "stop a run's stages; they save first", "run", "root", "json")
    resume = _command(commands, "runs.resume", "go on with a run, as it was planned", "run", "root")
    resume.add_argument("--detach", action="store_true", help="do not follow")
    _command(commands, "runs.report", "write the report: one HTML page, JSON and CSV", "run", "root", "json")


def _count(text: str) -> int:
    number = int(text)
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
    merge.add_argument("--weights", required=True, metavar="W,W", help="one a checkpoint, such as 0.15,0.85")
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


def _add_listing_commands(commands: Commands) -> None:
    _command(commands, "recipes.recipes", "list the shipped recipes", "json")
    _command(commands, "machine.clusters", "list the cluster profiles", "json")
    _command(commands, "recipes.schema", "print the recipe's JSON schema, for editors")
    _command(commands, "machine.doctor", "what this machine has and lacks", "root", "json")


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
