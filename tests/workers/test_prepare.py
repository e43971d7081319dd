"""prepare, end to end as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worker_stages import CHAIN_SUM, WorkerStage, demo_stage, make_stage, small_prepare

from launcher.configs import PrepareConfig
from launcher.errors import UserError
from launcher.progress import Stopped
from launcher.spec import decode
from launcher.workers import prepare
from launcher.workers.problems import normalised, read_problems
from launcher.workers.tokens import read_indexed


def contents(stage: WorkerStage) -> dict[str, bytes]:
    return {str(p.relative_to(stage.partial)): p.read_bytes() for p in stage.partial.rglob("*") if p.is_file()}


def config_with_files(folder: Path) -> dict:
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Text number {i}: " + "the quick brown fox. " * (i % 7 + 1))
    config = small_prepare()
    config["problems"]["rl"] = {"count": 20, "seed_offset": 2000, "exclude": ["held-out"]}
    # Two terms: 110 problems in all, so that sets which exclude nothing do meet.
    two_terms = {**CHAIN_SUM, "settings": {**CHAIN_SUM["settings"], "min_terms": 2, "max_terms": 2}}
    config["problems"] = {name: {**settings, **two_terms} for name, settings in config["problems"].items()}
    config["sources"]["early"] = {"kind": "files", "path": str(folder), "share": [0.0, 0.5]}
    config["sources"]["late"] = {"kind": "files", "path": str(folder), "share": [0.5, 1.0]}
    config["sources"]["library"] = {"kind": "python-stdlib", "max_bytes": 30000}
    return config


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WorkerStage]:
    """One config, prepared twice from one seed and once from another."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "text").mkdir()
    config = config_with_files(folder / "text")
    made = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        made[name] = make_stage(folder / name, "prepare", config, seed=seed)
        if name == "other":
            prepare.main(made[name].job())
            continue
        assert made[name].run() == (0, "")
        assert made[name].exit_class() == "finished"
    return made


def test_one_seed_gives_the_same_bytes_and_another_does_not(stages: dict[str, WorkerStage]) -> None:
    first, again, other = (contents(stages[name]) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    same = {name for name in first if first[name] == other[name]}
    assert same <= {"tokenizer/tokenizer_config.json"}


def decoded(stage: WorkerStage) -> dict[str, list[str]]:
    """Every token file's documents as text; the end token of each is checked and taken off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stage.partial / "tokenizer")
    found = {}
    for path in sorted((stage.partial / "tokens").glob("*.idx")):
        documents = read_indexed(path.with_suffix(""))
        assert all(d[-1] == tokenizer.eos_token_id for d in documents)
        found[path.stem] = [tokenizer.decode(d[:-1]) for d in documents]
    return found


def test_held_out_problems_are_in_no_other_set_and_in_no_token_file(stages: dict[str, WorkerStage]) -> None:
    for stage in stages.values():
        sets = {
            path.stem: {normalised(row["prompt"]) for row in read_problems(path)}
            for path in (stage.partial / "prompts").glob("*.jsonl")
        }
        assert {name: len(prompts) for name, prompts in sets.items()} == {"held-out": 12, "reasoning": 60, "rl": 20}
        assert not sets["held-out"] & (sets["reasoning"] | sets["rl"])
        texts = {name: normalised("\n".join(documents)) for name, documents in decoded(stage).items()}
        assert len(texts) == 4
        assert not [(name, p) for name, text in texts.items() for p in sets["held-out"] if p in text]
        # The same look does find what was trained on.
        assert all(p in texts["reasoning"] for p in sets["reasoning"])


def test_shares_are_disjoint_and_whole(stages: dict[str, WorkerStage], tmp_path: Path) -> None:
    texts = decoded(stages["first"])
    early, late = set(texts["early"]), set(texts["late"])
    assert (len(early), len(late), early & late) == (20, 20, set())
    terse = sum("<think>=" in d for d in texts["reasoning"])
    assert 15 < terse < 45  # half of 60, five standard deviations


def test_facts_are_those_of_the_files(stages: dict[str, WorkerStage]) -> None:
    import platform

    stage = stages["first"]
    record = stage.record()
    sources = {s["name"]: s for s in record["sources"]}
    assert sources.keys() == {"reasoning", "early", "late", "library"}
    for name, facts in sources.items():
        documents = read_indexed(stage.file("tokens", name))
        assert (facts["documents"], facts["tokens"]) == (len(documents), sum(map(len, documents)))
        assert json.loads(stage.file("tokens", f"{name}.json").read_text()) == facts
    assert sources["library"]["origin"]["interpreter"].endswith(platform.python_version())
    assert len(sources["library"]["origin"]["sha256"]) == 64
    assert sources["reasoning"]["origin"]["terse_share"] == 0.5
    assert record["problems"] == {"held-out": 12, "reasoning": 60, "rl": 20}
    assert record["tokenizer"] == {"vocab_size": 300, "trained": True}
    assert record["versions"]["python"] == platform.python_version()


def test_tokenizer_that_exists(stages: dict[str, WorkerStage], tmp_path: Path) -> None:
    trained = stages["first"].partial / "tokenizer"
    config = {**stages["first"].spec.config, "tokenizer": {"path": str(trained)}}
    stage = make_stage(tmp_path, "prepare", config, seed=3)
    prepare.main(stage.job())
    assert stage.file("tokenizer", "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    ours, theirs = stage.file("tokens", "reasoning.bin"), stages["first"].file("tokens", "reasoning.bin")
    assert ours.read_bytes() == theirs.read_bytes()
    assert stage.record()["tokenizer"] == {"vocab_size": 300, "trained": False}


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    root, tmp_path = tmp_path / "root", tmp_path / "text"
    tmp_path.mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text"}\n')
    config = small_prepare(tokenizer={"vocab_size": 100})
    config["problems"]["odd"] = {"task": "sudoku", "count": 1}
    config["problems"]["bad"] = {"count": 1, "settings": {"terms": 3}}
    config["problems"]["a"] = {**CHAIN_SUM, "count": 5, "exclude": ["b"]}
    config["problems"]["b"] = {**CHAIN_SUM, "count": 5, "exclude": ["a"]}
    config["sources"]["none"] = {"kind": "files", "path": str(tmp_path / "absent")}
    config["sources"]["files"] = {"kind": "files", "path": str(tmp_path)}
    stage = make_stage(root, "prepare", config)
    code, errors = stage.run()
    assert code == 2
    assert "Traceback" not in errors
    lines = errors.splitlines()
    assert {line.partition(": ")[0] for line in lines} == {
        "problems", "problems.odd.task", "problems.bad.settings", f"{tmp_path}/absent", f"{tmp_path}/empty.txt",
        f"{tmp_path}/rows.jsonl:2", "tokenizer.vocab_size",
    }  # fmt: skip
    assert len(lines) == 7
    assert "in a circle: a, b" in lines[0]
    assert stage.exit_class() == "user-error"


@pytest.mark.parametrize(
    ("tokenizer_config", "message"),
    [
        (None, "names no eos_token"),
        ("{", "tokenizer_config.json: not JSON"),
        ("{}", "names no eos_token"),
        ('{"eos_token": "<end>"}', "<end> is not in"),
    ],
)
def test_tokenizers_that_cannot_be_used(
    stages: dict[str, WorkerStage], tmp_path: Path, tokenizer_config: str | None, message: str
) -> None:
    trained = stages["first"].file("tokenizer", "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(trained.read_text())
    if tokenizer_config is not None:
        (tmp_path / "tokenizer_config.json").write_text(tokenizer_config)
    stage = make_stage(tmp_path / "root", "prepare", small_prepare(tokenizer={"path": str(tmp_path)}))
    with pytest.raises(UserError, match=message):
        prepare.main(stage.job())


def test_sets_that_cannot_be_filled_are_all_named(tmp_path: Path) -> None:
    few = {"task": "count_bits", "settings": {"min_n": 1, "max_n": 7}}
    config = small_prepare()
    config["problems"] |= {"few": {**few, "count": 8}, "fewer": {**few, "count": 9}}
    with pytest.raises(UserError) as caught:
        prepare.main(make_stage(tmp_path, "prepare", config).job())
    assert [p.partition(":")[0] for p in caught.value.problems] == ["problems.few.count", "problems.fewer.count"]


def test_stop_request_ends_it_unfinished(tmp_path: Path) -> None:
    job = make_stage(tmp_path, "prepare", small_prepare()).job()
    job._asked.append(0.0)
    with pytest.raises(Stopped):
        prepare.main(job)


def test_the_demos_stage_is_a_good_config() -> None:
    prepare.check(decode(PrepareConfig, demo_stage("prepare")))
