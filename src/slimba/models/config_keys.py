"""Reading a config's keys one by one, with their types checked; for `models/configs.py`. No torch.

Tests: `pytest tests/models/test_configs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimba.errors import UserError

__all__ = ["Keys"]


class Keys:
    """A config's keys, taken one by one with their type checked. What is left over was not understood."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.left, self.where = dict(data), where

    def take(self, name: str, default: Any) -> Any:
        value = self.left.pop(name, None)
        return default if value is None else value

    def whole(self, name: str, default: int) -> int:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise UserError(f"{self.where}: {name} is {value!r}, it must be a whole number")
        return int(value)

    def number(self, name: str, default: float) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {name} is {value!r}, it must be a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {value!r}, it must be true or false")
        return value

    def limits(self, name: str) -> tuple[float, float]:
        """A pair of numbers; infinity also in transformers' spelling {"__float__": "Infinity"}."""
        value = self.take(name, (0.0, math.inf))
        try:
            low, high = (float(v["__float__"]) if isinstance(v, Mapping) else float(v) for v in value)
        except (TypeError, ValueError, KeyError):
            raise UserError(f"{self.where}: {name} is {value!r}, it must be two numbers") from None
        if not low <= high:
            raise UserError(f"{self.where}: {name} is {value!r}, its first number must not be above its second")
        return low, high

    def refuse(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        """UserError for a key of `table` that is switched on; the others are taken away."""
        for name, off in table.items():
            if name in self.left and self.left.pop(name) not in off:
                raise UserError(f"{self.where}: {name} changes the network in a way that Slimba does not support")

    def silu_only(self, name: str) -> None:
        act = self.take(name, "silu")
        if act not in ("silu", "swish"):
            raise UserError(f"{self.where}: {name} is {act!r}, Slimba's networks have only silu")

    def expanded(self, d_model: int) -> int:
        """d_inner = expand * d_model."""
        d_inner = self.number("expand", 2) * d_model
        if d_inner != int(d_inner) or d_inner < 1:
            raise UserError(f"{self.where}: expand times the model width {d_model} is {d_inner}, not a whole number")
        return int(d_inner)

    def token_ids(self, defaults: tuple[int | None, ...]) -> dict[str, Any]:
        """bos, eos and pad ids (the first of a list), and whether a prompt starts with bos. null means none."""
        out: dict[str, Any] = {}
        for name, default in zip(("bos_token_id", "eos_token_id", "pad_token_id"), defaults, strict=True):
            value = self.left.pop(name, default)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(f"{self.where}: {name} is {value!r}, it must be a token id")
            out[name] = value
        out["add_bos"] = self.flag("add_bos_token", False)
        return out
