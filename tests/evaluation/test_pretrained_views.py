"""Views of a source against those that weights were pretrained with."""

from __future__ import annotations

from typing import Any

import pytest

from medssl.errors import RequestError
from medssl.evaluation.pretrained_views import refuse_unlike, unlike_views

WEIGHTS: dict[str, Any] = {
    "encoder": {"name": "segresnet3d", "args": {}},
    "axis_order": "XYZ-RAS",
    "intensity": {"normalize": {"window": [-160, 240]}},
    "spacing_mm": [4.0, 4.0, 4.0],
    "spacing_source": "views",
}
SAME = {"normalize": {"window": [-160, 240]}, "spacing_mm": 4.0}


@pytest.mark.parametrize(
    "views",
    [
        SAME,
        {**SAME, "spacing_mm": 4},
        {**SAME, "spacing_mm": (4, 4, 4.2)},  # scanners that are set to 4 mm say 4.2
        {**SAME, "normalize": {"window": (-160.0, 240.0)}},
        {"kind": "image", "normalize": {"window": [-160, 240]}},  # pictures have no voxels to be unlike
    ],
)
def test_same_views_in_another_form__are_no_difference(views: dict[str, Any]) -> None:
    assert unlike_views(WEIGHTS, views) == []


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ({**SAME, "spacing_mm": 2}, "ask for 2 x 2 x 2 mm"),
        ({**SAME, "spacing_mm": [4, 4, 1]}, "ask for 4 x 4 x 1 mm"),
        ({**SAME, "spacing_mm": None}, "spacing_mm is null"),
        ({**SAME, "normalize": {"window": [-160, 250]}}, "250"),
        ({**SAME, "normalize": "zscore"}, "the settings say zscore"),
    ],
)
def test_other_views__are_refused_unless_forced(views: dict[str, Any], said: str) -> None:
    found = unlike_views(WEIGHTS, views)
    assert len(found) == 1 and said in found[0] and refuse_unlike(found, True) == found
    with pytest.raises(RequestError, match=r"force: true"):
        refuse_unlike(found, False)


def test_unknown_facts__are_nothing_to_differ_from() -> None:
    imported = {"encoder": WEIGHTS["encoder"], "intensity": {"normalize": None}, "spacing_mm": None}
    assert unlike_views(imported, SAME) == []
    measured = {**WEIGHTS, "spacing_source": "median of the items"}
    assert unlike_views(measured, {**SAME, "spacing_mm": None}) == []
    assert "ZYX-SAR" in unlike_views({**WEIGHTS, "axis_order": "ZYX-SAR"}, SAME)[0]
