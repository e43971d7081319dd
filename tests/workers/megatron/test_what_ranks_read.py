"""Which rank reads what: text at the ends of a pipeline alone, whole indexes by rank 0 alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import train_stages as ts


@pytest.mark.parametrize("masking", [False, True])
def test_middle_stages_of_a_pipeline_read_no_text_and_indexes_are_checked_once(root: Path, masking: bool) -> None:
    kept = root / f"read-{masking}"
    kept.mkdir()
    options = {"train_iters": 3, "document_masking": masking, "validation": ["prepare/two"], "eval_interval": 3}
    one = ts.make_stage(root, f"read-by-one-{masking}", **options)
    assert ts.run(one) == [0], ts.log(one)
    three = ts.make_stage(
        root, f"read-by-three-{masking}", ranks=3, parallelism={"pipeline_model_parallel_size": 3}, **options
    )
    assert ts.run(three, partial(_count, kept)) == [0, 0, 0], ts.log(three)
    assert three.losses() == pytest.approx(one.losses(), rel=2e-6)
    validated = [s.metrics()[-1]["validation/prepare/two"] for s in (three, one)]
    assert validated[0] == pytest.approx(validated[1], rel=2e-6)
    if masking:
        assert [r["document_length"] for r in three.metrics()] == [r["document_length"] for r in one.metrics()]
    counts = [json.loads((kept / f"{rank}.json").read_text()) for rank in range(3)]
    assert [bool(c["batch"]) for c in counts] == [True, False, True]
    assert [c["count_tokens"] for c in counts] == [2, 0, 0]


def _count(folder: Path) -> None:
    import os

    from launcher.workers.megatron import data

    counts = {"batch": 0, "count_tokens": 0}

    def counted(function, name):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            counts[name] += 1
            path = folder / f"{os.environ['RANK']}.json"
            path.write_text(json.dumps(counts))
            return function(*args, **kwargs)

        return call

    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(counts))
    data.Blend.batch = counted(data.Blend.batch, "batch")  # type: ignore[method-assign]
    data.count_tokens = counted(data.count_tokens, "count_tokens")
