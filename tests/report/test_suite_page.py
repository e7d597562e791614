"""The page of a suite: models side by side, nothing from outside, everything escaped."""

from __future__ import annotations

import re
from typing import Any

from medssl.evaluation.suite_rows import MODELS, overall, row_of, skip, tables
from medssl.report.suite_page import suite_page
from tests.report.test_page import Outline


def result() -> dict[str, Any]:
    rows = []
    for place, model in enumerate(MODELS):
        score = {
            "name": model,
            "metric": "auroc",
            "value": 0.5 + 0.1 * place,
            "low": 0.4,
            "high": 0.99,
            "n_images": 60,
            "n_patients": 50,
        }
        rows.append(row_of(score, "frozen", "<finding>", "logistic", main=True))
        empty = {**score, "value": None, "low": None, "high": None}
        rows += [row_of(empty, "fairness", "<finding>", f"by column {k}", subgroup="group_1") for k in range(15)]
    return {
        "encoder": "vit3d",
        "rows": rows,
        "tables": tables(rows, {"ood": [skip("<finding>", "site held out", "no attached labels for site")]}),
        "aggregate": overall(rows),
        "pairs": [{"task": "segmentation: <organs>, 4 labels, dice", "models": ["weights", "scratch"], "difference": -0.01}],
        "comparisons": [
            {
                "tier": "regression",
                "task": "one case",
                "against": "raw_pixels",
                "value": None,
                "low": None,
                "high": None,
                "verdict": "no difference shown",
            },
            {
                "tier": "frozen",
                "task": "<finding>",
                "against": "raw_pixels",
                "value": 0.1,
                "low": 0.05,
                "high": 0.2,
                "verdict": "win",
            },
        ],
        "tasks": {
            "<finding>": {"task": "classification", "cases": {"train": 9, "val": 3, "test": 3}, "classes": ["class_1", "class_2"]}
        },
        "leakage_check": "not checked: other keys",
        "seed": 0,
        "weights": "ab" * 16,
    }


def test_page__shows_every_model_and_every_reason() -> None:
    page = suite_page(result())
    outline = Outline()
    outline.feed(page)
    said = "".join(outline.words)
    assert outline.open == [] and "Over all tasks" in outline.titles
    for word in ("these weights", "scratch twin", "untrained encoder", "raw pixels", "intensity statistics"):
        assert word in said
    assert "skipped: <finding>, site held out: no attached labels for site" in said and "<finding>" not in page
    assert "insufficient" in said and "4 further lines" in said and "could not be checked" in said
    assert "Research only" in said and "these weights minus scratch twin −0.010" in said and "no difference shown" in said
    assert not re.search(r"https?:|//[a-z]|<script|@import|url\(", page) and "default-src 'none'" in page
