"""What a node needs beside its GPUs: memory of the host at a save, checked against `mem`, and the time of a save."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import REAL
from test_estimate import PARAMETERS, SITE, estimate, plan

from launcher.fit.host import checkpoint_bytes, node_bytes, save_bytes, stop_seconds
from launcher.fit.layers import architecture_of
from launcher.fit.memory import Layout, memory_of, stage_memory
from launcher.models.families import shape_of
from launcher.units import memory_bytes
from tests.test_cli import prism

LLAMA, GRANITE = (architecture_of(shape_of(REAL[name])) for name in ("Llama-3.1-8B", "granite-3.3-8b-base"))


@pytest.mark.parametrize(
    ("parameters", "shards", "width", "wanted"),
    [
        (4e9, 64, 2, (14 / 64 + 2) * 4e9),
        (4e9, 1, 2, 16 * 4e9),
        (1e6, 4, 2, 5.5e6),
        (1e6, 4, 4, 7e6),  # fp32: 8 bytes of moments, 4 of weights
    ],
)
def test_a_rank_holds_its_share_of_the_states_and_nothing_that_is_gathered(
    parameters: float, shards: int, width: int, wanted: float
) -> None:
    assert save_bytes(parameters, shards, width) == pytest.approx(wanted)
    assert save_bytes(parameters, 10**9, width) < 12 * parameters, "what gathering the states took"


def test_more_ranks_on_a_node_need_more_and_more_shards_less() -> None:
    layouts = [Layout(gpus=gpus, tp=2, global_batch_size=512) for gpus in (8, 64, 128)]
    needs = [node_bytes(LLAMA, layout, 8) for layout in layouts]
    assert needs == sorted(needs, reverse=True)
    assert node_bytes(LLAMA, layouts[0], 4) == needs[0] / 2
    assert 385e9 > needs[-1] > 8 * (14 / 64 + 2) * 4.0e9, "385 GB a node were gathered of 8B"
    first, last = (stage_memory(LLAMA, replace(layouts[0], tp=1, pp=4), stage).parameters for stage in (0, 1))
    assert first > last, "the node of the largest pipeline stage counts"
    ends = node_bytes(LLAMA, replace(layouts[0], tp=1, pp=4), 1)
    assert ends >= save_bytes(first, 2)


def test_a_stop_waits_for_the_step_the_save_before_and_its_own() -> None:
    assert checkpoint_bytes(PARAMETERS) == 14 * PARAMETERS
    one, four = (stop_seconds(8e9, Layout(gpus=n, global_batch_size=512), 8, 5.0) for n in (8, 32))
    assert one == pytest.approx(5 + 2 * 112) and four == pytest.approx(5 + 2 * 28)


def test_mem_below_what_a_node_needs_is_refused_before_submission(tmp_path: Path) -> None:
    plan(tmp_path)
    needed = estimate(plan(tmp_path), "mid")["host_gib_per_node"]
    words = ("check", str(tmp_path / "r.yaml"), "--root", str(tmp_path / "root"))
    for mem, fits in ((f"{int(needed) - 1}G", False), (f"{int(needed) + 2}G", True), ("0", True)):
        (tmp_path / "site.yaml").write_text(SITE + f'mem: "{mem}"\n')
        done = prism(*words, "--cluster", str(tmp_path / "site.yaml"))
        said = done.stdout + done.stderr
        assert ("stages.mid.resources.mem" in said) is not fits, said
        assert done.returncode == (0 if fits else 2), said
        assert fits or f"{mem} a node, and its 8 processes need about {needed:.0f} GiB" in " ".join(said.split())


def test_a_save_that_outlasts_save_s_is_told_before_submission(tmp_path: Path) -> None:
    told = plan(tmp_path, site=SITE + "limits: {save_s: 20}\n")
    (warning,) = told["warnings"]
    assert warning.startswith("mid: a save at the time limit takes about 1 min") and "gets 20 s" in warning
    assert estimate(told, "mid")["stop_seconds"] == pytest.approx(2 * 14 * PARAMETERS / 4e9 + 4.2, abs=0.5)
    assert plan(tmp_path, site=SITE + "limits: {save_s: 300}\n")["warnings"] == []


@pytest.mark.parametrize(
    ("text", "found"), [("64G", 64 << 30), ("500", 500 << 20), ("1T", 1 << 40), ("3K", 3072), ("0", None), ("x", None)]
)
def test_mem_is_read_as_sbatch_reads_it(text: str, found: int | None) -> None:
    assert memory_bytes(text) == found


def test_scaled_and_padded_logits_are_copies() -> None:
    layout = Layout(gpus=8, tp=1, global_batch_size=64, recompute="full")
    plain = replace(GRANITE, logits_copies=0)
    assert GRANITE.logits_copies == 1, "Granite divides its logits"
    more = memory_of(GRANITE, layout).workspace - memory_of(plain, layout).workspace
    assert more == 2 * GRANITE.padded_vocab * layout.seq_length
    odd = architecture_of(shape_of({**REAL["Llama-3.1-8B"], "vocab_size": 128255}))
    assert odd.logits_copies == 1 and LLAMA.logits_copies == 0


def test_masked_documents_keep_the_keys_of_whole_sequences() -> None:
    layout = Layout(gpus=8, cp=4, global_batch_size=8, seq_length=131072)
    apart = memory_of(GRANITE, layout).activations
    together = memory_of(GRANITE, replace(layout, gathers_keys=True)).activations
    kept = 40 * 2 * 2 * GRANITE.groups * GRANITE.head_dim * (131072 - 131072 // 4)
    assert together - apart == pytest.approx(kept)


def test_fit_tells_of_the_host_and_of_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REAL["Llama-3.1-8B"]))
    told = json.loads(prism("fit", str(tmp_path), "--gpus", "32", "--json").stdout)
    assert all(layout["host_gib_per_node"] > 24 for layout in told["layouts"])
    assert "FP8" in told["not_counted"]
    assert "Not counted: FP8" in " ".join(prism("fit", str(tmp_path), "--gpus", "32").stdout.split())
