"""The page: whole HTML, nothing from the network, nothing of the data taken for markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_run import end, make_run, on_gpus, plan_run

from launcher.report import collect
from launcher.report.page import render_page

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '<script>alert("x")</script>&\'"'


class Balance(HTMLParser):
    """Open tags, every tag, ids, and what is asked of other places."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.sources += [value or ""] if name in ("src", "href", "xlink:href", "action") else []
            assert not name.startswith("on"), f"{tag} has {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Balance:
    found = Balance()
    found.feed(page)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids)), "an id stands twice"
    assert all(s.startswith(("#", "data:image/png;base64,")) for s in found.sources), found.sources
    assert found.tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("root")
    return collect(root, make_run(root, plan_run()))


def test_the_page_stands_alone_and_shows_every_part(data: dict[str, Any]) -> None:
    page = render_page(data, [])
    found = parsed(page)
    assert "http" not in page and "@import" not in page and "url(" not in page
    for part in (
        "89.2 ± 1.4 %",
        "0 % (< 0.6 %)",
        "6400 (100.0\u00a0%)",
        "0.00621",
        "0.5307",
        "prepare/general-unseen",
        "megatron-core on a CPU with reference kernels",
        "trl (grpo) on a CPU",
        "megatron-core 0.16.1",
        "bit-exact",
        "tensors read 32, types float32",
        "CPython 3.11.2, SHA-256 222222222222",
        "node05",
        "What this does and does not show",
    ):
        assert part in found.text, part
    for t in ("0.1", "0.5", "1", "2", "5", "10"):
        assert f"> {t} %" in found.text


def test_names_from_the_data_are_text(data: dict[str, Any]) -> None:
    text = json.dumps(data)
    for name in ("held-out", "midtrain", "general", "attention", "problems", "node02", "local", "2.13.0"):
        text = text.replace(name, json.dumps(f"{name}{HOSTILE}")[1:-1])
    figures = [{"name": "f", "section": "results", "caption": HOSTILE, "svg": "<svg></svg>"}]
    page = render_page(json.loads(text), figures, f"no room {HOSTILE}")
    found = parsed(page)
    assert found.text.count(f"midtrain{HOSTILE}") > 20 and f"no room {HOSTILE}" in found.text


def test_what_is_missing_is_said_first(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run(), ["prepare", "base"])
    end(tmp_path, record, "midtrain", "diverged", "step 12: loss nan")
    found = parsed(render_page(collect(tmp_path, record), []))
    notice = found.text.index("Missing: midtrain (train) failed: step 12: loss nan")
    assert notice < found.text.index("2 of 9 stages are done")
    assert "Weight change" not in found.text and "Results" not in found.text


def test_links_lead_to_sections_that_are_there(data: dict[str, Any]) -> None:
    found = parsed(render_page(data, []))
    assert {s.removeprefix("#") for s in found.sources} <= set(found.ids) and len(found.sources) == 10


def test_work_taken_over_from_another_run_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, plan_run("first"))
    second = make_run(tmp_path, plan_run("second"), [])
    assert "done, made by run first" in parsed(render_page(collect(tmp_path, second), [])).text


def test_the_cost_is_told_in_what_the_run_held(tmp_path: Path, data: dict[str, Any]) -> None:
    page = parsed(render_page(data, []))
    assert "core-hours" in page.text and "GPU-hours" not in page.text and "killed by SIGKILL" in page.text
    assert "crashed, finished" in page.text and "5 × crashed, 9 × finished" in page.text
    record = make_run(tmp_path, on_gpus(plan_run()), ["prepare", "base"])
    page = parsed(render_page(collect(tmp_path, record), []))
    assert "GPU-hours" in page.text and "1.26" in page.text and "7.1\u00a0%" in page.text  # 16 × 283 s; 20 of 283


def test_a_run_that_made_nothing_itself_has_no_section_on_cost(tmp_path: Path) -> None:
    make_run(tmp_path, plan_run("first"))
    page = render_page(collect(tmp_path, make_run(tmp_path, plan_run("second"), [])), [])
    assert "What it cost" not in parsed(page).text
