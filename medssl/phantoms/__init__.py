"""Labelled phantoms: what `medssl demo` and the tests run on when no data are given."""

from medssl.phantoms.body import ORGAN_NAMES, Phantom, draw_phantom, labelled_toy_phantoms, phantom_volume, toy_phantoms
from medssl.phantoms.cohort import make_cohort

__all__ = [
    "ORGAN_NAMES",
    "Phantom",
    "draw_phantom",
    "labelled_toy_phantoms",
    "make_cohort",
    "phantom_volume",
    "toy_phantoms",
]
