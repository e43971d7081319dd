"""The build of the train image ends with all that the trainer imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: What a stage may do without.
OPTIONAL = {"tokenizers", "wandb"}
#: What is built against the image's torch.
BUILT = ("transformer_engine", "mamba_ssm", "causal_conv1d")


def last_imports() -> list[str]:
    text = (CHECKOUT / "containers" / "train" / "Dockerfile").read_text().replace("\\\n", "")
    last = text.strip().splitlines()[-1]
    program = re.fullmatch(r'RUN python -c "(.*)"', last)
    assert program, last
    return [name.strip() for line in program[1].split(";") for name in line.strip().removeprefix("import ").split(",")]


def imported() -> Iterator[str]:
    for path in (CHECKOUT / "launcher" / "workers" / "megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            yield from (name.partition(".")[0] for name in names)


def test_every_package_of_the_trainer_is_imported_when_its_image_is_built() -> None:
    wanted = {name for name in imported() if name not in sys.stdlib_module_names} - {"launcher"} - OPTIONAL
    tried = {name.partition(".")[0] for name in last_imports()}
    assert wanted | set(BUILT) <= tried and "megatron.core.extensions.transformer_engine" in last_imports()


def test_the_names_are_those_of_the_versions_here() -> None:
    """A name that megatron-core or torch does not have would end a build of an hour."""
    here = [name for name in last_imports() if name.partition(".")[0] not in BUILT]
    program = "import importlib.util, sys; sys.exit(str([n for n in sys.argv[1:] if not importlib.util.find_spec(n)]))"
    done = subprocess.run([sys.executable, "-c", program, *here], capture_output=True, text=True)
    assert len(here) > 10 and done.stderr.strip().splitlines()[-1] == "[]"
