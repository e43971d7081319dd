"""Pipeline stages that free what they have sent on, as they do on GPUs, train as those that keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
import train_stages as ts

from launcher.workers.megatron import layers


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny"])
def test_stages_that_free_what_they_have_sent_train_the_same(tmp_path: Path, name: str) -> None:
    ts.write_tokens(ts.tokens_dir(tmp_path), {"one": 3000})
    ts.write_tokenizer(ts.tokenizer_dir(tmp_path))
    two = {"pipeline_model_parallel_size": 2}
    changes = {"num_hidden_layers": 4} if name == "llama-tiny" else {}
    losses = []
    for kind, fault in (("kept", None), ("freed", _free_outputs)):
        stage = ts.make_stage(
            tmp_path, f"{kind}-{name}", model=ts.model(name, **changes), train_iters=3, ranks=2, parallelism=two
        )
        assert ts.run(stage, fault) == [0, 0], ts.log(stage)
        losses.append(stage.losses())
    assert losses[0] == losses[1]


def _free_outputs() -> None:
    real = layers.fusions
    layers.fusions = lambda *args, **named: {**real(*args, **named), "deallocate_pipeline_outputs": True}
