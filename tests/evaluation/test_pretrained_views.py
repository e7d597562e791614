"""The rule of views that differ from those of the weights: values are compared, not how they are written."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from medssl.errors import RequestError
from medssl.evaluation import pretrained_views
from medssl.evaluation.pretrained_views import refuse_unlike, unlike_views
from medssl.probe_tasks import refuse_size
from medssl.weights import forced_lines

VOLUMES: dict[str, Any] = {
    "encoder": {"name": "segresnet3d", "args": {}},
    "axis_order": "XYZ-RAS",
    "intensity": {"normalize": {"window": [-1000, 400]}},
    "spacing_mm": [4.0, 4.0, 4.0],
    "spacing_source": "views",
}
WINDOW = {"window": [-1000, 400]}


def found(views: dict[str, Any], **changes: Any) -> list[str]:
    return [one for one in unlike_views({**VOLUMES, **changes}, views) if one is not None]


@pytest.mark.parametrize("spacing", [4, 4.0, [4, 4, 4], (4.0, 4.0, 4.0), [4.2, 4.0, 3.9]])
@pytest.mark.parametrize("window", [[-1000, 400], (-1000.0, 400.0)])
def test_equal_values__are_no_difference_however_they_are_written(spacing: Any, window: Any) -> None:
    assert found({"spacing_mm": spacing, "normalize": {"window": window}}) == []


def test_differences__are_of_intensities_spacing_and_axes() -> None:
    (one,) = found({"spacing_mm": 4.0, "normalize": "zscore"})
    assert one.endswith("the settings say zscore: set normalize: {'window': [-1000, 400]}")
    (one,) = found({"spacing_mm": [4.0, 4.0, 2.0], "normalize": WINDOW})
    assert one == "the weights were pretrained at 4 x 4 x 4 mm, the settings ask for 4 x 4 x 2 mm: set spacing_mm: [4.0, 4.0, 4.0]"
    (one,) = found({"spacing_mm": None, "normalize": WINDOW})
    assert "spacing_mm: null keeps each volume's own" in one
    (one,) = found({"spacing_mm": 4.0, "normalize": WINDOW}, axis_order="ZYX-SAR")
    assert one.startswith("the weights are for images in axis order ZYX-SAR, segresnet3d gets XYZ-RAS here")


def test_what_weights_do_not_say_or_only_summarise__differs_from_nothing() -> None:
    assert found({"spacing_mm": 1.0, "normalize": WINDOW}, spacing_source="median of the items") == []
    assert found({"spacing_mm": 4.0, "normalize": "zscore"}, intensity={}) == []  # imported


def test_pictures__have_no_voxel_size_to_differ_in() -> None:
    image: dict[str, Any] = {"encoder": {"name": "image2d", "args": {}}, "axis_order": "HW", "spacing_mm": [0.5, 0.5]}
    assert found({"kind": "image", "size": 32, "normalize": WINDOW}, **image) == []
    assert len(found({"kind": "image", "size": 32, "normalize": "zscore"}, **image)) == 1


def test_forced__is_warned_of_once_and_refused_where_nobody_forced_it(caplog: pytest.LogCaptureFixture) -> None:
    pretrained_views._warn.cache_clear()
    with pytest.raises(RequestError, match=r"^source\.views: one; two; features would meet other images .* force: true"):
        refuse_unlike(["one", None, "two"], False, "source.views")
    with caplog.at_level(logging.WARNING):
        assert [refuse_unlike(["one", None, "two"], True) for _ in range(3)] == [["one", "two"]] * 3
    assert [record.getMessage() for record in caplog.records] == ["forced: one", "forced: two"]
    said = ["Forced, images differ from those of the pretraining: one."]
    assert forced_lines({"a": ["one"], "b": ["one"], "scratch": []}) == forced_lines(["one", "one"]) == said
    assert forced_lines(None) == forced_lines([]) == []


@pytest.mark.parametrize(
    ("encoder", "views", "fits"),
    [
        ({"name": "image2d", "args": {"model": "test_resnet"}}, {"kind": "image", "size": [32, 64]}, True),
        ({"name": "image2d", "args": {"model": "test_resnet"}}, {"kind": "image", "size": [33, 64]}, False),
        ({"name": "video_vit", "args": {"patch_size": 16}}, {"kind": "clip", "size": 32, "frames": 8, "fps": 10.0}, True),
        ({"name": "video_vit", "args": {"patch_size": 16}}, {"kind": "clip", "size": 32, "frames": 7, "fps": 10.0}, False),
        ({"name": "video_vit", "args": {"patch_size": 16}}, {"kind": "image", "size": 24}, False),
        ({"name": "image2d", "args": {"model": "test_resnet"}}, {"kind": "clip", "size": 32, "frames": 7, "fps": 10.0}, True),
        ({"name": "vit3d", "args": {"patch_size": 8}}, {"size": [32, 32, 20]}, False),
    ],
)
def test_sizes__are_those_that_the_encoder_takes(encoder: dict[str, Any], views: dict[str, Any], fits: bool) -> None:
    if fits:
        refuse_size(encoder, views)
    else:
        with pytest.raises(RequestError, match=r"source\.views\.size: the patch .* does not divide .* for instance \["):
            refuse_size(encoder, views)
