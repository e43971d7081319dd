"""Small recipes and foreign files that would take time or memory without end, or that no number or path can hold."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import UserError
from launcher.files import read_bytes
from launcher.interpreter import module_command
from launcher.spec import SpecError, decode
from launcher.user_json import read_json

MERGES = "x0: &x0 {" + ", ".join(f"k{i}: 1" for i in range(50)) + "}\n"
MERGES += "".join(f"x{i}: &x{i}\n  <<: [" + ", ".join([f"*x{i - 1}"] * 10) + "]\n" for i in range(1, 25))
ALIASES = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, 12))
AXES = "base: demo\nmatrix:\n" + "".join(f"  base.x{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n" for i in range(9))
DEEP = "a: " * 1 + "[" * 500 + "]" * 500

#: Recipe, further words, and what is said.
CASES: dict[str, tuple[str, list[str], str]] = {
    "merge keys": (MERGES, [], "more than 400000 values"),
    "aliases": (ALIASES, [], "more than 400000 values"),
    "a matrix": (AXES, [], "matrix: 1,000,000,000 runs"),
    "nested lists": (DEEP, [], "nested too deeply"),
    "a whole number of 400 digits": (f"base: demo\nseed: {'9' * 400}\n", [], "is too large for a number"),
    "a number of 400 digits": ("base: demo\n", ["--set", f"base.lr={'9' * 400}"], "is too large for a number"),
    "NUL in a path": ('stages: {p: {kind: prepare, sources: {f: {kind: files, path: "a\\0b"}}}}\n', [], "holds a char"),
    "NUL in a key": ('"a\\0b": 1\n', [], "holds a character"),
    "half a character": ('name: "\\ud800"\n', [], "invalid Unicode character escape"),
    "a deep key of --set": ("base: demo\n", ["--set", "base." + "a." * 3000 + "b=1"], "more than 64 levels"),
    "a deep value of --set": ("base: demo\n", ["--set", f"base.x={'[' * 300}{']' * 300}"], "nested too deeply"),
    "a deep key of a matrix": (f"base: demo\nmatrix: {{base.{'a.' * 200}b: [1]}}\n", [], "more than 64 levels"),
    "a device as base": ("base: /dev/zero\n", [], "/dev/zero: is a device"),
    "a pipe as base": ("base: ./pipe\n", [], "pipe: is a pipe"),
    "a folder as base": ("base: ./folder\n", [], "folder: is a folder"),
    "a device as model": ("base: demo\n", ["--set", "model=./zero.yaml"], "no model ./zero.yaml"),
    "a device as entrypoint": ("base: demo\n", ["--set", "base.entrypoint=./zero.yaml"], "is a device"),
    "bases of bases": ("base: [b0.yaml, b0.yaml]\n", [], "base: more than 100 files"),
    "many unknown keys": ("base: demo\n" + "".join(f"key{i}: 1\n" for i in range(3000)), [], "the first 20 shown"),
    "a long value": ("base: demo\n", ["--set", f"base.lr=[{'7, ' * 3000}7]"], "... (9003 characters)"),
}


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (1500 << 20, 1500 << 20))


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_is_refused_within_bounds(name: str, tmp_path: Path) -> None:
    text, words, message = CASES[name]
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for i in range(10):
        (tmp_path / f"b{i}.yaml").write_text(f"base: [b{i + 1}.yaml, b{i + 1}.yaml]\n")
    (tmp_path / "b10.yaml").write_text("seed: 1\n")
    command = module_command("launcher.cli", "check", "r.yaml", *words)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited, timeout=300, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert len(done.stderr) < 20_000


@pytest.mark.parametrize("cluster", ["/dev/zero", "./pipe.yaml", "./folder.yaml"])
def test_a_profile_is_read_within_bounds(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.yaml")
    Path("folder.yaml").mkdir()
    assert main(["check", "demo", "--cluster", cluster]) == 2


CONFIGS: dict[str, Callable[[Path], object]] = {
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "nested": lambda path: path.write_text("[" * 100_000),
    "a large file": lambda path: (path.touch(), os.truncate(path, 1 << 30)),
    "a number of 400 digits": lambda path: path.write_text(f'{{"model_type": "llama", "hidden_size": {"9" * 400}}}'),
    "a number of 300 digits": lambda path: path.write_text(f'{{"model_type": "llama", "hidden_size": {"9" * 300}}}'),
    "half a text": lambda path: path.write_bytes(b'{"model_type": "\xff"}'),
    "a list": lambda path: path.write_text("[1]"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_the_configuration_of_a_model_is_read_within_bounds(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIGS[what](tmp_path / "config.json")
    assert main(["fit", str(tmp_path), "--gpus", "8"]) == 2
    assert "prism-launch: " in capsys.readouterr().err


def test_a_recipe_may_come_through_a_pipe_that_somebody_fills(tmp_path: Path) -> None:
    command = ["bash", "-c", f"{' '.join(module_command('launcher.cli'))} check <(sleep 0.5; echo 'base: demo')"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_pipe_is_waited_for_and_read_to_its_end(tmp_path: Path) -> None:
    read, write = os.pipe()

    def fill() -> None:
        for _ in range(3):
            os.write(write, b"x" * 100_000)
        os.close(write)

    writer = threading.Thread(target=fill)
    writer.start()
    assert read_bytes(Path(f"/dev/fd/{read}"), piped=True) == b"x" * 300_000
    writer.join()
    with pytest.raises(UserError, match="is a pipe; name a file"):
        read_bytes(Path(f"/dev/fd/{read}"))
    os.close(read)


def test_a_file_holds_at_most_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (2 << 20))
    assert len(read_bytes(tmp_path / "a", 2 << 20)) == 2 << 20
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_bytes(tmp_path / "a", 1 << 20)


def test_numbers_that_others_write_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"model_max_length": 1000000000000000019884624838656, "x": 1e-400, "y": -3}')
    assert read_json(tmp_path / "a.json")["model_max_length"] == 1000000000000000019884624838656


def test_a_whole_number_beyond_all_numbers_is_no_number() -> None:
    from launcher.spec import Limits

    for value in (10**400, -(10**400)):
        with pytest.raises(SpecError, match="hang_s: expected a number"):
            decode(Limits, {"hang_s": value})
    assert decode(Limits, {"hang_s": 10**30}).hang_s == 1e30


def test_many_stages_over_a_base_take_time_in_proportion(tmp_path: Path) -> None:
    """Positions of what is replaced are found by the value, not by looking through all there are."""
    from launcher.recipe.document import Document, merge_documents

    class Counted(dict[str, str]):
        walks = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Counted.walks += 1
            return super().__iter__()

    count = 2000
    data = {f"s{i}": {"seed": [1]} for i in range(count)}
    positions = Counted({f"s{i}.seed": "a:1" for i in range(count)} | {f"s{i}.seed[0]": "a:2" for i in range(count)})
    above = Document({f"s{i}": {"seed": 2} for i in range(count)}, {f"s{i}.seed": "b:1" for i in range(count)})
    merged = merge_documents(Document(data, positions), above)
    assert set(merged.positions.values()) == {"b:1"} and Counted.walks <= 2
