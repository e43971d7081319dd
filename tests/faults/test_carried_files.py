"""All that a tokenizer is made of travels with a checkpoint, and a config.json is read by one rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main as prism
from launcher.convert.__main__ import main, run

Checkpoints = Callable[..., Path]
FILES = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "tokenizer.model": "pieces",
    "vocab.bpe": "words",
    "special_tokens_map.json": "{}",
}


@pytest.mark.parametrize("to", ["megatron", "nemo"])
def test_side_files_travel_there_and_back(to: str, hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "modeling.py").write_text("code")
    record = run(folder, tmp_path / "made", to)
    assert set(FILES) <= set(record["files"]) and "modeling.py" not in record["files"]
    run(tmp_path / "made", tmp_path / "back", "hf")
    assert {name: (tmp_path / "back" / name).read_text() for name in FILES} == FILES
    assert main(["merge", *[str(folder)] * 2, "--weights", "0.5,0.5", "-o", str(tmp_path / "sum")]) == 0
    assert (tmp_path / "sum" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_a_byte_order_mark_is_read_by_all_and_not_carried_on(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert prism(["fit", str(folder), "--gpus", "8", "--gpu", "h100-80gb", "--seq-length", "64", "--json"]) in (0, 1)
    run(folder, tmp_path / "made", "megatron")
    assert (tmp_path / "made" / "hf" / "config.json").read_bytes() == content
    run(tmp_path / "made", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_bytes()) == json.loads(content)


def test_another_encoding_is_refused_by_all(
    hf_checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    (folder / "config.json").write_bytes((folder / "config.json").read_text().encode("utf-16"))
    assert prism(["fit", str(folder), "--gpus", "8", "--gpu", "h100-80gb", "--seq-length", "64"]) == 2
    assert main([str(folder), str(tmp_path / "made"), "--to", "megatron"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "config.json:1: not text in UTF-8: it is UTF-16" in first
