"""The recipe's JSON schema, for editors, and its reference in Markdown: both made from the dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from launcher import configs
from launcher.configs import CONFIGS, Resources, default_of
from launcher.recipe.load import STAGE_KINDS, TOP_KEYS
from launcher.spec import encode, tag_of

_TOP: dict[str, Any] = {
    "name": {"type": "string", "description": "Name of the run; default: the file's name."},
    "description": {"type": "string", "description": "One line for `prism-launch recipes`."},
    "base": {
        "description": "Recipes that this one changes; later ones and this one win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
    "model": {"description": "The model of every train stage: a name in recipes/models, a .yaml file or a mapping."},
    "seed": {"type": "integer", "default": 0, "description": "Seed of every stage that names none."},
    "secrets": {
        "type": "array",
        "items": {"type": "string"},
        "description": "Variables of the submitting shell that the stages need, such as HF_TOKEN: names, never values.",
    },
    "matrix": {
        "type": "object",
        "description": "Keys as for --set, each with a list of values; one run a combination, at most 1,000.",
        "additionalProperties": {"type": "array", "minItems": 1},
    },
}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe."""
    stages = {kind: _stage_schema(kind) for kind in STAGE_KINDS}
    choose = [
        {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": {"$ref": f"#/$defs/{kind}"}}
        for kind in STAGE_KINDS
    ]
    stage = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": list(STAGE_KINDS)}},
        "allOf": choose,
    }
    top = {**_TOP, "resources": {"$ref": "#/$defs/Resources"}}
    top["model"] = {**_TOP["model"], "anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelConfig"}]}
    top["stages"] = {"type": "object", "minProperties": 1, "additionalProperties": stage}
    assert set(top) == set(TOP_KEYS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "prism-launch recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {key: top[key] for key in TOP_KEYS},
        "$defs": {**stages, **_definitions()},
    }


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The dataclasses that a type leaves the choice of; one is no choice."""
    args = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(arg for arg in args if dataclasses.is_dataclass(arg))


def _dataclasses() -> list[type]:
    """The parts of stages, in the order in which `launcher.configs` has them; not what alternatives share."""
    found = [v for v in vars(configs).values() if dataclasses.is_dataclass(v) and isinstance(v, type)]
    whole = {cls for kind in CONFIGS.values() for cls in alternatives(kind)}
    return [cls for cls in found if cls not in whole and not any(cls in other.__mro__[1:] for other in found)]


def _definitions() -> dict[str, Any]:
    return {cls.__name__: _object_schema(cls) for cls in _dataclasses()}


def _stage_schema(kind: str) -> dict[str, Any]:
    classes = alternatives(CONFIGS[kind])
    if len(classes) == 1:
        return _one_stage_schema(kind, classes[0])
    return _choice(classes, lambda cls: _one_stage_schema(kind, cls))


def _choice(classes: typing.Sequence[Any], schema_of: typing.Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Alternatives: told apart by their tag, so that an editor names the keys of the one that is meant."""
    tag = tag_of(classes)
    if tag is None:
        return {"anyOf": [schema_of(cls) for cls in classes]}
    values = {cls: typing.get_args(typing.get_type_hints(cls)[tag]) for cls in classes}
    return {
        "type": "object",
        "required": [tag],
        "properties": {tag: {"enum": [value for cls in classes for value in values[cls]]}},
        "allOf": [
            {
                "if": {"properties": {tag: {"enum": list(values[cls])}}, "required": [tag]},
                "then": schema_of(cls),
            }
            for cls in classes
        ],
    }


def _one_stage_schema(kind: str, cls: Any) -> dict[str, Any]:
    schema = _object_schema(cls)
    common = {
        "kind": {"const": kind},
        "seed": {"type": "integer", "description": "Seed of this stage; default: the recipe's."},
        "resources": {"$ref": "#/$defs/Resources"},
    }
    properties = {**common, **schema["properties"]}
    if kind == "train":
        properties["model"] = {**_TOP["model"], "anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelConfig"}]}
        schema["required"].remove("model")
    return {**schema, "properties": properties, "required": ["kind", *schema["required"]]}


def _object_schema(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {}
    for f in dataclasses.fields(cls):
        schema = {**_type_schema(hints[f.name]), "description": f.metadata.get("doc", "")}
        default = default_of(f)
        if default is not dataclasses.MISSING:
            schema["default"] = encode(default)
        properties[f.name] = schema
    required = [f.name for f in dataclasses.fields(cls) if default_of(f) is dataclasses.MISSING]
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {
        "type": "object",
        "description": summary,
        "additionalProperties": False,
        "properties": properties,
        "required": required,
    }


def _type_schema(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        classes = alternatives(hint)
        if len(classes) > 1:
            return _choice(classes, _type_schema)
        return {"anyOf": [_type_schema(a) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}  # type: ignore[union-attr]
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _type_schema(args[0])}
    if origin is tuple:
        items = [_type_schema(a) for a in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return {"type": "object", "additionalProperties": _type_schema(args[1])}
    return {"type": {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}[hint]}


# --------------------------------------------------------------------------------------------------------- reference


def recipe_reference() -> str:
    """Every key of a recipe as Markdown; `docs/recipes.md` holds it."""
    parts = [_INTRODUCTION]
    parts += [f"| `{key}` | {_TOP.get(key, {}).get('description', _LATER.get(key, ''))} |" for key in TOP_KEYS]
    for kind in STAGE_KINDS:
        parts += ["", f"## Stages of kind `{kind}`", "", *_kind_reference(CONFIGS[kind])]
    for cls in [Resources, *(c for c in _dataclasses() if c is not Resources)]:
        parts += ["", f"## {cls.__name__}", "", *markdown_table(cls)]
    return "\n".join(parts) + "\n"


def _kind_reference(hint: Any) -> list[str]:
    """One table; for alternatives one of what they share, then one for each of what it has besides."""
    classes = alternatives(hint)
    if len(classes) == 1:
        return markdown_table(classes[0])
    shared = next(cls for cls in classes[0].__mro__ if all(issubclass(other, cls) for other in classes))
    common = {f.name for f in dataclasses.fields(shared)}
    lines = markdown_table(shared)
    tag = str(tag_of(classes))
    for cls in classes:
        value = typing.get_args(typing.get_type_hints(cls)[tag])[0]
        lines += ["", f"### `{tag}: {value}`", "", *markdown_table(cls, common)]
    return lines


_INTRODUCTION = """# Recipe reference

Made from `launcher/configs/` by `make golden`; `prism-launch schema` prints the same as JSON schema, for editors.

A recipe is YAML whose plain words mean what YAML 1.2 says: only `true` and `false` are booleans, `1e-5` is a number and
`4:00:00` is a time. `--set KEY=VALUE` changes one value by its dotted path; `midtrain.lr` is short for
`stages.midtrain.lr`.

| top-level key | meaning |
|---|---|"""
_LATER = {"resources": "What every stage asks for, unless it says otherwise.", "stages": "The stages by name."}


def markdown_table(cls: Any, without: typing.Collection[str] = ()) -> list[str]:
    """The fields of a config dataclass, with its docstring above; `without` some that stand elsewhere."""
    hints = typing.get_type_hints(cls)
    lines = [" ".join((cls.__doc__ or "").split())]
    own = [f for f in dataclasses.fields(cls) if f.name not in without]
    lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"] if own else []
    for f in own:
        default = default_of(f)
        shown = "**required**" if default is dataclasses.MISSING else f"`{_shown(default)}`"
        lines.append(f"| `{f.name}` | {_type_name(hints[f.name])} | {shown} | {f.metadata.get('doc', '')} |")
    return lines


def _shown(default: Any) -> str:
    import json

    if dataclasses.is_dataclass(default):
        return type(default).__name__ + " defaults"
    return json.dumps(encode(default))


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args)
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"  # type: ignore[union-attr]
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    if origin is not None:
        return f"mapping to {_type_name(args[1])}"
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Any: "anything"}
    return names[hint]
