"""The import budget: what a login node, and another Python inside a container, must not have to load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import launcher

HEAVY = {"torch", "numpy", "megatron", "transformers", "trl", "datasets", "safetensors", "matplotlib", "tokenizers"}
LOGIN = (
    "cli",
    "commands",
    "plan",
    "check",
    "render",
    "local",
    "state",
    "watch",
    "doctor",
    "recipe.schema",
    "report",
    "clean",
)
CONTRACT = ("spec", "configs", "progress", "store", "steps", "containers", "models.families", "models.layout")
SUPERVISOR = ("supervisor.main", "supervisor.classify", "run_record", "notify")


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that ran `code`."""
    program = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LOGIN)
def test_the_login_side_loads_no_heavy_library(module: str) -> None:
    assert not modules_after(f"import launcher.{module}") & HEAVY


def test_help_loads_neither_yaml_nor_rich() -> None:
    loaded = modules_after("from launcher.cli import build_parser; build_parser().format_help()")
    assert not loaded & {"yaml", "rich", "submitit", *HEAVY}


@pytest.mark.parametrize("module", [*CONTRACT, *SUPERVISOR])
def test_the_contract_uses_the_standard_library_only(module: str) -> None:
    bare = modules_after("pass")
    extra = modules_after(f"import launcher.{module}") - bare - set(sys.stdlib_module_names) - {"launcher"}
    assert not extra, f"launcher.{module} loads {extra}"


def test_every_module_of_the_package_is_importable_from_its_own_interpreter_side() -> None:
    """No module is dead weight that nobody can import: each compiles and sits in a package."""
    package = Path(__file__).resolve().parent.parent / "launcher"
    for path in package.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path}: its folder is no package"


def imported_by(path: Path, package: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, function bodies included, but for type checking."""
    module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.startswith("launcher")} - {module}


def graph() -> dict[str, set[str]]:
    """Module to the modules that it imports, by their files."""
    package = Path(launcher.__file__).parent
    files = {
        ".".join(p.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in package.rglob("*.py")
    }

    def file_of(name: str) -> str:  # `from launcher.store import seal` names the module launcher.store
        return name if name in files else name.rpartition(".")[0]

    return {module: {file_of(n) for n in imported_by(path, package)} - {module} for module, path in files.items()}


def test_no_module_imports_itself_by_way_of_others_not_even_inside_functions() -> None:
    try:
        tuple(graphlib.TopologicalSorter(graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"an import circle: {' -> '.join(error.args[1])}")


def test_mypy_looks_at_every_module_of_the_package() -> None:
    """None is excluded, passed over where it is imported, or let off an error; a class may derive from one unknown."""
    checked = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    own = [part for part in checked["overrides"] if any(name.startswith("launcher") for name in part["module"])]
    assert checked["strict"] and checked["files"] == ["launcher"] and "exclude" not in checked
    assert all(part.keys() == {"module", "disallow_subclassing_any"} for part in own)
