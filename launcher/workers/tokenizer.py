"""A tokenizer as every worker loads it: tokenizer.json cut into tokens, and nothing else done to a text.

Nothing is truncated, padded or added to a text, and special tokens that a text spells are text, but for those allowed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split

from launcher.configs import ALLOWED_SPECIAL
from launcher.errors import UserError
from launcher.models.tokenizer_files import TokenizerFiles, end_of, read_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build(files: TokenizerFiles, allowed: Sequence[str] = ALLOWED_SPECIAL) -> Tokenizer:
    """The tokenizer of these files. A special token in `allowed` that a text spells is that token. Raises UserError."""
    special = set(files.named.values()) - set(allowed)
    added = [
        {**token, "special": token["content"] not in allowed and (token.get("special") or token["content"] in special)}
        for token in files.json.get("added_tokens") or ()
    ]
    where = files.folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(json.dumps({**files.json, "added_tokens": added}))
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in allowed) for t in files.added])
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{where}: not a tokenizer: {error}") from None
    wrong = [token for token, number in files.added.items() if tokenizer.token_to_id(token) != number]
    if wrong:
        raise UserError(
            f"{where}: lacks {', '.join(wrong[:5])}, which cannot have the ids that the files beside it name; "
            "save the tokenizer again"
        )
    named = [t for t in files.named.values() if t not in allowed and tokenizer.token_to_id(t) is not None]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in dict.fromkeys(named)])
    tokenizer.encode_special_tokens = True
    _keep_apart(tokenizer, files)
    return tokenizer


def _keep_apart(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """Where the model itself makes a special token of text that spells it, as one of whole words does: cut such text
    behind its first character. Raises UserError where that is of no help."""
    model = files.json["model"]
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    special = {t.content: n for n, t in tokenizer.get_added_tokens_decoder().items() if t.special and n != unknown}
    made = [t for t, number in special.items() if _makes(tokenizer, t, number)]
    if not made:
        return
    cuts = [Split(Regex(f"{_literal(t[0])}(?={_literal(t[1:])})"), "merged_with_previous") for t in made if t[1:]]
    tokenizer.pre_tokenizer = PreTokenizers([*([tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []), *cuts])
    if still := [t for t in made if _makes(tokenizer, t, special[t])]:
        raise UserError(
            f"{files.folder / 'tokenizer.json'}: text that spells {still[0]} becomes that special token and can be "
            "nothing else; give the token a longer name that no text has"
        )


def _makes(tokenizer: Tokenizer, text: str, number: int) -> bool:
    for inside in (text, f"a {text} a", f"a{text}a"):
        with contextlib.suppress(Exception):  # of a text that such a tokenizer cannot cut at all
            if number in tokenizer.encode(inside, add_special_tokens=False).ids:
                return True
    return False


def _literal(text: str) -> str:
    return "".join(f"\\x{{{ord(c):x}}}" for c in text)


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """The tokenizer of a folder as transformers and TRL take it, and what of its files was set aside.

    Who gives it a text says whether special tokens in it are text: the libraries say no. One without a tokenizer.json
    is made by transformers from the files there are. Raises UserError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if made.eos_token_id is None:
            raise UserError(f"{folder}: its tokenizer names no eos_token, which ends every completion")
        return made, ("no tokenizer.json: made by transformers from the files there are",)
    files = read_tokenizer_files(folder)
    end, _ = end_of(files)
    settings = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    named = {"pad_token": end, **files.named}
    return PreTrainedTokenizerFast(tokenizer_object=build(files), **named, **settings), files.set_aside


def facts(tokenizer: Tokenizer, allowed: Sequence[str], set_aside: Sequence[str] = ()) -> dict[str, Any]:
    """What a receipt says of how text was made into tokens."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"]
    return {
        "truncation": None,
        "padding": None,
        "added_to_every_text": None,
        "special_tokens_in_text": "text",
        "allowed_special": list(allowed),
        "normalizer": normalizer["type"] if normalizer else None,
        "set_aside": list(set_aside),
    }


def spelled(tokenizer: Tokenizer, texts: Iterable[str], allowed: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often texts spell special tokens: those that became tokens, and those that stayed text."""
    known = {t.content: t.special for t in tokenizer.get_added_tokens_decoder().values()}
    looked_for = sorted((t for t, special in known.items() if special or t in allowed), key=len, reverse=True)
    found: Counter[str] = Counter()
    if looked_for:
        pattern = re.compile("|".join(map(re.escape, looked_for)))
        for text in texts:
            found.update(pattern.findall(text))
    kept = {token: count for token, count in sorted(found.items())}
    return {
        "as_tokens": {t: n for t, n in kept.items() if not known[t]},
        "as_text": {t: n for t, n in kept.items() if known[t]},
    }
