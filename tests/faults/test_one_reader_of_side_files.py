"""One reader for `check` and for jobs, and one list of what a tokenizer is made of: all of it is carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_files import END, prepare, write_tokenizer
from worker_stages import WorkerStage, make_stage, write_model

from launcher import cli
from launcher.convert.__main__ import run
from launcher.errors import UserError
from launcher.models.checkpoints import obstacles
from launcher.models.side_files import copy_tokenizer, is_side_file, is_tokenizer_file, side_files
from launcher.workers.megatron import hf_files

#: What libraries save of a tokenizer, by the names that transformers and others have for it.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
    "qwen.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
OTHERS = (
    "model.safetensors", "model.safetensors.index.json", "tokenization_own.py", "tokenizer.py", "README.md",
    "additional_chat_templates/x.py", "deep/tokenizer.json", "additional_chat_templates/deep/x.jinja",
)  # fmt: skip
BOM = b"\xef\xbb\xbf"


def test_a_tokenizer_is_carried_along_whole(tmp_path: Path) -> None:
    for name in (*TOKENIZER, *OTHERS, "config.json", "generation_config.json"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    assert all(map(is_tokenizer_file, TOKENIZER)) and not any(map(is_side_file, OTHERS))
    assert set(side_files(tmp_path / "from")) == {*TOKENIZER, "config.json", "generation_config.json"}
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "vocab.json").write_text("there already")
    assert set(copy_tokenizer(tmp_path / "from", tmp_path / "to")) == set(TOKENIZER) - {"vocab.json"}
    assert (tmp_path / "to" / "vocab.json").read_text() == "there already"
    assert (tmp_path / "to" / TOKENIZER[-1]).read_text() == TOKENIZER[-1]


def older(folder: Path) -> Path:
    """A tokenizer as older tools save it, with further templates and byte order marks."""
    write_tokenizer(folder, eos_token=None)
    (folder / "special_tokens_map.json").write_bytes(BOM + json.dumps({"eos_token": {"content": END}}).encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(BOM + (folder / name).read_bytes())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_what_check_passes_the_stage_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older(tmp_path / "mine")
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "r.yaml").write_text(
        "stages: {prepare: {kind: prepare, tokenizer: {path: mine}, sources: {t: {kind: files, path: text.txt}}}}\n"
    )
    assert cli.main(["check", str(tmp_path / "r.yaml")]) == 0
    stage = prepare(tmp_path, tmp_path / "mine", tmp_path / "text.txt")
    made = stage.partial / "tokenizer"
    assert (made / "additional_chat_templates" / "tool.jinja").exists() and (made / "chat_template.jinja").exists()
    assert not (made / "tokenizer.json").read_bytes().startswith(BOM)
    assert hf_files.special_ids(made) == {"eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize("wrong", ["no end", "end unknown", "no tokenizer.json", "cut"])
def test_what_the_stage_refuses_check_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    from launcher.errors import UserError

    ends = {"no end": None, "end unknown": "<end>"}
    folder = write_tokenizer(tmp_path / "mine", eos_token=ends.get(wrong, END))
    if wrong == "no tokenizer.json":
        (folder / "tokenizer.json").unlink()
    if wrong == "cut":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-9])
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "r.yaml").write_text(
        "stages: {prepare: {kind: prepare, tokenizer: {path: mine}, sources: {t: {kind: files, path: text.txt}}}}\n"
    )
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, folder, tmp_path / "text.txt")
    assert cli.main(["check", str(tmp_path / "r.yaml")]) == 2
    assert f"r.yaml:1: stages.prepare.tokenizer.path: {caught.value.problems[0]}" in capsys.readouterr().err


# ------------------------------------------------------------------------------- generation_config.json and config.json


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("plain")
    small = {"hidden_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 1, "intermediate_size": 32}
    return write_model(folder / "model", write_tokenizer(folder / "tokenizer"), **small)


@pytest.fixture(scope="module")
def odd(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with settings for chat, dropout, a template and a tokenizer that adds and cuts."""
    import shutil

    from test_settings_in_loaded_files import TEMPLATE, TRUNCATION, bake_in

    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("odd") / "model"))
    bake_in(folder, truncation={**TRUNCATION, "max_length": 2}, post_processor=TEMPLATE)
    chat = {
        "do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.4, "repetition_penalty": 3.0, "max_length": 3,
        "min_new_tokens": 5, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 200)),
        "forced_bos_token_id": 7, "bad_words_ids": [[33], [34]], "eos_token_id": [1, 50, 60], "num_beams": 4,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(chat))
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_dropout": 0.5, "use_cache": False, "temperature": 0.3, "repetition_penalty": 2.0}
    config |= {"output_attentions": True, "return_dict": False}
    (folder / "config.json").write_bytes(BOM + json.dumps(config).encode())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


PROBLEMS = [
    {"id": str(i), "task": "gcd", "prompt": f"{i} and {i + 3} is\n", "answer": "1", "trace": "t", "entry": {}}
    for i in range(6)
]


def stage_of(root: Path, kind: str, config: dict, checkpoint: Path) -> WorkerStage:
    prompts = root / "prompts"
    prompts.mkdir(parents=True)
    (prompts / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    port = {"evaluate": "m", "rl": "checkpoint"}[kind]
    inputs = {port: (checkpoint, "hf"), "prepare.prompts": (prompts, "prompts")}
    return make_stage(root / "root", kind, config, inputs)


def test_evaluation_asks_the_stage_alone(plain: Path, odd: Path, tmp_path: Path) -> None:
    from launcher.workers import evaluate

    config = {"checkpoints": ["m"], "benchmarks": ["prepare/p"], "temperatures": [0.0, 1.0], "max_new_tokens": 12}
    found = []
    for name, folder in (("plain", plain), ("odd", odd)):
        stage = stage_of(tmp_path / name, "evaluate", config, folder)
        evaluate.main(stage.job())
        found.append(stage.file("scores", "samples.jsonl").read_text())
        set_aside = stage.record()["settings"]["set_aside"]["m"]
    assert found[0] == found[1]
    assert "generation_config.json: eos_token_id: [1, 50, 60]; completions end at 1" in set_aside
    assert {"generation_config.json: top_p: 0.4", "config.json: attention_dropout: 0.5"} <= set(set_aside)
    assert {"config.json: temperature: 0.3", "chat_template.jinja"} <= set(set_aside)


def test_rl_trains_as_the_stage_says_and_keeps_the_files(plain: Path, odd: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torch import equal

    from launcher.workers import rl_trl

    config = {"backend": "trl", "checkpoint": "m", "prompts": "prepare/p", "max_steps": 2, "prompts_per_step": 2}
    config |= {"num_generations": 2, "max_completion_length": 6, "lr": 0.01}
    made = {}
    for name, folder in (("plain", plain), ("odd", odd)):
        made[name] = stage_of(tmp_path / name, "rl", config, folder)
        rl_trl.main(made[name].job())
    rows = [(s.partial / "metrics.jsonl").read_text().splitlines() for s in made.values()]
    plain_rows, odd_rows = ([{**json.loads(line), "seconds": 0} for line in lines] for lines in rows)
    assert plain_rows == odd_rows
    ours, theirs = (load_file(s.partial / "checkpoint" / "model.safetensors") for s in made.values())
    assert all(equal(ours[name], theirs[name]) for name in ours)
    saved = made["odd"].partial / "checkpoint"
    generation = json.loads((saved / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_p"], generation["suppress_tokens"][0]) == (1, 0.4, 40)
    config_saved = json.loads((saved / "config.json").read_text())
    assert (config_saved["attention_dropout"], config_saved["use_cache"]) == (0.5, False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (odd / name).read_bytes()
    assert "tokenizer.json: truncation to 2 tokens" in made["odd"].record()["settings"]["set_aside"]


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_link_to_nothing_is_named_and_not_left_out(
    tmp_path: Path, hf_checkpoint: Callable[..., Path], name: str
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hf_checkpoint("llama"), folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/4d4d")
    assert obstacles(folder) == [
        f"{folder / name}: a link to ../blobs/4d4d, which is not there; get the file again, or remove the link"
    ]
    with pytest.raises(UserError, match="a link to ../blobs/4d4d"):
        run(folder, tmp_path / "made", "megatron")
