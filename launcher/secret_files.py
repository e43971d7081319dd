"""What looks like a secret and is copied nowhere: by the name of a file, by what tokens and keys look like, by a value
beside a telling name, and by the values that this process was given as secrets. Pure, but for `secret_values`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import PurePosixPath

#: Names of files and folders, in lower case.
_NAMES = (
    *(".env", ".env.*", ".env[-_]*", "*.env", ".envrc", ".netrc", "_netrc", ".git", ".gitconfig", ".ssh", ".gnupg"),
    *(".aws", ".azure", ".gcloud", ".oci", ".docker", ".dockercfg", ".dockerconfigjson", ".kube", "kubeconfig*"),
    *("*.kubeconfig", ".npmrc", ".yarnrc*", ".pypirc", ".condarc", "pip.conf", ".pgpass", "pgpass*", ".my.cnf"),
    *(".mylogin.cnf", ".s3cfg", ".boto", "*rclone.conf", ".wgetrc", ".curlrc", "*htpasswd", ".git-credentials"),
    *(".databrickscfg", ".huggingface", ".kaggle", ".terraformrc", ".*history", ".xauthority", ".iceauthority"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx"),
    *("*.p8", "*.pk8", "*.pkcs12", "*.der", "*.asc", "*.keystore", "*.keytab", "*.ovpn", "*.gpg", ".munge*"),
    *("credentials", "credentials.*", ".credentials*", "*credentials*.json", "*credentials*.y*ml", "kaggle.json"),
    *("secret", "secrets", "secret.*", "secrets.*", ".secret*", "*.secret", "*.secrets", "*secret*.json"),
    *("*secret*.y*ml", "*secret*.txt", "*secret*.toml", "*_secret", "*-secret", "client_secret*"),
    *("service?account*.json", "*service?account*key*", "auth.json", ".vault*", "*vault*.y*ml", "vault?pass*"),
    *("token", "token.txt", "*.token", "*[._-]token", "*[._-]token.txt", "hf[_-]token*"),
    *("*api[_-]key*", "*apikey*", "*private[_-]key*", "*access[_-]key*", "*secret[_-]key*", "*[_-]key", "*[_-]key.txt"),
    *("password*", "passwd*", ".pass*", "*passwords.txt", "*.tfvars", "*.tfstate*"),
)
_NAMED_SO = re.compile("|".join(fnmatch.translate(name) for name in _NAMES))
#: A copy that an editor or a user left beside a file is called as it is.
_COPY = re.compile(r"(~|\.(bak|old|orig|save|swp|backup|copy))+$")
#: Code may be called as what it deals with.
_CODE = (".py", ".pyi")
#: The shapes of well-known tokens and keys.
_SHAPES = re.compile(
    rb"""-----BEGIN\ [A-Z ]*PRIVATE\ KEY(?:\ BLOCK)?----- | LS0tLS1CRUdJTi | PuTTY-User-Key-File-\d | AGE-SECRET-KEY-1
    | \b(?:hf_|api_org_)[A-Za-z0-9]{20,} | \bgh[pousr]_[A-Za-z0-9]{24,} | \bgithub_pat_\w{24,}
    | \bgl(?:pat|rt|dt|ptt|ft|soat|agent|cbt|imt|oas)-[\w-]{18,} | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \bsk-(?:[a-z]+\d*-){0,3}[A-Za-z0-9_]{20,} | \b[rs]k_(?:live|test)_\w{16,} | \bgsk_\w{30,} | \bxai-\w{30,}
    | \bxox[abeprs]-[\w-]{10,} | \bAIza[\w-]{30,} | \bGOCSPX-[\w-]{20,} | \bya29\.[\w-]{20,} | \bnvapi-[\w-]{20,}
    | \bpypi-[\w-]{40,} | \bnpm_[A-Za-z0-9]{30,} | \br8_[A-Za-z0-9]{30,} | \bwandb_v1_\w{20,} | \bdapi[0-9a-f]{32}\b
    | \bdo[opr]_v1_[0-9a-f]{40,} | \bSG\.[\w-]{16,}\.[\w-]{16,} | \bSK[0-9a-f]{32}\b
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,} | \$(?:apr1|[156y]|2[aby])\$[\w./$]{8,}
    | \bhooks\.slack\.com/services/\w+/\w+/\w+ | \bdiscord(?:app)?\.com/api/webhooks/\d+/[\w-]{20,}
    | \b[a-z][a-z0-9+.-]{1,20}://(?:[^\s/:@'"]{0,80}:(?![$<{])[^\s/@'"]{3,80} | [A-Za-z0-9_-]{20,80})@
    | \b[Bb]earer\s+(?=[\w.~+/-]*\d)[\w.~+/-]{16,}
    | \bAuthorization['"]?\s*[:=]\s*['"]?(?:Basic|Token|token)\s+[\w.~+/=-]{8,}
    | \bwandb\b[^\n]{0,40}\b[0-9a-f]{40}\b | \bkey['"]?\s*[:=]\s*['"]?[0-9a-f]{32,40}\b
    | \bAccountKey=[\w+/]{20,} | [?&]sig=[\w%+/-]{20,}
    | \bmachine\s+\S{1,80}\s+(?:login\s+\S{1,80}\s+)?password\s+\S""",
    re.VERBOSE,
)
#: Words of names that may say what is held.
_WORDS = re.compile(
    rb"token|secret|pass|pwd|credential|auth|key|(?:api|access|private|account|signing|encryption)[_-]?key"
    rb"|(?:access|refresh|bearer|session)[_-]?token"
)
#: The end of a name that says what it holds; what stands before a value; the value, in quotes or to a space.
_TELLING = re.compile(
    rb"""(?i:(?P<strong>secret[_-]?key|secret|passwo?rd|passwd|passphrase|pass|pwd|credentials?
            |(?:api|access|private|account|signing|encryption)[_-]?key
            |(?:auth|access|refresh|bearer|session)[_-]?token)
          |(?P<weak>token|auth|key))
        (?P<mark>['"]?[ \t]{0,80}\]?[ \t]{0,80}(?:=>|:=|={1,2}|:|,)|[ \t])[ \t]{0,80}
        (?:(?P<quote>['"])(?P<quoted>[^'"\n]{4,400})(?P=quote)|(?P<bare>[^\s'",;{}]{4,400}))""",
    re.VERBOSE,
)
_BEFORE = re.compile(rb"(?:--?)?[\w.-]*$")
#: Kubernetes and its like write a variable's name and its value in two lines.
_IN_TWO_LINES = re.compile(
    rb"""\bname['"]?:[ \t]*['"]?[A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|KEY)['"]?,?[ \t]*\n
        [+ -]?[ \t]*['"]?value['"]?:[ \t]*['"]?[^\s'"$<{]{6,}""",
    re.VERBOSE,
)
#: What refers to a value or stands for one: a variable, a name in code, a call, a path, a placeholder, a constant.
_REFERENCE = re.compile(
    rb"[$<{%(\[*/~!&|`-].*|[A-Z]+(?:_[A-Z0-9]+)+|\.{1,3}/.*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\W*|[A-Za-z_][\w.]*[(\[].*"
    rb"|(?i:null|none|true|false|str|bytes|optional|required|string|x{3,}|\.{3})\W*"
)
_VARIABLE = re.compile(
    r"(TOKEN|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|API_?KEYS?|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?|_PASS|_PAT|_KEY)$",
    re.IGNORECASE,
)
#: Shorter values stand in files by chance.
_LEAST = 8


def secret_values(declared: Iterable[str]) -> tuple[bytes, ...]:
    """The values of the variables that a run names as its secrets, and of those whose names say so."""
    names = {*declared, *filter(is_secret_variable, os.environ)}
    values = {os.environb.get(os.fsencode(name), b"") for name in names}
    return tuple(sorted(value for value in values if len(value) >= _LEAST and not value.startswith((b"/", b"~/"))))


def is_secret_variable(name: str) -> bool:
    """Whether a variable's name says that it holds a secret."""
    return bool(_VARIABLE.search(name))


def is_secret_name(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is called as secrets are."""
    parts = [_COPY.sub("", part) for part in PurePosixPath(path.lower()).parts]
    names = parts[:-1] if parts and parts[-1].endswith(_CODE) else parts
    return any(_NAMED_SO.match(part) for part in names)


def holds_token(content: bytes) -> bool:
    """Whether a text holds something of the shape of a well-known token or key."""
    return bool(_SHAPES.search(content))


def holds_secret(content: bytes, values: Iterable[bytes]) -> bool:
    """Whether a text holds one of the values, something of a token's shape, or a value beside a telling name."""
    plain = content.replace(b"\0", b"")  # as UTF-16 has it between letters
    return (
        any(value in plain for value in values)
        or holds_token(plain)
        or bool(_IN_TWO_LINES.search(plain))
        or any(map(partial(_is_told, plain), _WORDS.finditer(plain.lower())))
    )


def _is_told(content: bytes, found: re.Match[bytes]) -> bool:
    match = _TELLING.match(content, found.start())
    return match is not None and _is_open(content, match)


def _is_open(content: bytes, match: re.Match[bytes]) -> bool:
    """Whether the value beside a telling name stands there itself, and is none that code refers to."""
    before = _BEFORE.search(content[max(0, match.start() - 80) : match.start()])
    word = match["strong"] or match["weak"]
    name = (before[0] if before else b"") + word
    value = match["quoted"] or match["bare"]
    mark = match["mark"].strip()
    if (not mark or mark.endswith(b",")) and not _is_said_without_sign(name, mark, match["quote"]):
        return False
    if name.lower() in (b"pwd", b"oldpwd") and not match["quote"]:  # the shell's folder
        return False
    is_variable = name.strip(b"-").isupper() and word.lower() != b"auth"
    if _REFERENCE.fullmatch(value) or (match["bare"] and word.lower() in value.lower()):
        return False
    if match["strong"]:
        return len(value) >= (8 if word.lower() == b"pass" else 6)
    if is_variable and (word.lower() == b"token" or b"_" in name):
        return len(value) >= 6 and not value.isdigit()
    return word.lower() != b"key" and _is_like_a_token(value)


def _is_said_without_sign(name: bytes, mark: bytes, quote: bytes | None) -> bool:
    """`--api-key VALUE`, `ENV HF_TOKEN VALUE`, and `"HF_TOKEN", "VALUE"` in a call."""
    if mark:
        return mark[:1] in (b"'", b'"') and quote is not None and name.isupper()
    return name.startswith(b"--") or (name.isupper() and b"_" in name)


def _is_like_a_token(value: bytes) -> bool:
    digits = sum(chr(c).isdigit() for c in value)
    return len(value) >= 12 and 2 <= digits < len(value) and re.fullmatch(rb"[\w+/=.-]+", value) is not None
