"""What cannot be converted is refused: the message names the file and the mend, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS

from launcher import store
from launcher.convert import target as written
from launcher.convert import torch_dist
from launcher.convert.__main__ import main, run
from launcher.convert.files import in_folder
from launcher.convert.folders import open_checkpoint
from launcher.convert.hf import INDEX
from launcher.convert.metadata import read_metadata
from launcher.convert.torch_dist import TorchDistReader
from launcher.errors import UserError, WorldError

Change = Callable[[Path], None]


@pytest.fixture
def hf(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> Path:
    return shutil.copytree(hf_checkpoint("llama"), tmp_path / "hf")


@pytest.fixture
def megatron_format(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> Path:
    run(hf_checkpoint("llama"), tmp_path / "megatron", "megatron")
    return tmp_path / "megatron"


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = next(p for p in (folder / "hf" / "config.json", folder / "config.json") if p.exists())
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors")

    return change


def cut(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))


def index_outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))


def lying_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"nobody.weight": "model.safetensors"}}))


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")


def lost_blob(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/1f")


def lost_shard(folder: Path) -> None:
    (folder / "a.safetensors").symlink_to("../blobs/1f")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "model.safetensors"}}))


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


NORM = "model.layers.1.input_layernorm.weight"
HF_REFUSALS: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, "hf: no such folder"),
    "no config": (remove("config.json"), "config.json: No such file or directory; put the model's config.json there"),
    "config is no JSON": (write("config.json", "{"), "config.json: not JSON"),
    "config is too deep": (write("config.json", "[" * 200_000), "config.json: not JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: not a config.json of a model"),
    "another model": (config(model_type="qwen3"), "config.json: model type qwen3 is not covered"),
    "unsupported RoPE": (config(rope_parameters={"rope_type": "yarn"}), "config.json: model type llama: RoPE of type"),
    "experts": (
        config(model_type="granitemoehybrid", num_local_experts=4, layer_types=["mamba"] * 2),
        "config.json: model type granitemoehybrid: 4 experts",
    ),
    "no weights": (remove("model.safetensors"), f"neither model.safetensors nor {INDEX} is there"),
    "only a pickle": (only_a_pickle, "pytorch_model.bin: a pickle"),
    "header cut short": (cut("model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
    "data cut short": (cut("model.safetensors", 100_000), "model.safetensors: not a whole safetensors file"),
    "empty file": (cut("model.safetensors", 0), "model.safetensors: not a whole safetensors file"),
    "text file": (write("model.safetensors", "version https://git-lfs"), "model.safetensors: not a whole safetensors"),
    "missing shard": (missing_shard, "model-00002.safetensors: not there, though"),
    "index outside": (index_outside, f"{INDEX}: names files outside the folder"),
    "index is no JSON": (write(INDEX, "<html>"), f"{INDEX}: not an index of safetensors files"),
    "index is too deep": (write(INDEX, "[" * 200_000), f"{INDEX}: not an index of safetensors files"),
    "too many layers": (config(num_hidden_layers=10**6), "num_layers is 1000000; at most 10000 are expected"),
    "RoPE scaling added to a newer config": (
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope_parameters and rope_scaling are both there and differ; leave the one that is meant",
    ),
    "lying index": (lying_index, "nobody.weight is not there, though"),
    "missing tensor": (tensors(lambda t: t.pop(NORM)), f"{NORM} [48] is missing"),
    "unknown tensor": (tensors(lambda t: t.update(more=torch.ones(3))), "more [3] float32 is no tensor of this model"),
    "wrong shape": (tensors(lambda t: t.update({NORM: torch.ones(47)})), f"{NORM} is [47], config.json makes it [48]"),
    "wrong vocabulary": (config(vocab_size=299), "model.embed_tokens.weight is [300, 48], config.json makes it [299"),
    "header too long": (huge_header, "model.safetensors: not a whole safetensors file"),
    "file is a link to nothing": (lost_blob, "model.safetensors: a link to ../blobs/1f, which is not there"),
    "shard is a link to nothing": (lost_shard, "a.safetensors: a link to ../blobs/1f, which is not there, though"),
    "in eight bits": (
        tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        f"{NORM} is of type F8_E4M3; only F64, F32, F16, BF16 are covered: use the checkpoint that is not quantised",
    ),
    "RoPE by kinds of layers": (
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
        "RoPE with other values for each kind of layer is not covered",
    ),
    "quantised": (tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM} is of type I8"),
    "mixed types in a row": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(48, 48).half()})),
        "differ in type",
    ),
    "mixed types of layers": (tensors(lambda t: t.update({NORM: t[NORM].half()})), "its layers are of types"),
}


def refused(source: Path, to: str, message: str) -> None:
    target = source.parent / "target" / "not" / "there"
    with pytest.raises(UserError) as error:
        run(source, target, to)
    assert message in str(error.value)
    assert str(source.parent) in str(error.value)  # where, not only what
    assert not list(source.parent.glob("target*"))


@pytest.mark.parametrize("case", HF_REFUSALS)
def test_a_hugging_face_folder_is_refused(case: str, hf: Path) -> None:
    change, message = HF_REFUSALS[case]
    change(hf)
    refused(hf, "megatron", message)


def test_the_folder_of_one_iteration_is_refused_with_the_one_that_is_meant(megatron_format: Path) -> None:
    refused(megatron_format / "release", "hf", "an iteration of a checkpoint of format megatron; name the folder with")


@pytest.mark.parametrize("name", ["hf/model.safetensors", "a.nemo"])
def test_a_file_that_may_not_be_read_is_named(name: str, hf: Path, tmp_path: Path) -> None:
    run(hf, tmp_path / "a.nemo", "nemo")
    (tmp_path / name).chmod(0)
    source, to = (tmp_path / "a.nemo", "hf") if name == "a.nemo" else (hf, "megatron")
    # no right of root's to pass over permissions
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-m", "launcher.convert", str(source), str(tmp_path / "out"), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"{tmp_path / name}: Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_all_problems_are_named_at_once(hf: Path) -> None:
    tensors(lambda t: (t.pop(NORM), t.update(more=torch.ones(3)), t.update({"model.norm.weight": torch.ones(3)})))(hf)
    with pytest.raises(UserError) as error:
        run(hf, hf.parent / "target", "megatron")
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_kept_and_warned_of(
    value: float, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors(lambda t: t[NORM].__setitem__(7, value))(hf)
    assert main([str(hf), str(hf.parent / "target"), "--to", "megatron"]) == 0
    assert capsys.readouterr().err == f"prism-launch: warning: {NORM} holds nan or infinity, which is kept\n"
    record = json.loads((hf.parent / "target" / "conversion.json").read_text())
    assert record["not_finite"] == [NORM]
    assert record["round_trip"] == "bit-exact"


def test_a_snapshot_of_hugging_faces_cache_is_read_through_its_links(hf: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(hf.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "original").symlink_to(snapshot)  # a loop of links is no reason to go round
    record = run(snapshot, tmp_path / "megatron", "megatron")
    assert record["files"] == sorted(p.name for p in hf.iterdir() if p.suffix != ".safetensors")
    assert not any(p.is_symlink() for p in (tmp_path / "megatron").rglob("*"))
    (tmp_path / "megatron" / "hf").rename(tmp_path / "carried")
    (tmp_path / "megatron" / "hf").symlink_to("../carried")
    run(tmp_path / "megatron", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["written to", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    change: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, true = hf / "model.safetensors", torch_dist.TorchDistWriter.close

    def close(self: Any) -> None:
        if change == "written to":
            with path.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
        elif change == "replaced":
            shutil.copy2(path, hf / "new")
            os.replace(hf / "new", path)
        else:
            path.unlink()
        true(self)

    monkeypatch.setattr(torch_dist.TorchDistWriter, "close", close)
    with pytest.raises(WorldError, match=r"model\.safetensors: changed while it was read; convert again once nothing"):
        run(hf, tmp_path / "target", "megatron")
    assert not list(tmp_path.glob("target*"))


def test_a_pickle_beside_safetensors_is_left_alone(hf: Path) -> None:
    (hf / "pytorch_model.bin").write_bytes(b"\x80never loaded")
    run(hf, hf.parent / "target", "megatron")
    assert not list((hf.parent / "target").rglob("*.bin"))


# ----------------------------------------------------------------------------------------------------------- megatron


class Evil:
    """Unpickled by pickle.load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def described(edit: Callable[[Any], Any]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "release" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        edit(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return change


def move_file(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../../../etc/passwd"


def backwards(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -7


def lose_a_field(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).__dict__.pop("size")


def lose_a_piece(metadata: Any) -> None:
    metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == "decoder.layers.mlp.linear_fc2.weight"))


def swap_pieces(metadata: Any) -> None:
    a, b = (i for i in metadata.storage_data if i.fqn in ("embedding.word_embeddings.weight", NORM_KEY))
    places = metadata.storage_data
    places[a], places[b] = places[b], places[a]


def damage(folder: Path) -> None:
    path = folder / "release" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


NORM_KEY = "decoder.final_layernorm.weight"
DATA = "release/__0_0.distcp"
MEGATRON_REFUSALS: dict[str, tuple[Change, str]] = {
    "no tracker": (
        remove("latest_checkpointed_iteration.txt"),
        "megatron: no checkpoint: neither config.json (hf), latest_checkpointed",
    ),
    "empty tracker": (write("latest_checkpointed_iteration.txt", "x"), "neither an iteration nor `release`"),
    "no such iteration": (write("latest_checkpointed_iteration.txt", "7"), "iter_0000007: named by"),
    "no config": (
        remove("hf/config.json"),
        "megatron: no hf/config.json in it; put the model's there, or name a folder that has it with --config",
    ),
    "another vocabulary": (config(vocab_size=512), "embedding.word_embeddings.weight is [384, 48], config.json makes"),
    "more layers": (config(num_hidden_layers=3), "decoder.layers.2.mlp.linear_fc1.weight [128, 48] is missing"),
    "fewer layers": (config(num_hidden_layers=1), "decoder.layers.1.mlp.linear_fc1.weight [128, 48] float32 is no"),
    "tied, yet two": (
        config(tie_word_embeddings=True),
        "output_layer.weight differs from embedding.word_embeddings.weight, to which config.json ties it",
    ),
    "data cut short": (cut(DATA, 1000), "__0_0.distcp: 1000 bytes"),
    "data gone": (remove(DATA), "__0_0.distcp: not there, though .metadata names it"),
    "data damaged": (damage, "__0_0.distcp: the piece of"),
    "metadata cut short": (cut("release/.metadata", 60), ".metadata: refused"),
    "metadata is another pickle": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(pickle.dumps([1])) and None,
        ".metadata: describes no checkpoint",
    ),
    "a file outside": (described(move_file), ".metadata: names a file outside its folder"),
    "a place before the file": (described(backwards), ".metadata: describes no checkpoint"),
    "a field is lost": (described(lose_a_field), ".metadata: describes no checkpoint"),
    "tracker of other bytes": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").write_bytes(b"re\xffease") and None,
        "neither an iteration nor `release`",
    ),
    "tracker without end": (write("latest_checkpointed_iteration.txt", "9" * 5000), "neither an iteration nor"),
    "a piece is lost": (described(lose_a_piece), "decoder.layers.mlp.linear_fc2.weight has 3072 of its 6144 elements"),
    "pieces swapped": (described(swap_pieces), "holds another tensor than .metadata says"),
}


@pytest.mark.parametrize("case", MEGATRON_REFUSALS)
def test_a_megatron_folder_is_refused(case: str, megatron_format: Path) -> None:
    change, message = MEGATRON_REFUSALS[case]
    change(megatron_format)
    refused(megatron_format, "hf", message)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_wrong_bit_in_a_piece_is_told_or_read(megatron_format: Path) -> None:
    reader = TorchDistReader(megatron_format / "release", in_folder(megatron_format / "release"))
    place = reader._pieces[NORM_KEY][0].info
    path = megatron_format / "release" / place.relative_path
    whole = path.read_bytes()
    told = 0
    for position in range(place.offset, place.offset + 300):  # torch's own pickle lies there
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            reader.read(NORM_KEY)
        except UserError as error:
            assert f"{path}: the piece of {NORM_KEY} at byte {place.offset}" in str(error)
            told += 1
    assert told > 50


def test_a_malicious_metadata_is_refused_before_it_runs(megatron_format: Path, tmp_path: Path) -> None:
    path, proof = megatron_format / "release" / ".metadata", tmp_path / "ran"
    described(lambda m: setattr(m, "planner_data", Evil(proof)))(megatron_format)
    refused(megatron_format, "hf", f"{path}: refused: it names posix.mkdir")
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()  # so the file was no harmless one


@pytest.mark.parametrize("place", ["common.pt", "a tensor's piece", "an object's piece"])
def test_malicious_pickles_beside_the_metadata_never_run(
    place: str, megatron_format: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, proof = megatron_format / "release", tmp_path / "ran"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if place == "common.pt":
        torch.save({"args": Evil(proof)}, folder / "common.pt")
    else:
        wanted = NORM_KEY if "tensor" in place else "decoder.final_layernorm._extra_state/shard_0_1"
        index = next(i for i in metadata.storage_data if i.fqn == wanted)
        with (folder / "evil.distcp").open("wb") as file:
            torch.save(Evil(proof), file)
            info = type(metadata.storage_data[index])("evil.distcp", 0, file.tell())
        metadata.storage_data[index] = info
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    code = main([str(megatron_format), str(tmp_path / "target"), "--to", "hf"])
    if place == "a tensor's piece":
        assert code == 2
        said = capsys.readouterr().err
        assert "evil.distcp: the piece of decoder.final_layernorm.weight at byte 0 is no tensor alone, or is" in said
    else:
        assert code == 0  # neither is read: there are no weights in it
    assert not proof.exists()


@pytest.mark.usefixtures("megatron")
def test_arguments_of_another_program_are_no_way_in_for_the_trainer(megatron_format: Path, tmp_path: Path) -> None:
    from launcher.models.families import shape_of
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.model import build_model

    torch.save({"args": Evil(tmp_path / "ran")}, megatron_format / "release" / "common.pt")
    model = build_model(shape_of(CONFIGS["llama"]))
    with pytest.raises(
        UserError, match=r"common\.pt: refused: it names posix\.mkdir; convert the checkpoint to hf and"
    ):
        checkpoint.load_weights(megatron_format, model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\nos.system\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n.",
        b"\x80\x04\x8c\x0etorch._storage_x\x8c\x01x\x93.",
        b"P1\n.",
        b"",
        b"\x00\x01 no pickle at all",
    ],
)
def test_a_pickle_with_anything_else_in_it_is_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(body)
    with pytest.raises(UserError, match="refused"):
        read_metadata(path)


# ------------------------------------------------------------------------------------------------------------- target


def test_a_checkpoint_that_has_the_format_already_is_refused(hf: Path, megatron_format: Path) -> None:
    refused(hf, "hf", "hf: is in format hf already")
    refused(megatron_format, "megatron", "megatron: is in format megatron already")


def test_a_target_with_content_is_refused_and_kept(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"mine: is there already; name a new folder"):
        run(hf, target, "megatron")
    assert [p.name for p in target.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        run(hf, tmp_path / "file", "megatron")


def test_an_empty_target_is_filled(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(hf, tmp_path / "empty", "megatron")
    assert (tmp_path / "empty" / "release" / ".metadata").is_file()


def test_a_second_conversion_into_the_same_target_is_refused(hf: Path, tmp_path: Path) -> None:
    living = subprocess.Popen(["sleep", "60"])
    try:
        owner = store.this_process(living.pid)
        assert store.claim(tmp_path / "target.prism-claim", owner) is None
        (tmp_path / "target.prism-partial").mkdir()
        with pytest.raises(
            UserError, match=rf"target\.prism-partial: another conversion is writing it \(process {living.pid}"
        ):
            run(hf, tmp_path / "target", "megatron")
        assert (tmp_path / "target.prism-partial").is_dir()
    finally:
        living.kill()
        living.wait()


def test_a_killed_conversion_never_passes_for_whole_and_the_next_starts_clean(hf: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the writing; what it left is not the target, and does not keep the next one out."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from launcher.convert import torch_dist\n"
        "from launcher.convert.__main__ import run\n"
        "true, count = torch_dist.TorchDistWriter.add, []\n"
        "def add(self, *args):\n"
        "    count.append(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(count) == 9 else true(self, *args)\n"
        "torch_dist.TorchDistWriter.add = add\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), 'megatron')\n"
    )
    target = tmp_path / "target"
    done = subprocess.run([sys.executable, "-c", program, str(hf), str(target)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    left = tmp_path / "target.prism-partial" / "release"
    assert list(left.glob("*.distcp"))
    assert not (left / ".metadata").exists()
    run(hf, target, "megatron")
    assert sorted(p.name for p in tmp_path.glob("target*")) == ["target"]
    with pytest.raises(
        UserError, match="release: named by latest_checkpointed_iteration.txt, but no torch_dist checkpoint"
    ):
        open_checkpoint(shutil.copytree(target, tmp_path / "half", ignore=shutil.ignore_patterns(".metadata")))


def test_an_unwritable_target_is_refused(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"file/target: cannot be written: (Not a directory|File exists); name another folder"
    ):
        run(hf, tmp_path / "file" / "target", "megatron")
    with pytest.raises(UserError, match=r"cannot be written"):
        run(hf, Path("/proc/target"), "megatron")


def test_too_little_room_is_found_before_anything_is_written(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def disk_usage(folder: Path) -> Any:
        used.extend(p.name for p in folder.iterdir())
        return shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000)  # type: ignore[attr-defined]

    monkeypatch.setattr(written.shutil, "disk_usage", disk_usage)
    with pytest.raises(WorldError, match=r"0\.07 GB are needed and 0\.00 GB are free; free some room"):
        run(hf, tmp_path / "target", "megatron")
    assert not used
    assert not list(tmp_path.glob("target*"))


def test_nothing_is_left_when_writing_fails(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main([str(hf), str(tmp_path / "target"), "--to", "megatron"]) == 1
    assert not list(tmp_path.glob("target*"))
