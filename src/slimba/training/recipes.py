"""Recipes: a YAML file with a comment above every key, overrides from the command line, checked against a dataclass.

recipe = load_recipe(DfssmRecipe, file=None, default="dfssm.yaml", overrides=["rank=32"])
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from slimba.errors import UserError

__all__ = ["load_recipe", "parse_overrides", "read_recipe"]

R = TypeVar("R")


def _yaml(text: str, name: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError('recipes need PyYAML; pip install "slimba[train]"') from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(e).split())}") from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["rank=32"]` -> `{"rank": 32}`; the right-hand side is YAML."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair!r} is not of the form key=value")
        out[key.strip()] = _yaml(value, f"--set {pair}")
    return out


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The settings in a recipe file as they stand there, unchecked."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"recipe {path} is not a file")
    data = _yaml(path.read_text("utf-8"), str(path)) or {}
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} must be a mapping of settings")
    return data


def load_recipe(cls: type[R], default: str, file: str | Path | None, overrides: Mapping[str, Any]) -> R:
    """Values of the packaged recipe `default`, then of `file`, then `overrides`; each is checked."""
    values: dict[str, Any] = _yaml(files("slimba.recipes").joinpath(default).read_text("utf-8"), default)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    layers: list[tuple[str, Mapping[str, Any]]] = [(default, dict(values))]
    if file is not None:
        given = read_recipe(file)
        method = given.pop("method", None)
        if method is not None and method != getattr(cls, "METHOD", method):
            raise UserError(f"recipe {file} is for method {method!r}, not {cls.METHOD!r}")  # type: ignore[attr-defined]
        layers.append((str(file), given))
    layers.append(("the settings given", overrides))
    hints = typing.get_type_hints(cls)
    merged: dict[str, Any] = {}
    for where, data in layers:
        for key, value in data.items():
            if key == "method" and where == default:
                continue
            if key not in fields:
                raise UserError(f"unknown setting {key!r} in {where}, known are {', '.join(sorted(fields))}")
            merged[key] = _checked(value, hints[key], f"setting {key} in {where}")
    return cls(**merged)


def _checked(value: Any, hint: Any, what: str) -> Any:
    """`value` as the type of its field; whole numbers are accepted as floats and "1e-3" (YAML's trap) as a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{what} is {value!r}, it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{what} is {value!r}, it must be a list")
        return tuple(_checked(v, args[0], what) for v in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{what} is {value!r}, it must be a number") from None
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{what} is {value!r}, it must be of type {hint.__name__}")
    return value
