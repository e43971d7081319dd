"""`data`: the order of samples, blends, epochs; token files that are damaged."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import train_stages as ts

from launcher.errors import UserError
from launcher.workers.megatron.data import Blend, count_tokens, read_sources
from launcher.workers.megatron.parallel import process_groups

LENGTH = 16


def blend(folder: Path, index: Path, weights: dict[str, float], samples: int = 200, seed: int = 0) -> Blend:
    sources = read_sources({"prepare": folder}, LENGTH, {f"prepare/{name}": w for name, w in weights.items()})
    return Blend(sources, samples, LENGTH, seed, 512, index)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    ts.write_tokens(folder, {"one": 2000, "two": 900})
    return folder


def numbers(of: Blend) -> np.ndarray:
    return of.batch(0, of.samples)[0].numpy()


def test_the_order_depends_on_the_seed_alone(tokens: Path, tmp_path: Path) -> None:
    with process_groups():
        first = numbers(blend(tokens, tmp_path / "a", {"one": 1.0}))
        again = numbers(blend(tokens, tmp_path / "b", {"one": 1.0}))
        other = numbers(blend(tokens, tmp_path / "c", {"one": 1.0}, seed=1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_samples_are_the_text_and_labels_its_next_tokens(tokens: Path, tmp_path: Path) -> None:
    """One epoch covers the tokens in sequences without overlap, each once."""
    text = np.fromfile(tokens / "one.bin", np.uint16)
    with process_groups():
        whole = blend(tokens, tmp_path, {"one": 1.0}, samples=(len(text) - 1) // LENGTH)
        inputs, labels = (t.numpy() for t in whole.batch(0, whole.samples)[:2])
    assert np.array_equal(inputs[:, 1:], labels[:, :-1])
    assert len({row.tobytes() for row in inputs}) == len(inputs)
    places = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(text.astype(np.int64), LENGTH + 1)}
    joined = np.concatenate([inputs, labels[:, -1:]], 1)
    inside = sum(row.tobytes() in places for row in joined)
    assert inside < len(joined)  # documents are shuffled, so a few sequences span two that were not neighbours
    counts = np.bincount(inputs.ravel(), minlength=512)
    assert (counts <= np.bincount(text, minlength=512)).all()


def test_blends_follow_the_weights_and_count_epochs(tokens: Path, tmp_path: Path) -> None:
    with process_groups():
        mixed = blend(tokens, tmp_path, {"one": 3.0, "two": 1.0}, samples=400)
        mix, origins = mixed.mix(), [mixed.origin(i) for i in range(400)]
    assert [(row["source"], row["weight"]) for row in mix] == [("prepare/one", 0.75), ("prepare/two", 0.25)]
    assert [row["tokens"] / LENGTH for row in mix] == pytest.approx([300, 100], abs=2)
    assert mix[0]["epochs"] == pytest.approx(300 * LENGTH / 2000, rel=0.01)
    assert mix[1]["epochs"] == pytest.approx(100 * LENGTH / 900, rel=0.02)
    for part in (origins[:200], origins[200:]):  # evenly, not one source after the other
        assert sum(name == "prepare/two" for name, _ in part) == pytest.approx(50, abs=2)


def test_ranks_share_the_samples_of_a_step_without_gap_or_double(tokens: Path, tmp_path: Path) -> None:
    with process_groups():
        data = blend(tokens, tmp_path, {"one": 1.0})
        wanted = data.batch(8, 16)[0].tolist()
        for size, ranks in [(2, 1), (2, 2), (1, 4), (4, 4)]:
            parts = [[b.tokens.tolist() for b in data.micro_batches(8, 24, size, rank, ranks)] for rank in range(ranks)]
            assert all(len(part) == 16 // (size * ranks) for part in parts)
            found = [row for step in zip(*parts, strict=True) for micro in step for row in micro]
            assert found == wanted


def test_the_index_is_kept_and_a_half_made_one_is_not(tokens: Path, tmp_path: Path) -> None:
    with process_groups():
        first = numbers(blend(tokens, tmp_path, {"one": 1.0, "two": 1.0}))
        (whole,) = tmp_path.iterdir()
        files = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
        assert files
        again = numbers(blend(tokens, tmp_path, {"one": 1.0, "two": 1.0}))
        assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == files
        partial = whole.with_name(f"{whole.name}.partial")  # killed while it was made
        shutil.move(whole, partial)
        for path in partial.iterdir():
            path.write_bytes(path.read_bytes()[:40])
        anew = numbers(blend(tokens, tmp_path, {"one": 1.0, "two": 1.0}))
    assert np.array_equal(first, again)
    assert np.array_equal(first, anew)
    assert [p.name for p in tmp_path.iterdir()] == [whole.name]


def test_a_token_beyond_the_vocabulary_is_named_with_its_source(tokens: Path, tmp_path: Path) -> None:
    sources = read_sources({"prepare": tokens}, LENGTH, {"prepare/one": 1.0})
    with process_groups():
        data = Blend(sources, 50, LENGTH, 0, 300, tmp_path)
        with pytest.raises(UserError, match=r"token id (\d+) in prepare/one is outside the model's vocabulary of 300"):
            data.batch(0, 50)


HEAD = struct.calcsize("<9sQBQQ")


def damage(folder: Path, what: str) -> None:
    index, content = folder / "one.idx", folder / "one.bin"
    data = bytearray(index.read_bytes())
    if what == "absent":
        index.unlink()
    elif what == "empty":
        content.write_bytes(b"")
    elif what == "cut":
        content.write_bytes(content.read_bytes()[:-10])
    elif what == "empty index":
        index.write_bytes(b"")
    elif what == "cut index":
        index.write_bytes(data[:-3])
    elif what == "binary rubbish":
        index.write_bytes(np.random.default_rng(0).bytes(500))
    elif what == "type":
        data[17] = 77
        index.write_bytes(data)
    elif what == "lengths":  # two of them, so that the sum is right
        first, second = struct.unpack_from("<ii", data, HEAD)
        struct.pack_into("<ii", data, HEAD, first + 1, second - 1)
        index.write_bytes(data)
    elif what == "documents":
        struct.pack_into("<q", data, len(data) - 8, 10**6)
        index.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", r"one\.idx: no such file; sources there: two"),
        ("empty", r"one\.bin: 0 bytes, its index wants \d+"),
        ("cut", r"one\.bin: \d+ bytes, its index wants \d+"),
        ("empty index", r"one\.idx: not an index"),
        ("cut index", r"one\.idx: cut off or damaged"),
        ("binary rubbish", r"one\.idx: not an index"),
        ("type", r"one\.idx: token type 77 is unknown"),
        ("lengths", r"one\.idx: damaged"),
        ("documents", r"one\.idx: damaged"),
    ],
)
def test_damaged_token_files_are_refused_by_name(tokens: Path, tmp_path: Path, what: str, message: str) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    assert count_tokens(folder / "one") == 2000
    damage(folder, what)
    with pytest.raises(UserError, match=message):
        count_tokens(folder / "one")


def test_every_source_that_does_not_fit_is_told(tokens: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_sources({"prepare": tokens}, 1000, {"prepare/none": 1.0, "prepare/one": 1.0, "prepare/two": 1.0})
    absent, short = caught.value.problems
    assert "none.idx: no such file; sources there: one, two" in absent
    assert "two.bin: 900 tokens do not fill one sequence" in short
