"""A cohort's folder: there when it is complete, left as it is when it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medssl.errors import RequestError
from medssl.weights import folder_aside


def write_whole(out: Path, record: str, parameters: Mapping[str, Any], write: Callable[[Path], None], *, what: str) -> Path:
    """Write a folder aside and give it its name when it is complete.

    Args:
        out: Folder to make; must not exist, or be empty, or hold the same cohort, which is left as it is.
        record: File in it that holds the parameters.
        parameters: What the cohort follows from, as JSON knows it.
        write: Fills a folder that holds `images` and `labels`.
        what: What to call it in messages.

    Raises:
        RequestError: The folder holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _written_with(out / record) == parameters:
            return out
        raise RequestError(f"{out}: holds something else than this {what}; choose a new folder or remove it")
    with folder_aside(out) as aside:
        (aside / "images").mkdir()
        (aside / "labels").mkdir()
        write(aside)
        (aside / record).write_text(json.dumps(parameters, indent=1) + "\n")
    return out


def _written_with(record: Path) -> Any:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None
