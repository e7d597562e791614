"""The tiers of `medssl evaluate --suite`: each asks one kind of question of the same labelled set, and says what it had to leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medssl.suite_tiers.bench import Bench, Found
from medssl.suite_tiers.curves import classification, detection, segmentation
from medssl.suite_tiers.frozen_features import frozen, retrieval, smoke
from medssl.suite_tiers.groups import fairness
from medssl.suite_tiers.numbers import regression
from medssl.suite_tiers.robustness import ood

__all__ = ["RUN", "Bench", "Found"]

RUN: dict[str, Callable[[Bench, Path], Found]] = {
    "smoke": smoke,
    "frozen": frozen,
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "retrieval": retrieval,
    "regression": regression,
    "ood": ood,
    "fairness": fairness,
}
"""What runs each tier."""
