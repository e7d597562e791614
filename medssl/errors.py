"""Exception classes. Every message says what was found, what is accepted and what to do next.

No message carries a patient identifier or a source path of an archive: images are named by their series id. Paths that the user typed
on the command line (a recipe, an output folder, a weights file) may be named.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedsslError(Exception):
    """Base of all errors that medssl raises on purpose."""

    exit_code = 1


class RequestError(MedsslError, ValueError):
    """The request is wrong (recipe, arguments, missing extra). Nothing was written. Exit status 2."""

    exit_code = 2


class FaultsError(RequestError):
    """One or more faults of a file that somebody wrote, all reported together.

    Args:
        faults: One sentence each, starting with the dotted path of the key.
    """

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class RecipeError(FaultsError):
    """Faults of a recipe."""


class CardError(FaultsError):
    """Faults of a data card."""


class RegistryError(RequestError, KeyError):
    """An unknown encoder, objective, domain or network name."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ImageError(MedsslError, ValueError):
    """An image that cannot be used; `reason` is a code from the closed vocabulary of the index.

    Args:
        reason: Reason code, for instance `unreadable`, `not_3d`, `constant`, `no_spacing`.
        message: What was found, what is accepted, what to do next.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class GeometryError(ImageError):
    """Geometry that cannot be put on a regular grid, or two images on different grids."""

    def __init__(self, message: str, reason: str = "geometry") -> None:
        super().__init__(reason, message)


class StoreError(MedsslError, OSError):
    """The store could not be written or read; what is already in it stays valid."""


class WeightsError(RequestError):
    """Weights that do not fit the encoder or the network they are loaded into."""


class CheckpointError(MedsslError, RuntimeError):
    """A checkpoint that is incomplete, or that belongs to another run."""


class TrainingStopped(MedsslError, RuntimeError):
    """A monitor stopped the run (collapse, NaN); the message says what to try."""


class LeakageError(RequestError):
    """The same patient or image is in pretraining and in test data."""


def near(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean "x"?)' for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{match[0]}"?)' if match else ""


def near_or_all(name: str, known: Iterable[str]) -> str:
    """Return the closest known name as `near` does, or all known names where none is close."""
    names = list(known)
    return near(name, names) or (f"; accepted are {', '.join(names)}" if names else "")


def header_words(columns: Iterable[str], known: Iterable[str]) -> str:
    """Return the titles of a table's columns for a message, if its first line is a header at all.

    The first line of a table without one holds file names and patients, which no message may quote.
    """
    columns = list(columns)
    if not columns:
        return "none"
    return ", ".join(columns) if set(columns) & set(known) else f"{len(columns)} that are not known here (no header line?)"
