"""Where a checkpoint is written: what is refused before anything is read, what a full disk or a signal leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.convert import conversion
from launcher.convert.__main__ import main, run
from launcher.errors import UserError


@pytest.fixture
def hf(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> Path:
    return shutil.copytree(hf_checkpoint("llama"), tmp_path / "hf")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record, in which there are seconds."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "conversion.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------------------- names and places


def test_an_archives_name_is_for_nemo_alone(hf: Path, tmp_path: Path) -> None:
    for to in ("megatron", "hf"):
        with pytest.raises(UserError, match=r"x\.nemo: \.nemo is the name of an archive of format nemo; name a folder"):
            run(hf, tmp_path / "x.nemo", to)
    command = ["merge", str(hf), str(hf), "--weights=1,0", "-o", str(tmp_path / "x.nemo")]
    assert main(command) == 2
    assert not list(tmp_path.glob("x*"))


def test_an_archive_takes_no_folders_place(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "x.nemo").mkdir()
    with pytest.raises(UserError, match=r"x\.nemo: is there already; name a new folder"):
        run(hf, tmp_path / "x.nemo", "nemo")


@pytest.mark.parametrize("place", ["sub", "a/b/c", "../link/sub"])
def test_a_target_inside_the_source_is_refused(place: str, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(hf)
    before = tree(hf)
    with pytest.raises(UserError, match=f"lies in {hf}, which is read; name a folder outside it"):
        run(hf, hf / place, "megatron")
    assert tree(hf) == before
    with pytest.raises(UserError, match="which is read"):
        run(tmp_path / "link", hf / "sub", "megatron")


def test_a_source_that_lies_where_the_target_is_made_is_kept(hf: Path, tmp_path: Path) -> None:
    hf.rename(tmp_path / "x.prism-partial")
    before = tree(tmp_path / "x.prism-partial")
    with pytest.raises(UserError, match=r"x\.prism-partial: lies where .*x is made, and would be removed; rename"):
        run(tmp_path / "x.prism-partial", tmp_path / "x", "megatron")
    assert tree(tmp_path / "x.prism-partial") == before


def test_folders_of_the_users_are_kept_whatever_their_names_end_in(hf: Path, tmp_path: Path) -> None:
    for end in ("partial", "claim", "tmp"):
        (tmp_path / f"x.{end}").mkdir()
        (tmp_path / f"x.{end}" / "notes.txt").write_text("mine")
    run(hf, tmp_path / "x", "megatron")
    assert len(list(tmp_path.glob("x.*/notes.txt"))) == 3


def test_a_link_that_leads_nowhere_is_no_place_for_a_target(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(UserError, match="x: is there already"):
        run(hf, tmp_path / "x", "megatron")


def test_names_with_blanks_other_letters_and_a_slash_at_the_end(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["hf", "a b/mégatron 模型/", "--to", "megatron"]) == 0
    assert main(["a b/mégatron 模型", "./back/", "--to", "hf"]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b", "back", "hf"]


# -------------------------------------------------------------------------------------------------- real file systems


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory with some options; as root alone."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("target", ["megatron", "nemo", "x.nemo", "hf"])
def test_a_disk_that_fills_up_in_the_middle_is_told_and_nothing_is_left(
    target: str,
    hf: Path,
    tmp_path: Path,
    mounted: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program has taken the room that was there when it was looked at."""
    source, to = hf, "nemo" if "nemo" in target else target
    if target == "hf":
        source = tmp_path / "source"
        run(hf, source, "megatron")
    disk = mounted("size=200k")
    monkeypatch.setattr(conversion, "check_room", lambda *_: None)
    assert main([str(source), str(disk / target), "--to", to]) == 1
    said = capsys.readouterr().err
    assert said == f"prism-launch: {disk / target}: No space left on device; free some room, then run again\n"
    assert not list(disk.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_written(hf: Path, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=1m")
    assert main([str(hf), str(disk / "x"), "--to", "megatron"]) == 1
    assert not list(disk.iterdir())


def test_a_read_only_file_system_is_refused(hf: Path, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=1m,ro")
    with pytest.raises(UserError, match=r"mounted/x: cannot be written: Read-only file system; name another folder"):
        run(hf, disk / "x", "megatron")


def test_a_target_on_another_file_system_than_the_source(hf: Path, mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=80m")
    run(hf, disk / "x.nemo", "nemo")
    assert [p.name for p in disk.iterdir()] == ["x.nemo"]


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_nothing_is_left(number: signal.Signals, code: int, hf: Path, tmp_path: Path) -> None:
    program = (
        "import runpy, sys, time\n"
        "from launcher.convert import torch_dist\n"
        "true = torch_dist.TorchDistWriter.add\n"
        "def add(self, *args):\n"
        "    true(self, *args)\n"
        "    sys.stdout.write('writing\\n')\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(0.2)\n"
        "torch_dist.TorchDistWriter.add = add\n"
        "sys.argv[0] = 'prism-launch'\n"
        "runpy.run_module('launcher.convert', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(hf), str(tmp_path / "target"), "--to", "megatron"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "writing\n"
        assert (tmp_path / "target.prism-partial").is_dir()
        process.send_signal(number)
        said = process.stderr.read()
    assert (process.returncode, said) == (code, "")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_the_command_is_the_process_that_converts(hf: Path, tmp_path: Path) -> None:
    """So that what is sent to it arrives; and the folder that it is typed in is none of its modules' places."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "torch.py").write_text("raise RuntimeError('not this one')")
    command = [sys.executable, "-m", "launcher.cli", "convert", "../hf", "../target", "--to", "megatron", "--json"]
    checkout = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": checkout, "PYTHONSAFEPATH": "1"}
    was = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=here, env=environment) as process:
        while process.poll() is None:
            was |= set(Path(f"/proc/{process.pid}/cmdline").read_text().split("\0"))
            time.sleep(0.01)
    assert process.returncode == 0
    assert {"launcher.cli", "launcher.convert"} <= was
    assert (tmp_path / "target" / "hf").is_dir()


def test_what_was_killed_while_it_claimed_is_taken_away_in_time(hf: Path, tmp_path: Path) -> None:
    old, young = (tmp_path / f".out.prism-claim.{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "owner.json").touch()
    os.utime(old, (0, 0))
    run(hf, tmp_path / "out", "megatron")
    assert young.exists() and not old.exists()


@pytest.mark.parametrize("to", ["megatron", "x.nemo", "hf"])
def test_killed_at_any_moment_it_never_passes_for_whole(to: str, hf: Path, tmp_path: Path) -> None:
    """SIGKILL at 12 moments spread over a conversion: the target is not there, or it is the whole one."""
    source = hf
    if to == "hf":
        source = tmp_path / "source"
        run(hf, source, "megatron")
    program = Path(__file__).with_name("kill_at_random.py")
    command = [sys.executable, str(program), str(source), str(tmp_path / "work"), to, "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "12 killed or done, 0 wrong" in done.stdout
