"""YAML files that people write (recipes, data cards): sections that refuse unknown keys, and faults as sentences.

A fault is one sentence that starts with the dotted path of the key, and all faults of a file are reported together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from medssl.errors import FaultsError, near_or_all

REQUIRED_MARK = "???"  # what a human must still give


class Node(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as people write it; YAML 1.1 wants 1.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML without running anything it holds."""
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader


def read_mapping(path: Path | str, error: type[FaultsError], *, what: str, absent: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping.

    Args:
        path: The file.
        error: Class to raise.
        what: What the file should be: `a recipe`.
        absent: What to do when there is no such file.

    Raises:
        FaultsError: As `error`, saying what is wrong with the file.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise error([f"{path}: {err.strerror}; {absent}"]) from err
    except UnicodeDecodeError as err:
        raise error([f"{path}: not UTF-8 text; save it as UTF-8"]) from err
    except yaml.YAMLError as err:
        raise error([f"{path}: not valid YAML ({' '.join(str(err).split())})"]) from err
    if not isinstance(raw, dict):
        raise error([f"{path}: {what} is a YAML mapping of sections; found {type(raw).__name__}"])
    return raw


def shipped_folder(name: str) -> Path | None:
    """Return a folder of files that come with medssl: beside the package in a checkout, under share/ when installed."""
    import medssl

    folders = (Path(medssl.__file__).parents[1] / name, Path(sys.prefix) / "share" / "medssl" / name)
    return next((folder for folder in folders if folder.is_dir()), None)


def marked(value: Any, path: str = "") -> list[str]:
    """Return the dotted paths whose value is still `???`."""
    if value == REQUIRED_MARK:
        return [path]
    if isinstance(value, Mapping):
        return [found for key, child in value.items() for found in marked(child, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [found for i, child in enumerate(value) for found in marked(child, f"{path}.{i}")]
    return []


def fault(model: type[BaseModel], error: Any, *, short_keys: Sequence[str] = (), missing: str = "required and missing") -> str:
    """Turn one pydantic error into a sentence that starts with the dotted path.

    Args:
        model: What was validated.
        error: One of `ValidationError.errors()`.
        short_keys: Keys of the file that are no fields of the model, for near matches at the top.
        missing: What to say of a missing key.
    """
    # names of validators and of union members are no keys
    location = tuple(part for part in error["loc"] if "[" not in str(part) and not str(part).startswith("function-"))
    path = ".".join(str(part) for part in location) or "file"
    kind = error["type"]
    if kind == "extra_forbidden":
        known = known_keys(model, location[:-1]) + (list(short_keys) if len(location) == 1 else [])
        return f"{path}: unknown key{near_or_all(str(location[-1]), known)}"
    if kind == "missing":
        return f"{path}: {missing}"
    if kind == "value_error":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}; found {error['input']!r}"


def known_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys that are allowed at a place in a file."""
    here: type[BaseModel] | None = model
    for part in location:
        if here is not None and str(part) in here.model_fields:  # else an entry of a dict or list of sections: same model
            here = _section_of(here.model_fields[str(part)].annotation)
    return [] if here is None else list(here.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as `dict[str, SourceSection]` or `OptimSection | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in getattr(annotation, "__args__", ()) if (found := _section_of(argument)) is not None), None)
