"""The JSON schema for editors agrees with the loader; the reference is what the dataclasses say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.recipe.load import load_recipes
from launcher.recipe.schema import json_schema

CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = dict(load_recipes(CHECKOUT / "recipes" / "demo.yaml")[0].resolved)
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_schema_is_one_and_the_demo_fits_it() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    VALIDATOR.validate(DEMO)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data: Any = copy.deepcopy(DEMO)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data  # type: ignore[no-any-return]


#: Free-form values, which no schema judges, and a name that the loader resolves to a file.
FREE = ("settings", "name", "description", "model")
WRONG = st.sampled_from(["word", True, 3.5, -1, {"strange": 1}, [["x"]]])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([p for p in places(DEMO) if not set(p) & set(FREE)]), WRONG)
def test_what_the_schema_refuses_the_loader_refuses(tmp_path_factory: Any, path: tuple[Any, ...], value: Any) -> None:
    data = changed(path, value)
    if VALIDATOR.is_valid(data):
        return  # the loader may refuse more: ranges and references
    file = tmp_path_factory.mktemp("r") / "r.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(data))))
    with pytest.raises(UserError):
        load_recipes(file)
