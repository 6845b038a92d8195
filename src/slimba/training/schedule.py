"""Schedules, all driven by the optimiser step (never by a call counter, see DF-SSM's defect in docs/decisions.md)."""

from __future__ import annotations

import math

from slimba.errors import UserError

__all__ = ["DECAYS", "fade", "lr_factor"]

DECAYS = ("linear", "cosine", "constant")


def lr_factor(step: int, total: int, warmup: float, decay: str) -> float:
    """Learning-rate factor of step `step` (from 0) of `total`: linear warm-up over the fraction `warmup`, decay."""
    if decay not in DECAYS:
        raise UserError(f"unknown decay {decay!r}, known are {', '.join(DECAYS)}")
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    rest = (step - ramp) / max(1, total - ramp)
    if decay == "linear":
        return 1.0 - rest
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * rest))
    return 1.0


def fade(step: int, total: int, until: float) -> float:
    """1 at the start, falling linearly to 0 at the fraction `until` of the steps."""
    return max(0.0, 1.0 - step / (until * total)) if until > 0 else 0.0
