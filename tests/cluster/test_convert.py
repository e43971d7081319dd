"""`prism-launch convert --cluster`: one job, and the target a link to what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from on_slurm import Prism, until

from launcher.devcluster.cluster import DevCluster


def test_a_conversion_as_a_job(
    devcluster: DevCluster, prism: Prism, tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    profile = str(devcluster.slurm_conf.parent.parent / "dev.yaml")
    source, target, root = hf_checkpoint("llama"), tmp_path / "megatron", tmp_path / "root"
    command = ["convert", str(source), str(target), "--to", "megatron", "--cluster", profile, "--root", str(root)]
    done = prism(*command, SLURM_CONF=str(devcluster.slurm_conf))
    assert done.returncode == 0, done.stderr
    assert f"{target}: will be {root}/artifacts/convert/" in done.stdout
    assert target.is_symlink()
    again = prism(*command)
    assert (again.returncode, again.stderr) == (2, f"prism-launch: {target}: is there already; name a new folder\n")
    until(target.exists, 240, "the job's end")
    receipt = json.loads((target.resolve().parent / "artifact.json").read_text())
    assert receipt["record"]["verification"]["round_trip"] == "bit-exact"
    back = prism("convert", str(target), str(tmp_path / "hf"), "--to", "hf")
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
