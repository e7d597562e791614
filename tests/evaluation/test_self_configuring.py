"""The self-configuring baseline: its rules on closed examples, and its cells beside those of the other arms."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl import api
from medssl.errors import RequestError
from medssl.evaluation import self_configuring as rules
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import build_network, reader_of
from medssl.evaluation.label_curve import deals, label_curve, markdown, presence
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.self_configuring import ARM, Fingerprint, configure, crop_size, fingerprint, plan, said, topology
from medssl.evaluation.volumes import Volume
from medssl.networks.segmentation import encoder_tensors
from medssl.recipe import FinetuneTargetsRecipe
from tests.evaluation.tiny_cohort import TINY_ENCODER, tiny_volume, write_cohort, write_nifti

SETTINGS = FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), steps=2, warmup_steps=0, figures=0)


def of(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], n: int = 3) -> Fingerprint:
    return Fingerprint((spacing_mm,) * n, (shape,) * n)


def volume(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], **more: Any) -> Volume:
    label = np.zeros(shape, np.int16)
    label.flat[:2] = (1, 2)
    image = np.arange(prod(shape), dtype=np.int16).reshape(1, *shape)
    return Volume(image, np.ones(shape, bool), label, spacing_mm, np.eye(4), {}, **more)


def test_isotropic__all_axes_are_halved_together_until_four_voxels() -> None:
    """128 voxels: 64, 32, 16, 8, 4."""
    found = plan(of((128, 128, 128), (1.0, 1.0, 1.0)), 128**3)
    args = found["encoder"]["args"]
    assert found["crop"] == (128, 128, 128) and found["spacing_mm"] == (1.0, 1.0, 1.0) and found["normalize"] == "zscore"
    assert args["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 5 and args["kernel_sizes"] == [[3, 3, 3]] * 6
    assert args["features_per_stage"] == [32, 64, 128, 256, 320, 320] and args["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert args["n_conv_per_stage_decoder"] == [1] * 5  # preset L, as published


def test_slices_of_5_mm__wait_until_the_others_have_caught_up() -> None:
    """1 x 1 x 5 mm: 2 x 2 x 5, 4 x 4 x 5, then all together; 32 slices have 3 halvings, 128 columns 5."""
    strides, kernels = topology((128, 128, 32), (1.0, 1.0, 5.0))
    assert strides == [(1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert kernels == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    # an axis that cannot be halved any more is not waited for, and keeps its kernel of 3 when the others are coarser
    strides, kernels = topology((64, 64, 4), (1.0, 1.0, 5.0))
    assert strides == [(1, 1, 1)] + [(2, 2, 1)] * 4 and kernels == [(3, 3, 1)] * 2 + [(3, 3, 3)] * 3
    # twice as coarse is still together
    assert topology((16, 16, 16), (1.0, 1.0, 2.0)) == ([(1, 1, 1), (2, 2, 2), (2, 2, 2)], [(3, 3, 3)] * 3)


def test_spacing__is_the_median_and_of_thick_slices_the_tenth_percentile() -> None:
    slices = [3.0, 4.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0, 7.0, 8.0, 8.0]
    thick = Fingerprint(tuple((0.9, 1.1, z) for z in slices), ((100, 100, 20),) * 11)
    assert thick.spacing_mm == pytest.approx((0.9, 1.1, 4.0))  # of eleven values, the second smallest
    mild = Fingerprint(tuple((1.0, 1.0, z) for z in (1.0, 2.0, 3.0, 3.0)), ((100, 100, 20),) * 4)
    assert mild.spacing_mm == (1.0, 1.0, 2.5)
    mixed = Fingerprint(((1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 2.0)), ((10, 10, 40), (20, 20, 20), (30, 30, 10)))
    assert mixed.shape == (20, 20, 20)  # 40 slices of 1 mm are 20 of 2 mm


@pytest.mark.parametrize(
    ("shape", "budget", "expected"),
    [
        ((128, 128, 128), 96**3, (96, 96, 96)),
        ((20, 20, 20), 10**6, (20, 20, 20)),  # halved to 10 and 5
        ((30, 18, 9), 10**6, (32, 20, 10)),  # padded to what can be halved
        ((256, 256, 3), 10**9, (256, 256, 3)),  # 3 slices are not halved
        ((200, 100, 50), 96**3, (192, 96, 48)),  # in proportion
        ((4, 4, 4), 1, (4, 4, 4)),
    ],
)
def test_crop__is_the_median_shape_made_smaller_in_proportion(
    shape: tuple[int, int, int], budget: int, expected: tuple[int, int, int]
) -> None:
    assert crop_size(shape, budget) == expected


@pytest.mark.parametrize("seed", range(6))
def test_every_plan__fits_its_network_and_its_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        shape, spacing = tuple(rng.integers(8, 500, 3).tolist()), tuple(np.exp(rng.uniform(-1.5, 2.5, 3)).tolist())
        crop = crop_size(shape, 48**3)
        strides, kernels = topology(crop, spacing)
        factors = np.prod(strides, axis=0)
        assert prod(crop) <= 48**3 and not np.any(np.array(crop) % factors)
        left = np.array(crop) // factors
        assert np.all((left >= 4) & (left < 8)) and strides[0] == (1, 1, 1)
        assert all(max(stride) == 2 for stride in strides[1:])
        for axis in range(3):
            own = [kernel[axis] for kernel in kernels]
            assert own == sorted(own), "once 3, a kernel stays 3"


def test_plan__builds_a_network_of_its_crop() -> None:
    found = plan(of((24, 24, 8), (1.0, 1.0, 5.0)), 24 * 24 * 8)
    settings = replace(SETTINGS, **found)
    assert settings.crop == (24, 24, 8)
    network = build_network(settings, n_classes=3, seed=0)
    shapes = {key: tuple(network.state_dict()[name].shape) for key, name in encoder_tensors(network).items()}
    assert shapes["encoder.stem.convs.0.conv.weight"] == (32, 1, 3, 3, 1)
    text = said(4, json.loads(json.dumps(found)))
    assert (
        "4 training cases: voxels of 1 x 1 x 5 mm, crop 24 x 24 x 8" in text
        and "4 stages, the last one 4 x 4 x 2 times smaller" in text
    )
    assert "kernels 3 x 3 x 1, 3 x 3 x 1 in the first 2 stages, then 3, z-score of each image." in text


def test_ct__has_percentiles_of_the_structures_of_all_cases() -> None:
    first, second = volume((4, 4, 8), (1.0, 1.0, 2.0)), volume((6, 4, 8), (1.0, 1.0, 2.0))
    found = fingerprint([first, replace(second, image=second.image + 100)], ct=True)
    assert found.window == pytest.approx(tuple(np.percentile([0, 1, 100, 101], (0.5, 99.5))))
    assert found.shapes == ((4, 4, 8), (6, 4, 8)) and fingerprint([first]).window is None
    normalize = plan(replace(found, shapes=((16, 16, 16),) * 2), 16**3)["normalize"]
    assert normalize == {"window": list(found.window or ())}
    assert "percentiles 0.5 and 99.5 of the structures" in said(2, plan(replace(found, shapes=((16, 16, 16),) * 2), 16**3))
    facts = json.dumps(found.facts())
    assert json.loads(facts)["shape"] == [5, 4, 8] and json.loads(facts)["n"] == 2


def test_what_admits_no_plan__is_said() -> None:
    with pytest.raises(RequestError, match=r"no labelled training case.*mark labelled cases as train"):
        fingerprint([])
    with pytest.raises(RequestError, match="no label map"):
        fingerprint([replace(volume((8, 8, 8), (1.0, 1.0, 1.0)), label=None)])
    with pytest.raises(RequestError, match="background only"):
        fingerprint([replace(volume((8, 8, 8), (1.0, 1.0, 1.0)), label=np.zeros((8, 8, 8), np.int16))], ct=True)
    with pytest.raises(RequestError, match="a case is a picture"):
        fingerprint([volume((8, 8, 1), (1.0, 1.0, 1.0), picture=True)])
    with pytest.raises(RequestError, match=r"crop \[16, 16\] is of pictures.*self_configuring: false"):
        rules.starting_point(replace(SETTINGS, crop=(16, 16), domain="xray"))
    with pytest.raises(RequestError, match=r"no axis of it has the 8 voxels.*give larger volumes or a larger crop"):
        plan(of((7, 7, 7), (1.0, 1.0, 1.0)), 10**6)
    classes: dict[str, Any] = {"source": {"index": "x", "domain": "mri", "views": {}}, "table": "x.csv", "target": "x"}
    recipe = FinetuneTargetsRecipe(task="classification", **classes)
    with pytest.raises(RequestError, match="the recipe is of classification"):
        api.label_curve(recipe, None, counts=[1], seeds=[0], self_configuring=True)


def test_fingerprint__is_of_the_training_cases_of_the_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case v0 has thick slices, and is the last of three training cases: it enters the plan of 3 labels, not that of 1."""
    monkeypatch.setattr(rules, "FIRST_WIDTH", 8)  # quicker
    folder = write_cohort(tmp_path / "cohort", train=3, val=1, test=2)
    image, label = tiny_volume(0)
    for kind, array in (("images", image), ("labels", label)):
        write_nifti(folder / kind / "v0.nii.gz", array, (1.0, 1.0, 4.0))
    cohort = Cohort.load(folder)
    seen: list[list[str]] = []

    def recorded(cases: Any, *rest: Any) -> rules.Plan:
        seen.append([case.id for case in cases])
        return configure(cases, *rest)

    start = rules.starting_point(SETTINGS)
    arms: dict[str, Any] = {ARM: None}
    summary = label_curve(cohort, start, tmp_path / "out", arms=arms, counts=[1, 3], seeds=[0], configure=recorded)
    assert [len(cases) for cases in seen] == [1, 3] and set(seen[0]) < set(seen[1]) == {case.id for case in cohort.split("train")}
    few, all_of_them = summary["plans"]
    assert few["labels"] == 1 and few["settings"]["spacing_mm"] == [1.0, 1.0, 2.0] and few["settings"]["crop"] == [16, 16, 16]
    assert few["fingerprints"] == [{"n": 1, "spacing_mm": [1.0, 1.0, 2.0], "shape": [20, 18, 16], "foreground": None}]
    assert all_of_them["fingerprints"][0]["n"] == 3 and all_of_them["cells"] == 1
    cell = json.loads((tmp_path / "out" / "cells" / f"{ARM}_n1_s0" / "results.json").read_text())
    assert cell["settings"]["encoder"] == few["settings"]["encoder"] and cell["settings"]["network"] == "resenc_unet"
    assert {name: cell["settings"][name] for name in ("steps", "batch", "lr", "warmup_steps", "foreground", "overlap")} == {
        name: getattr(SETTINGS, name) for name in ("steps", "batch", "lr", "warmup_steps", "foreground", "overlap")
    }
    assert cell["arm"] == ARM and [case["id"] for case in cell["cases"]] == [case.id for case in cohort.split("test")]
    assert few["sentence"] in markdown(summary) and set(json.loads((tmp_path / "out" / "plans.json").read_text())) == {
        f"{ARM}_n1_s0",
        f"{ARM}_n3_s0",
    }
    again = label_curve(cohort, start, tmp_path / "out", arms=arms, counts=[1, 3], seeds=[0], configure=configure)
    assert again == summary
    monkeypatch.setattr(rules, "SMALLEST_MAP", 2)
    with pytest.raises(RequestError, match=r"planned otherwise \(encoder.*choose another folder"):
        label_curve(cohort, start, tmp_path / "out", arms=arms, counts=[1, 3], seeds=[0], configure=configure)


def test_folds__are_planned_by_their_own_training_cases(tmp_path: Path) -> None:
    cohort = Cohort.load(write_cohort(tmp_path / "cohort", train=6, val=0, test=0), every=True)
    seen: list[list[str]] = []

    def recorded(cases: Any, *_: Any) -> rules.Plan:
        seen.append([case.id for case in cases])
        if len(seen) == 6:
            raise RequestError("seen enough")
        return rules.Plan(of((16, 16, 16), (1.0, 1.0, 1.0)), {})

    arms: dict[str, Any] = {ARM: None}
    with pytest.raises(RequestError, match="seen enough"):
        label_curve(
            cohort,
            rules.starting_point(SETTINGS),
            tmp_path / "out",
            arms=arms,
            counts=[2],
            seeds=[0, 1],
            folds=3,
            configure=recorded,
        )
    present = presence(cohort, reader_of(SETTINGS))
    dealt = deals(replace(cohort, structures={1: "structure_1", 2: "structure_2"}), 3, [0, 1], present)
    assert seen == [[case.id for case in one.first(2)] for one in dealt.values()]
    tested = [{case.id for case in one.split("test")} for one in dealt.values()]
    assert not any(set(cases) & own for cases, own in zip(seen, tested))
    assert not (tmp_path / "out").exists()


def test_volumes_too_small__are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", train=1, val=0, test=1)
    for number in range(2):
        image, label = tiny_volume(number)
        write_nifti(folder / "images" / f"v{number}.nii.gz", image[:7, 4:11, 4:11])
        write_nifti(folder / "labels" / f"v{number}.nii.gz", np.minimum(label[:7, 4:11, 4:11], 1))
    cohort = Cohort.load(folder)
    start = rules.starting_point(SETTINGS)
    with pytest.raises(RequestError, match="8 voxels that halving takes"):
        label_curve(cohort, start, tmp_path / "out", arms={ARM: None}, counts=[1], seeds=[0], configure=configure)
    assert not (tmp_path / "out").exists()


def test_ct__is_trained_and_scored_in_the_window_of_its_structures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "FIRST_WIDTH", 8)  # quicker
    folder = write_cohort(tmp_path / "cohort", train=2, val=0, test=1)
    for number in range(3):
        image, _ = tiny_volume(number)
        write_nifti(folder / "images" / f"v{number}.nii.gz", (image - 1000).astype(np.int16))
    cohort = Cohort.load(folder)
    start = replace(rules.starting_point(SETTINGS), domain="ct", steps=1)
    summary = label_curve(cohort, start, tmp_path / "out", arms={ARM: None}, counts=[2], seeds=[0], configure=configure)
    low, high = summary["plans"][0]["settings"]["normalize"]["window"]
    # structures have 500 and 800, less 1000, with noise of 20
    assert -570 < low < -520 and -180 < high < -130
    assert summary["rows"][0]["n_test"] == 1
