"""What `labels.json` of the cells of a fine-tuning says, in sentences: which labels were unknown, and how they were treated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.domains.label_files.base import COUNTS

COUNTED = {**COUNTS, "rater_ties": "voxels where no value leads among the raters: uncertain, out of loss and scores"}


def label_sentences(out: Path) -> list[str]:
    """Return what was counted in the label maps of the cases of a folder of cells, or of one cell; empty where nothing was.

    Args:
        out: Folder with `cells/*/labels.json`, or with `labels.json`.
    """
    cases: dict[str, Mapping[str, Any]] = {}
    for path in [*sorted(out.glob("cells/*/labels.json")), out / "labels.json"]:
        if path.is_file():
            cases.update(json.loads(path.read_text())["cases"])
    partial = sum(case["labelled"] is not None for case in cases.values())
    found = []
    if partial:
        found.append(
            f"{_cases(partial)} not every structure labelled: where one is not, it may be background in the loss, and there is no score of it"
        )
    for name in sorted({name for case in cases.values() for name in case["counts"]}):
        numbers = [int(case["counts"][name]) for case in cases.values() if case["counts"].get(name)]
        if numbers:
            found.append(f"{_cases(len(numbers))} {sum(numbers)} {COUNTED.get(name, name.replace('_', ' '))}")
    if unverified := sum("frame_unverified" in case["flags"] for case in cases.values()):
        found.append(f"{_cases(unverified)} a label map whose frame of reference could not be compared with that of the image")
    return found


def _cases(n: int) -> str:
    return f"{n} case has" if n == 1 else f"{n} cases have"
