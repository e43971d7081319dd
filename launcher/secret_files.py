"""What looks like a secret and is copied nowhere: by the name of a file, by what tokens and keys look like, and by the
values that this process was given as secrets. Pure, but for `secret_values`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

#: Names of files and folders, in lower case.
_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git", ".ssh", ".gnupg", ".aws", ".azure", ".gcloud"),
    *(".docker", ".dockercfg", ".kube", "kubeconfig*", "*.kubeconfig", ".npmrc", ".yarnrc*", ".pypirc", ".pgpass"),
    *(".my.cnf", ".s3cfg", ".boto", ".htpasswd", ".git-credentials", ".databrickscfg", ".huggingface", ".kaggle"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx"),
    *("*.keystore", "*.ovpn", "*.gpg", "credentials", "credentials.*", "*credentials*.json", "kaggle.json"),
    *("secret", "secrets", "secret.*", "secrets.*", "*.secret", "*.secrets", "*secret*.json", "*secret*.y*ml"),
    *("client_secret*", "service?account*.json", "token", "token.txt", "*.token", "*_token", "*_token.txt"),
    *("password*", "passwd*", "*.tfvars", "*.tfstate*"),
)
#: Code may be called as what it deals with.
_CODE = (".py", ".pyi")
#: The shapes of well-known tokens and keys.
_SHAPES = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{24,}|\bgh[pousr]_[A-Za-z0-9]{24,}|\bgithub_pat_\w{24,}"
    rb"|\bglpat-[\w-]{18,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bASIA[0-9A-Z]{16}\b|\bxox[abeprs]-[\w-]{10,}"
    rb"|\bAIza[\w-]{30,}|\bnvapi-[\w-]{20,}|\bpypi-[\w-]{40,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    rb"|\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"]{1,80}:[^\s/@'\"]{3,80}@"
)
#: A name that says what it holds, and a value that stands there in the open.
_NAMED = re.compile(
    rb"""\b(?:[A-Z][A-Z0-9_]*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|API_?KEY|SECRET_KEY|ACCESS_KEY|PRIVATE_KEY)\b
        ['"]?\s*[=:]\s*['"]?[^\s'"$<>{}()\[\],;]{6,}
      | \b(?:[A-Z][A-Z0-9_]*_KEY|token|secret)\b['"]?\s*[=:]\s*['"]?[\w+/=-]{16,}['"]?[,;}\s]*$
      | \b(?:[a-z][a-z0-9]*[_-])*(?:password|passwd|api[_-]?key|secret[_-]key|access[_-]key|auth[_-]token
        |access[_-]token|client[_-]secret)\b['"]?\s*[=:]\s*['"]?[^\s'"$<>{}()\[\],;.]{6,}['"]?[,;}\s]*(?:\#.*)?$""",
    re.VERBOSE | re.MULTILINE,
)
_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)S?$", re.IGNORECASE
)
#: Shorter values stand in files by chance.
_LEAST = 8


def secret_values(declared: Iterable[str]) -> tuple[bytes, ...]:
    """The values of the variables that a run names as its secrets, and of those whose names say so."""
    names = {*declared, *(name for name in os.environ if _VARIABLE.search(name))}
    values = {os.environb.get(os.fsencode(name), b"") for name in names}
    return tuple(sorted(value for value in values if len(value) >= _LEAST))


def is_secret_name(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is called as secrets are."""
    parts = PurePosixPath(path.lower()).parts
    names = parts[:-1] if parts and parts[-1].endswith(_CODE) else parts
    return any(fnmatch.fnmatchcase(part, name) for part in names for name in _NAMES)


def holds_secret(content: bytes, values: Iterable[bytes]) -> bool:
    """Whether a text holds one of the values, something of a token's shape, or a value beside a telling name."""
    return any(value in content for value in values) or bool(_SHAPES.search(content) or _NAMED.search(content))
