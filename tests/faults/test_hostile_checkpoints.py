"""Files of a checkpoint that mean more memory, time or depth than their bytes are refused before they are believed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.convert.__main__ import main, run
from launcher.convert.metadata import parse_metadata
from launcher.errors import UserError

Checkpoints = Callable[..., Path]
METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
PICKLES = {
    "a memo index of 12 bytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a memo index in digits": b"\x80\x02Np4000000000\n.",
    "a long number": b"\x80\x04\x8b" + (1 << 20).to_bytes(4, "little") + b"\x11" * (1 << 20) + b".",
    "a number of 4,000 digits": b"I" + b"9" * 4000 + b"\n.",
    "a text that is not there": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a",
    "a frame that is not there": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"N.",
    "tuples within tuples": b"\x80\x04N" + b"\x85" * 500_000 + b".",
    "lists within lists": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a tuple by its memo": b"\x80\x04)" + b"\x94\x85" * 100_000 + b".",
    "a dict for a key": b"\x80\x04}N" + b"\x85" * 5000 + b"Ns.",
}


def capped(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in 3 GB of address space, so that what it believes does not take the machine along."""
    limit = 3 << 30
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_refused_before_its_numbers_are_believed(case: str, tmp_path: Path) -> None:
    """By the reader of the jobs and by that of `check`, in a process of its own: the C unpickler would end it."""
    (tmp_path / ".metadata").write_bytes(PICKLES[case])
    done = capped(
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from launcher.errors import UserError\n"
        "from launcher.models.torch_dist import read_held\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    read_held(Path(sys.argv[1]))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    told, taken = done.stdout.splitlines()
    assert f"{tmp_path / '.metadata'}: refused: " in told
    assert int(taken) < 200_000  # KiB
    with pytest.raises(UserError, match=r"\.metadata: refused: "):
        parse_metadata(PICKLES[case], ".metadata")


@pytest.mark.parametrize("fields", [b")\x81", b")\x81}b", b"0}"])
def test_a_record_without_fields_describes_no_checkpoint(fields: bytes, tmp_path: Path) -> None:
    body = b"\x80\x02" + METADATA + fields + b"."
    from launcher.models.torch_dist import read_held

    with pytest.raises(UserError, match="describes no checkpoint"):
        parse_metadata(body, ".metadata")
    (tmp_path / ".metadata").write_bytes(body)
    with pytest.raises(UserError, match="describes no checkpoint"):
        read_held(tmp_path)


@pytest.mark.parametrize("size", [[1 << 40, 4], []])
def test_a_tensor_of_layers_that_no_model_has_is_refused(
    size: list[int], tmp_path: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    run(hf_checkpoint("llama"), tmp_path / "src", "megatron")
    path = tmp_path / "src" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].size = torch.Size(size)
    for chunk in metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks:
        chunk.sizes = chunk.offsets = torch.Size([0] * len(size))
    path.write_bytes(pickle.dumps(metadata))
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--to", "hf"]) == 2
    assert "decoder.layers.mlp.linear_fc2.weight" in capsys.readouterr().err


def header(entries: dict[str, Any], data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


HEADERS = {
    "longer than the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "longer than any": (80 << 20).to_bytes(8, "little") + b"{" + b" " * ((80 << 20) - 1),
    "nested": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a shape of huge numbers": header({"a": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 0]}}),
    "a shape of many numbers": header({"a": {"dtype": "F32", "shape": [2] * 100_000, "data_offsets": [0, 0]}}),
    "negative places": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "places that overlap": header(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}, data=8
    ),
    "a gap": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, data=8),
    "another size": header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, data=8),
    "more behind it": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=8),
    "no numbers": header({"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, data=4),
    "no tensors": header({"a": 5}),
    "a list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused_by_one_line(
    case: str, tmp_path: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    (folder / "model.safetensors").write_bytes(HEADERS[case])
    assert main([str(folder), str(tmp_path / "dst"), "--to", "megatron"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: not a whole safetensors file" in line and len(line) < 500


def many_names(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    known, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    place = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    text = json.dumps(known | {f"more.{i}.weight": place for i in range(100_000)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def many_files(folder: Path) -> None:
    names = {f"t{i}": f"model-{i:06d}.safetensors" for i in range(100_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def many_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10_000}))


@pytest.mark.parametrize("change", [many_names, many_files, many_layers])
def test_a_hundred_thousand_problems_are_twenty_and_a_count(
    change: Callable[[Path], None], tmp_path: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    change(folder)
    assert main([str(folder), str(tmp_path / "dst"), "--to", "megatron"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1].endswith(" more")


CONFIGS = {
    "400 digits": '{"model_type": "llama", "hidden_size": %s}' % ("9" * 400),
    "5,000 digits": '{"model_type": "llama", "hidden_size": %s}' % ("9" * 5000),
    "no number": '{"model_type": "llama", "rms_norm_eps": NaN, "hidden_size": Infinity}',
    "nested": '{"a": ' + "[" * 100_000,
    "a list": "[1]",
    "nothing": "",
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("command", ["convert", "check", "fit"])
def test_a_config_is_refused_as_text(case: str, command: str, tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    (folder / "config.json").write_text(CONFIGS[case])
    done = by_command(command, folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "config.json" in done.stderr


@pytest.mark.parametrize("command", ["convert", "check", "fit"])
@pytest.mark.parametrize("kind", ["a pipe", "an endless device"])
def test_a_config_that_never_ends_is_not_read(
    kind: str, command: str, tmp_path: Path, hf_checkpoint: Checkpoints
) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json") if kind == "a pipe" else (folder / "config.json").symlink_to("/dev/zero")
    done = by_command(command, folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "config.json" in done.stderr


def by_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    recipe = folder.parent / "r.yaml"
    (folder.parent / "text.txt").write_text("words")
    recipe.write_text(
        "model: llama-tiny\nstages:\n"
        "  prepare: {kind: prepare, tokenizer: {path: src}, sources: {t: {kind: files, path: text.txt}}}\n"
        "  train: {kind: train, checkpoint: ./src, data: {prepare/t: 1.0}, train_iters: 2, lr: 1.0e-3}\n"
    )
    words = {
        "convert": ["convert", str(folder), str(folder.parent / "dst"), "--to", "megatron"],
        "check": ["check", str(recipe)],
        "fit": ["fit", str(folder), "--gpus", "8", "--gpu", "h100-80gb", "--seq-length", "64"],
    }[command]
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words], capture_output=True, text=True, timeout=120, check=False
    )
