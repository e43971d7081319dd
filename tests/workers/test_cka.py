"""Linear CKA against its formula, and by hand on checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.errors import UserError
from launcher.workers.checkpoints import load_model
from launcher.workers.cka import MAX_TOKENS, cka_rows, debiased_cka, linear_cka, main, pooled_states, read_texts
from launcher.workers.weight_diff import run_by_hand


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """By centred Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, m = (centre @ (a @ a.T) @ centre for a in (x, y))
    return float(np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m)))


def naive_debiased(x: np.ndarray, y: np.ndarray) -> float:
    """By U-centred Gram matrices (Szekely and Rizzo 2014), another form of the unbiased estimator."""
    n = len(x)

    def centred(a: np.ndarray) -> np.ndarray:
        gram = a @ a.T
        np.fill_diagonal(gram, 0)
        sums = gram.sum(0)
        u = gram - sums[:, None] / (n - 2) - sums[None] / (n - 2) + gram.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0)
        return u

    k, m = centred(x), centred(y)
    return float(np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m)))


@pytest.mark.parametrize(("n", "p", "q"), [(40, 8, 8), (12, 30, 7), (5, 3, 64)])
def test_values_are_those_of_the_formulas(n: int, p: int, q: int) -> None:
    x = random(n, p) + 3
    y = x[:, :3] @ random(3, q, seed=1) + 0.5 * random(n, q, seed=2)
    assert linear_cka(x, y) == pytest.approx(naive(x.numpy(), y.numpy()), rel=1e-9)
    assert debiased_cka(x, y) == pytest.approx(naive_debiased(x.numpy(), y.numpy()), rel=1e-9)
    assert 0 < linear_cka(x, y) < 1


@pytest.mark.parametrize("measure", [linear_cka, debiased_cka])
def test_turning_scaling_and_shifting_change_nothing(measure) -> None:
    x, y = random(30, 12), random(30, 12, seed=1)
    turn = torch.linalg.qr(random(12, 12, seed=2))[0]
    assert measure(x, x) == pytest.approx(1, abs=1e-12)
    assert measure(x, 7 * x @ turn - 4) == pytest.approx(1, abs=1e-12)
    assert measure(x, y) == pytest.approx(measure(x @ turn, 0.1 * y + 2), abs=1e-12)
    assert measure(x, y) == pytest.approx(measure(y, x), abs=1e-12)
    # A stretch of one dimension alone is a change.
    assert measure(x, x * torch.tensor([20.0] + [1] * 11)) < 0.9


def test_independent_representations_look_alike_only_to_the_biased_estimator() -> None:
    x, y = random(64, 256), random(64, 256, seed=1)
    assert linear_cka(x, y) == pytest.approx(256 / (256 + 64), abs=0.05)
    assert abs(debiased_cka(x, y)) < 0.05


def test_constant_or_infinite_representations_have_no_value() -> None:
    x = random(10, 4)
    for other in (torch.ones(10, 4), x * float("inf")):
        assert linear_cka(x, other) is None
        assert debiased_cka(x, other) is None


def test_states_are_means_over_tokens_without_padding(models: dict[str, Path]) -> None:
    model, tokenizer = load_model(models["a"])
    texts = ["short", "a longer text of 12 words or so\n", "x = 3\n" * 200]
    states = pooled_states(model, tokenizer, texts)
    assert states.shape == (3, 3, 32)
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert torch.allclose(states[0, i].float(), model.get_input_embeddings().weight[ids].mean(0), atol=1e-6)
        for layer in range(3):
            assert torch.allclose(states[layer, i].float(), hidden[layer][0].mean(0), atol=1e-6)


def test_rows_and_models_of_another_depth() -> None:
    x, y = random(3, 8, 5), random(3, 8, 5, seed=1)
    rows = cka_rows(x, y, {"from": "a", "to": "b"})
    assert [(r["from"], r["to"], r["layer"], r["n"]) for r in rows] == [("a", "b", layer, 8) for layer in range(3)]
    assert [r["value"] for r in rows] == [linear_cka(x[i], y[i]) for i in range(3)]
    with pytest.raises(UserError, match="2 layers against 1"):
        cka_rows(x, y[:2], {})


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.workers.cka", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])


def test_by_hand(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"line {i} has {i * i} in it\n\n" for i in range(12)))
    assert run_by_hand(lambda: main([str(models["a"]), str(models["b"]), "--texts", str(texts), "--json"])) == 0
    rows = json.loads(capsys.readouterr().out)["cka"]
    assert [r["layer"] for r in rows] == [0, 1, 2]
    assert all(r["n"] == 12 and 0 < r["value"] < 1 for r in rows)
    assert {(r["from"], r["to"], r["texts"]) for r in rows} == {(str(models["a"]), str(models["b"]), str(texts))}
    wrong = run(str(tmp_path), str(models["b"]), "--texts", str(texts))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"prism-launch: {tmp_path}: no config.json; a Hugging Face checkpoint is wanted\n"


def test_text_by_hand(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\nthree 3\nfour + 4\n")
    assert main([str(models["a"]), str(models["a"]), "--texts", str(texts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("linear CKA on 4 texts")
    assert [line.split() for line in lines[1:]] == [["layer", f"{i}:", "1.0000", "(1.0000)"] for i in range(3)]


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    with pytest.raises(UserError, match=r"texts\.txt"):
        read_texts(texts)
    texts.write_text("one\n\n\ntwo\nthree\n")
    with pytest.raises(UserError, match="3 texts; CKA needs at least 4"):
        read_texts(texts)
    texts.write_bytes(b"\xff\n" * 9)
    with pytest.raises(UserError, match=r"texts\.txt"):
        read_texts(texts)
