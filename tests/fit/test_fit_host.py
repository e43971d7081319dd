"""What a node needs beside its GPUs: memory of the host at a save, checked against `mem`, and the time of a save."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import REAL
from test_estimate import PARAMETERS, SITE, estimate, plan

from launcher.fit.host import node_bytes, stop_seconds
from launcher.fit.layers import architecture_of, rank_parameters
from launcher.fit.memory import Layout, memory_of
from launcher.fit.saving import saving_of
from launcher.models.families import shape_of
from launcher.units import memory_bytes
from tests.test_cli import prism

LLAMA, GRANITE = (architecture_of(shape_of(REAL[name])) for name in ("Llama-3.1-8B", "granite-3.3-8b-base"))


#: Llama 3.1 8B by hand: 12 bytes of each parameter; over two tensor-parallel ranks the norms are held twice.
NORMS = 4096 * (2 * 32 + 1)
SHARD = (PARAMETERS - NORMS) // 2 + NORMS


def test_a_node_holds_the_pinned_copies_of_its_ranks_shares() -> None:
    """128 ranks of TP 2: 64 share 12 bytes a parameter of the shard, 753 MB each: three pieces of 256 MiB, pinned."""
    layout = Layout(gpus=128, tp=2, global_batch_size=512)
    saving = saving_of(LLAMA, layout)
    assert saving.rank_bytes == 12 * SHARD / 64 and round(saving.rank_bytes / 1e6) == 753
    assert saving.total_bytes == 12 * PARAMETERS
    assert saving.host_bytes == 8 * 3 * 2**28 == 6 * 2**30
    assert node_bytes(LLAMA, layout, 8) == 8 * 3e9 + 6 * 2**30
    assert node_bytes(LLAMA, layout, 4) == node_bytes(LLAMA, layout, 8) / 2


@pytest.mark.parametrize(("gpus", "pinned"), [(64, 2**28 * 6), (256, 2**28 + 2**27), (512, 2**28), (1024, 2**27)])
def test_a_rank_s_share_shrinks_with_data_parallel_ranks(gpus: int, pinned: int) -> None:
    """1506, 376, 188 and 94 MB; the last piece is rounded up to a power of two."""
    assert saving_of(LLAMA, Layout(gpus=gpus, tp=2)).host_bytes == 8 * pinned


def test_the_node_of_the_largest_pipeline_stage_counts_and_what_is_not_trained_is_small() -> None:
    layout = Layout(gpus=32, pp=4, global_batch_size=512)
    last, middle = (rank_parameters(LLAMA, 1, 4, stage) for stage in (3, 1))
    assert saving_of(LLAMA, layout).rank_bytes == 12 * last / 8 > 12 * middle / 8
    fewer = node_bytes(LLAMA, layout, 8, trainable="attention")
    assert 8 * 3e9 < fewer < node_bytes(LLAMA, layout, 8)


def test_a_stop_waits_for_the_step_the_save_before_and_its_own() -> None:
    """On 16 nodes of 1 GB/s two saves of 96.4 GB and an index of 0.7 MB, each copied off the GPU in 75 ms before."""
    saving = saving_of(LLAMA, Layout(gpus=128, tp=2))
    assert stop_seconds(saving, 16, 5.0) == pytest.approx(5 + 2 * (0.0753 + 96.363 / 16), abs=0.01)
    assert stop_seconds(saving, 4, 5.0) == pytest.approx(5 + 2 * (0.0753 + 96.363 / 4), abs=0.01)


def test_mem_below_what_a_node_needs_is_refused_before_submission(tmp_path: Path) -> None:
    """32 ranks of TP 2: 3.01 GB each, eleven pieces of 256 MiB and one of 64."""
    needed = estimate(plan(tmp_path), "mid")["host_gib_per_node"]
    assert needed == pytest.approx((8 * 3e9 + 8 * (11 * 2**28 + 2**26)) / 2**30, abs=0.05)
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
    assert "a save at the time limit takes about 53.0 s where a node writes 1 GB/s, and gets 20 s" in warning
    step = estimate(told, "mid")["seconds"] / 1000
    assert estimate(told, "mid")["stop_seconds"] == pytest.approx(2 * 12 * PARAMETERS / 4e9 + step, rel=0.02)
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
