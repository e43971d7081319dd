"""The documentation says what is there: references made from the code, links that lead somewhere, commands that exist.

`python tests/test_docs.py` (part of `make golden`) writes the references anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.cli import build_parser
from launcher.cluster import Partition, Profile
from launcher.recipe.schema import markdown_table, recipe_reference
from launcher.spec import AllReduce, Limits, Preflight, Runtime

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])
CLUSTERS = CHECKOUT / "docs" / "clusters.md"
MARK = "## Keys\n"


def cluster_reference() -> str:
    """The keys of a profile, as docs/clusters.md ends with them."""
    lines = [MARK]
    for cls in (Profile, Partition, Runtime, Limits, Preflight, AllReduce):
        lines += [*([] if cls is Profile else [f"\n## {cls.__name__}\n"]), *markdown_table(cls)]
    return "\n".join(lines) + "\n"


def write_references() -> None:
    """Accept the references as the code makes them now."""
    (CHECKOUT / "docs" / "recipes.md").write_text(recipe_reference())
    CLUSTERS.write_text(CLUSTERS.read_text().partition(MARK)[0] + cluster_reference())


def test_references_are_those_of_the_code() -> None:
    assert (CHECKOUT / "docs" / "recipes.md").read_text() == recipe_reference(), "accept with: make golden"
    assert CLUSTERS.read_text().endswith(cluster_reference()), "accept with: make golden"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_that_are_named_exist() -> None:
    known = set(next(a.choices for a in build_parser()._actions if a.dest == "command"))
    named = {w for p in PAGES for w in re.findall(r"^(?:\.venv/bin/)?prism-launch ([a-z]+)", p.read_text(), re.M)}
    assert named and named <= known, named - known


if __name__ == "__main__":
    write_references()
