"""Secrets that lie beside code or among uncommitted changes, and what is copied into a store that others may read."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import load_profile
from launcher.secret_files import holds_secret, is_secret_name
from launcher.snapshot import with_snapshot
from tests.supervisor.counting import counting_run

PLANTED = "PLANTEDplanted0123"
#: What is put beside the package's code, and whether the snapshot takes it.
BESIDE = {
    **dict.fromkeys((".env", ".netrc", ".git/config", "deploy.pem", "id_rsa", "id_ed25519.old", "server.key"), False),
    **dict.fromkeys((".aws/credentials", ".npmrc", "kubeconfig.yaml", "credentials.prod.json", "prod.env"), False),
    **dict.fromkeys(("secrets/db.txt", "service-account-1.json", "token", ".hidden/notes.txt", ".pypirc"), False),
    **dict.fromkeys(("secrets.py", "tokens.json", "style.css", "report/page.html"), True),
}


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with a package called launcher."""
    (tmp_path / "code" / "launcher").mkdir(parents=True)
    (tmp_path / "code" / "launcher" / "__init__.py").write_text("")
    return tmp_path / "code"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe in a repository of its own."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("name: it\n")
    git(tmp_path / "recipes", "init", "--quiet")
    return tmp_path / "recipes" / "r.yaml"


def snapshot(tmp_path: Path, code: Path, recipe: Path, *secrets: str) -> tuple[Path, dict[str, Any]]:
    """The snapshot's folder, and what it says of itself."""
    run = replace(counting_run(("a", (), {})), recipe=str(recipe))
    run = replace(run, stages=tuple(replace(s, spec=replace(s.spec, secrets=secrets)) for s in run.stages))
    made = with_snapshot(tmp_path / "root", run, replace(load_profile("example-pyxis"), code=str(code)))
    folder = tmp_path / "root" / (made.stages[0].spec.snapshot or "")
    return folder, json.loads((folder / "snapshot.json").read_text())


def hits(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and PLANTED.encode() in p.read_bytes()]


def test_what_is_called_as_secrets_are_is_not_copied_and_is_named(tmp_path: Path, code: Path, recipe: Path) -> None:
    for name, is_taken in BESIDE.items():
        path = code / "launcher" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("nothing" if is_taken else PLANTED)
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == []
    assert all((folder / "launcher" / name).is_file() == is_taken for name, is_taken in BESIDE.items())
    named = facts["launcher"]["left_out"]
    for name in (name for name, is_taken in BESIDE.items() if not is_taken):
        assert name in named or name.split("/")[0] in named


@pytest.mark.parametrize("where", ["file", "folder", "code"])
def test_what_a_link_leads_to_is_not_copied(where: str, tmp_path: Path, code: Path, recipe: Path) -> None:
    (tmp_path / "private").mkdir()
    target = tmp_path / "private" / ("it.py" if where == "code" else "it.txt")
    target.write_text(PLANTED)
    link = code / "launcher" / ("it.py" if where == "code" else "link")
    link.symlink_to(target.parent if where == "folder" else target)
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == [] and facts["launcher"]["left_out"] == {link.name: "a link"}


def test_a_package_that_was_installed_as_links_is_copied(tmp_path: Path, code: Path, recipe: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("__init__.py", "cli.py"):
        (tmp_path / "cache" / name).write_text("value = 1\n")
        (code / "launcher" / name).unlink(missing_ok=True)
        (code / "launcher" / name).symlink_to(tmp_path / "cache" / name)
    folder, _ = snapshot(tmp_path, code, recipe)
    assert (folder / "launcher" / "cli.py").read_text() == "value = 1\n"


UNCOMMITTED = {
    ".env": f"HF_TOKEN={PLANTED}\n",
    "deploy/prod.env": f"anything {PLANTED}\n",
    "id_rsa": f"{PLANTED}\n",
    "notes.md": f"use HF_TOKEN={PLANTED}\n",
    "train.py": f'WANDB_API_KEY = "{PLANTED}"\n',
    "values.yaml": f"db:\n  password: {PLANTED}\n",
    "config.json": f'{{"api_key": "{PLANTED}"}}\n',
    "shape.txt": f"hf_{PLANTED}{PLANTED}\n",
    "remote.txt": f"https://me:{PLANTED}@example.org/x.git\n",
    "key.txt": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{PLANTED}\n",
}


@pytest.mark.parametrize("name", UNCOMMITTED)
def test_an_uncommitted_secret_is_not_in_the_diff_and_is_named(
    name: str, tmp_path: Path, code: Path, recipe: Path
) -> None:
    top = recipe.parent
    (top / name).parent.mkdir(exist_ok=True)
    (top / name).write_text("A=1\n")
    (top / "model.py").write_text("eos_token = tokenizer.eos_token\n")
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message=first")
    (top / name).write_text("A=1\n" + UNCOMMITTED[name])
    (top / "model.py").write_text("pad_token = tokenizer.eos_token or missing_token\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == []
    assert list(facts["recipe"]["left_out_of_diff"]) == [name]
    assert "+pad_token = tokenizer.eos_token" in (folder / "code.diff").read_text()


def test_a_secret_that_was_taken_out_is_not_in_the_diff(tmp_path: Path, code: Path, recipe: Path) -> None:
    (recipe.parent / "a.yaml").write_text(f"api_key: {PLANTED}\nlr: 1\n")
    (recipe.parent / "b.sh").write_text(f"export HF_TOKEN={PLANTED}\n")
    (recipe.parent / "c.txt").write_text("one\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "a.yaml").write_text("lr: 2\n")
    (recipe.parent / "b.sh").unlink()
    (recipe.parent / "c.txt").write_text("two\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == [] and list(facts["recipe"]["left_out_of_diff"]) == ["a.yaml", "b.sh"]
    assert "-one\n+two\n" in (folder / "code.diff").read_text()


def test_the_value_of_a_secret_is_known_wherever_it_stands(
    tmp_path: Path, code: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", PLANTED)
    (code / "launcher" / "notes.txt").write_text(f"mine is {PLANTED}")
    (recipe.parent / "plain.txt").write_text("nothing\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "plain.txt").write_text(f"mine is {PLANTED}\n")
    folder, facts = snapshot(tmp_path, code, recipe, "MINE")
    assert hits(folder) == []
    assert "notes.txt" in facts["launcher"]["left_out"] and "plain.txt" in facts["recipe"]["left_out_of_diff"]


def test_what_a_filter_changes_is_named_and_not_shown(tmp_path: Path, code: Path, recipe: Path) -> None:
    (recipe.parent / ".gitattributes").write_text("*.bin filter=lfs\n")
    (recipe.parent / "w.bin").write_text("pointer\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "w.bin").write_text("a large file\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert list(facts["recipe"]["left_out_of_diff"]) == ["w.bin"]
    assert (folder / "code.diff").read_text() == ""


#: Put together here, so that nothing that looks for tokens in code finds one.
BODY, HEX = "Zq3xK9vB2nM7wR5tY8uLZq3xK9vB2nM7wR5tY8uL", "0123456789abcdef" * 3
SHAPES = {
    **{
        f"{start}...": f"x = {start}{BODY}"
        for start in ("hf_", "api_org_", "gh" + "p_", "glpat-", "glrt-", "npm_", "r8_")
    },
    **{f"{start}...": f"{start}{BODY}" for start in ("sk-", "sk-proj-", "sk-ant-api03-", "nvapi-", "gsk_", "GOCSPX-")},
    "W&B": f"wandb login {HEX[:40]}",
    "W&B in code": f"wandb.login(key='{HEX[:40]}')",
    "AWS": f"aws_secret_access_key = {BODY}",
    "AWS in JSON": f'"SecretAccessKey": "{BODY}",',
    "AWS in YAML": f"  secretAccessKey: {BODY}",
    "a session": f"aws_session_token = Fwo{BODY}",
    "npmrc": f"//npm.example.org/:_authToken={BODY}",
    "pip": f"index-url = https://{BODY}@example.org/simple",
    "redis": "redis://:hunter2secret@host:6379",
    "a header": f"Authorization: Bearer {BODY}",
    "basic": "Authorization: Basic dXNlcjpwYXNzd29yZDEyMw==",
    "PGP": "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
    "Slack's hook": f"https://hooks.slack.com/services/T00000000/B00000000/{BODY[:24]}",
    "netrc": "machine api.example.org login user password hunter2secret",
    "camel": "clientSecret: abcdefghijkl1234",
    "spaces": "password: 'correct horse battery'",
    "signs": "password = P@ss!w0rd(1)",
    "a dot": "password: hunter.2secret",
    "passphrase": "passphrase: correcthorse",
    "a token in YAML": "  hf_token: abcdefghijkl123456",
    "an argument": 'login(token="abcdefghijkl123456")',
    "two lines": "- name: HF_TOKEN\n  value: abcdefghijkl123456",
    "Dockerfile": "ENV HF_TOKEN abcdefghijkl123456",
    "a flag": "train --api-key abcdefghijkl123456",
    "a subscript": "os.environ['HF_TOKEN'] = 'abcdefghijkl123456'",
    "a call": "os.environ.setdefault('HF_TOKEN', 'abcdefghijkl123456')",
    "docker": '"auth": "dXNlcjpwYXNzd29yZDEyMw=="',
}
HARMLESS = (
    *("eos_token = tokenizer.eos_token", "bos_token: <|begin_of_text|>", "secrets: [HF_TOKEN]", "secret: HF_TOKEN"),
    *(
        "max_tokens: 1000000000",
        "api_key = os.environ['API_KEY']",
        "password = getpass.getpass()",
        "HF_TOKEN=$HF_TOKEN",
    ),
    *("HF_TOKEN: ${HF_TOKEN}", 'HF_TOKEN = os.environ["HF_TOKEN"]', "token: <your token>", "password: null"),
    *("https://host:8080/path@x", "skip-connection-to-the-last-layer-of-it", "key = 'model.layers.0.weight'"),
    *(f"commit {HEX[:40]}", "pass: `cancel`", "key_padding_mask = attention_mask", "private_key: ~/.ssh/id_rsa"),
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_secret_is_known_by_its_shape_or_its_name(shape: str) -> None:
    assert holds_secret(SHAPES[shape].encode(), ())
    assert holds_secret(f"a: 1\n{SHAPES[shape]}\nb: 2\n".encode("utf-16"), ())


@pytest.mark.parametrize("text", HARMLESS)
def test_what_refers_to_a_secret_or_is_none_is_not_taken_for_one(text: str) -> None:
    assert not holds_secret(text.encode(), ())


def test_a_file_is_called_as_secrets_are_in_many_ways() -> None:
    names = (
        ".env.local .env~ .env.bak ID_RSA id_rsa.bak key.pem.old api_keys.json wandb_key hf-token.txt cert.p8 "
        "private_key .vault-token .secrets.toml krb5.keytab .bash_history a/.aws/credentials credentials.json~ pip.conf"
    )
    assert [name for name in names.split() if not is_secret_name(name)] == []
    harmless = (
        "tokenizer.json tokens.json style.css monkey.txt keyboard.txt special_tokens_map.json secrets.py history.md"
    )
    assert [name for name in harmless.split() if is_secret_name(name)] == []


def test_a_recipe_and_a_script_that_hold_a_secret_are_not_copied(tmp_path: Path, code: Path, recipe: Path) -> None:
    recipe.write_text(f"# HF_TOKEN={PLANTED}\nname: it\n")
    (tmp_path / "train.py").write_text(f'HF_TOKEN = "{PLANTED}"\n')
    run = replace(counting_run(("a", (), {})), recipe=str(recipe))
    (stage,) = run.stages
    config = {**stage.spec.config, "entrypoint": str(tmp_path / "train.py")}
    run = replace(run, stages=(replace(stage, spec=replace(stage.spec, config=config)),))
    made = with_snapshot(tmp_path / "root", run, replace(load_profile("example-pyxis"), code=str(code)))
    folder = tmp_path / "root" / (made.stages[0].spec.snapshot or "")
    facts = json.loads((folder / "snapshot.json").read_text())
    assert hits(folder) == [] and not (folder / "recipe.yaml").exists()
    assert facts["recipe"]["left_out"] == {"recipe.yaml": "holds what looks like a secret"}
    assert facts[f"entrypoint {tmp_path / 'train.py'}"]["left_out"] == {"train.py": "holds what looks like a secret"}


def test_a_secret_in_the_name_of_a_file_is_not_shown(tmp_path: Path, code: Path, recipe: Path) -> None:
    named = f"hf_{PLANTED}{PLANTED}"
    (code / "launcher" / f"{named}.txt").write_text("nothing")
    (recipe.parent / "a").mkdir()
    (recipe.parent / "a" / f"{named}.txt").write_text("one\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "a" / f"{named}.txt").write_text("two\n")
    (recipe.parent / f"{named}.md").write_text("untracked\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == [] and not any(PLANTED in str(path) for path in folder.rglob("*"))
    assert list(facts["recipe"]["left_out_of_diff"]) == ["a/(a name that looks like a secret)"]
    assert facts["recipe"]["untracked"] == ["(a name that looks like a secret)"]
