"""What `labels.json` of the cells of a fine-tuning says, in sentences: which labels were unknown, and how they were treated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.domains.label_files.base import COUNTS

COUNTED = {
    **COUNTS,
    "rater_ties": "voxels where no value leads among the raters: uncertain, out of loss and scores",
    "uncertain_voxels": "uncertain voxels: out of loss and scores",
}


def label_sentences(out: Path) -> list[str]:
    """Return what was counted in the label maps of the cases of a folder of cells, or of one cell; empty where nothing was.

    Args:
        out: Folder with `cells/*/labels.json`, or with `labels.json`. A file that cannot be read says nothing: no result hangs on it.
    """
    cases: dict[str, Mapping[str, Any]] = {}
    names: dict[int, str] = {}
    for path in [*sorted(out.glob("cells/*/labels.json")), out / "labels.json"]:
        content = _read(path)
        cases |= content.get("cases", {})
        names |= {int(value): str(name) for value, name in content.get("structures", {}).items()}
    found = _partial([case["labelled"] for case in cases.values() if case["labelled"] is not None], names)
    for name in sorted({name for case in cases.values() for name in case["counts"]}):
        numbers = [int(case["counts"][name]) for case in cases.values() if case["counts"].get(name)]
        if numbers:
            found.append(f"{_cases(len(numbers))} {sum(numbers)} {COUNTED.get(name, name.replace('_', ' '))}")
    if unverified := sum("frame_unverified" in case["flags"] for case in cases.values()):
        found.append(f"{_cases(unverified)} a label map whose frame of reference could not be compared with that of the image")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # most cells have none
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("cases"), dict) else {}


def _partial(labelled: Sequence[Sequence[int]], names: Mapping[int, str]) -> list[str]:
    """Return the sentence on cases that leave structures unlabelled; files of an earlier medssl do not say which structures there are."""
    lacking = [set(names) - set(values) for values in labelled if not names or set(names) - set(values)]
    if not lacking:
        return []
    of = Counter(value for values in lacking for value in values)
    which = f" (without {', '.join(f'{names[value]}: {of[value]}' for value in sorted(of))})" if of else ""
    how = "one that is not is one with background in the loss, as nobody knows where it is, and there is no score of it"
    return [f"{_cases(len(lacking))} not every structure labelled{which}: {how}"]


def _cases(n: int) -> str:
    return f"{n} case has" if n == 1 else f"{n} cases have"
