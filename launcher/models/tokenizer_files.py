"""What the files of a tokenizer's folder say, by one rule for the login side and for jobs. Standard library only.

tokenizer.json is the tokenizer. Its special tokens are named in tokenizer_config.json, or, as older tools have it, in
special_tokens_map.json; tokens that it lacks in tokenizer_config.json or added_tokens.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import MOST_SHOWN, UserError
from launcher.models.side_files import side_files
from launcher.user_json import decode, read_object

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
#: What tokenizer_config.json may ask for and no stage does: a stage says itself what begins and ends a text.
_SET_ASIDE = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "chat_template")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files describe it.

    `json` is tokenizer.json without what cuts, pads or changes a text: `set_aside` says what of that was there, and
    what else no stage does. `ids` are those of all tokens; `named` the special ones by role; `added` those that
    tokenizer.json lacks.
    """

    folder: Path
    json: Mapping[str, Any]
    ids: Mapping[str, int]
    named: Mapping[str, str]
    added: Mapping[str, int]
    set_aside: tuple[str, ...]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the files of a folder that has a tokenizer.json. Raises UserError."""
    data = read_object(folder / "tokenizer.json")
    if data is None:
        raise UserError(f"{folder}: holds no tokenizer.json; name a folder that AutoTokenizer saved")
    settings = read_object(folder / "tokenizer_config.json") or {}
    ids, added = vocabulary_of(data, folder), _added(folder, settings)
    if wrong := [content for content, number in added.items() if ids.get(content, number) != number]:
        raise UserError(
            f"{folder}: {content} has id {ids[content]} in tokenizer.json, and {added[content]} in "
            "tokenizer_config.json or added_tokens.json; save the tokenizer again"
            for content in wrong[:MOST_SHOWN]
        )
    set_aside = [f"tokenizer.json: {words}" for words in _baked_in(data)]
    set_aside += [f"tokenizer_config.json: {key}" for key in _SET_ASIDE if settings.get(key)]
    templates = {name: path for name, path in side_files(folder).items() if name.endswith(".jinja")}
    for path in templates.values():
        decode(path.read_bytes(), str(path))
    set_aside += templates
    model = {**data["model"], "dropout": None} if "dropout" in data["model"] else data["model"]
    plain = {**data, "truncation": None, "padding": None, "post_processor": None, "model": model}
    lacking = {content: number for content, number in added.items() if content not in ids}
    return TokenizerFiles(folder, plain, ids | lacking, named_tokens(folder), lacking, tuple(set_aside))


def _baked_in(data: Mapping[str, Any]) -> Iterable[str]:
    """What tokenizer.json would do to every text beside cutting it into tokens."""
    if truncation := data.get("truncation"):
        yield f"truncation to {_of(truncation, 'max_length')} tokens"
    if padding := data.get("padding"):
        yield f"padding with {_of(padding, 'pad_token')}"
    if adds := _adds(data.get("post_processor")):
        yield f"{', '.join(adds)} added to every text"
    if dropout := data["model"].get("dropout"):
        yield f"dropout of merges, {dropout}"


def _of(value: Any, key: str) -> Any:
    return value.get(key, "?") if isinstance(value, dict) else "?"


def _adds(processor: Any) -> list[str]:
    """The special tokens that a post-processor puts around a text."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        return [token for part in _rows(processor.get("processors")) for token in _adds(part)]
    if processor.get("type") == "TemplateProcessing":
        parts = [part.get("SpecialToken") for part in _rows(processor.get("single"))]
        return [str(part.get("id")) for part in parts if isinstance(part, dict)]
    return [str(processor[k][0]) for k in ("cls", "sep") if isinstance(processor.get(k), list) and processor[k]]


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that stand beside tokenizer.json, in the order of their ids."""
    further = read_object(folder / "added_tokens.json") or {}
    found = {content: n for content, n in further.items() if isinstance(n, int)}
    decoder = settings.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if (content := _content(token)) is not None and str(number).isdecimal():
            found[content] = int(number)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by role. Raises UserError.

    As transformers reads them, special_tokens_map.json counts first where tokenizer_config.json lists no tokens.
    """
    settings = read_object(folder / "tokenizer_config.json") or {}
    older = read_object(folder / "special_tokens_map.json") or {}
    first, second = (settings, older) if "added_tokens_decoder" in settings else (older, settings)
    both = {role: _content(first.get(role)) or _content(second.get(role)) for role in NAMED}
    return {role: content for role, content in both.items() if content is not None}


def end_of(files: TokenizerFiles) -> tuple[str, int]:
    """The token that ends every document and completion, and its id. Raises UserError where there is none."""
    where, found = files.folder / "tokenizer_config.json", files.named.get("eos_token")
    if found is None:
        raise UserError(f'{where}: names no eos_token, which ends every document; add "eos_token": "TOKEN" there')
    if found not in files.ids:
        raise UserError(f"{where}: eos_token {found} is not in tokenizer.json; name one that is")
    if found.isalnum() and found in _pieces(files.json):
        raise UserError(
            f"{where}: eos_token {found} is a plain word, which would end a document wherever a text has it; name a "
            "token that no text spells, such as <eos>"
        )
    return found, files.ids[found]


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def vocabulary(folder: Path) -> dict[str, int]:
    """Token to id, of a tokenizer.json; empty where there is none. Raises UserError."""
    data = read_object(folder / "tokenizer.json")
    return {} if data is None else vocabulary_of(data, folder)


def _pieces(data: Mapping[str, Any]) -> set[str]:
    """What the model of a tokenizer.json can make of plain text."""
    vocab = data["model"]["vocab"]
    return set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}


def vocabulary_of(data: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Token to id, of what the tokenizer.json of `folder` holds. Raises UserError."""
    try:
        vocab = data["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        if all(type(number) is int for number in ids.values()):
            return ids
        raise ValueError
    except (KeyError, TypeError, ValueError):
        problem = "no vocabulary in it; is it a tokenizer of Hugging Face?"
        raise UserError(f"{folder / 'tokenizer.json'}: {problem}") from None
