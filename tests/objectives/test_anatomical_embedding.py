"""The dense matcher's objective: its loss against a plain loop, its geometry against the views' own points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.errors import RequestError
from medssl.layers.dense_embedding import DenseEmbedding
from medssl.objectives.anatomical_embedding import AnatomicalEmbedding, Lattice, choose, contrast, lattice
from medssl.testing import check_objective
from medssl.types import StepContext, Views, ViewsMeta
from medssl.views.pipeline import VolumeViews
from tests.views.crops import make_crop

SIZE = (16, 24, 8)


def objective(**changes: Any) -> AnatomicalEmbedding:
    torch.manual_seed(0)
    encoder = SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    given = {"image_size": SIZE, "spacing_mm": (2.0, 2.0, 2.0), "dim": 8, "hard": (20, 10), **changes}
    return AnatomicalEmbedding(encoder, **given)


def pairs(batch: int = 2, seed: int = 0, seeds: int = 12, shift: float = 4.0) -> Views:
    """Two shifted, turned and scaled crops of a smooth volume per sample, made by the views themselves."""
    rng = np.random.default_rng(seed)
    views = VolumeViews(
        "volume",
        size=SIZE,
        spacing_mm=2.0,
        count=2,
        normalize="none",
        rotate_deg=10,
        scale=(0.9, 1.1),
        points={"seeds": seeds, "negatives": 30},
    )
    crops, params = [], []
    for v in range(2):
        for b in range(batch):
            volume = np.random.default_rng(100 + b).normal(size=(1, 40, 50, 30)).astype(np.float32)
            centre = np.array([40.0, 50.0, 30.0]) + rng.uniform(-shift, shift, 3)
            crop = make_crop(volume, (2.0, 2.0, 2.0), views, centre_mm=centre, stats={"min": -1.0})
            crops.append(crop)
            params.append([views.draw(crop.key.__class__(seed, 0, b), v)])
    out = {key: value[:, 0].unflatten(0, (2, batch)).transpose(0, 1) for key, value in views.apply(crops, params, "cpu").items()}
    meta = ViewsMeta("toy", "mri", torch.arange(batch), {}, {}, {"volume": out["valid"]}, ())
    return Views(views.keyed(out), meta)


def plain_loss(model: AnatomicalEmbedding, views: Views) -> dict[str, float]:
    """The formulas of card alice, section 3, cell by cell, and without `Lattice`."""
    found: dict[str, list[float]] = {"fine": [], "coarse": []}
    with torch.no_grad():
        maps = model.head(model.encoder.forward_features(views["volume"].flatten(0, 1)).pyramid)
    for level, stride, embedding in zip(("fine", "coarse"), (2, 4), maps):
        grid = embedding.shape[2:]
        cells = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        for b in range(views.batch_size):
            place: list[list[np.ndarray]] = []
            vector: list[list[np.ndarray]] = []
            for v in range(2):
                m = views["volume_map"][b, v].numpy()
                place.append([m[:, :3] @ (np.array(c) * stride) + m[:, 3] for c in cells])
                vector.append([embedding[2 * b + v, :, c[0], c[1], c[2]].numpy() for c in cells])
            body = views["volume_body"][b, 0].numpy()
            partner = {}
            for i, c in enumerate(cells):
                distances = [float(np.linalg.norm(place[0][i] - other)) for other in place[1]]
                j = int(np.argmin(distances))
                if body[tuple(stride * n for n in c)] and distances[j] < model.positive_mm[level]:
                    partner[i] = j
            eligible = sorted(partner)
            for u in views["volume_seeds"][b, 0].tolist():
                i = eligible[int(u * len(eligible))]
                query, t = vector[0][i], model.temperature
                keys = vector[0] + vector[1]
                far = [bool(np.linalg.norm(place[0][i] - p) > model.ignore_mm[level]) for p in place[0] + place[1]]
                chance = [int(u * len(keys)) for u in views["volume_negatives"][b, 0].tolist()]
                similar = sorted((float(query @ key) for key, use in zip(keys, far) if use), reverse=True)
                negatives = similar[: model.hard[level]] + [float(query @ keys[k]) for k in chance if far[k]]
                positive = math.exp(float(query @ vector[1][partner[i]]) / t)
                found[level].append(-math.log(positive / (positive + sum(math.exp(s / t) for s in negatives))))
    return {level: float(np.mean(losses)) for level, losses in found.items()}


def test_loss__float64_parity_with_a_plain_loop() -> None:
    model = objective(temperature=0.3).double()
    views = pairs()
    views.data["volume"] = views["volume"].double()
    with torch.no_grad():
        parts = model(views, StepContext())
    expected = plain_loss(model, views)
    assert float(parts["fine"]) == pytest.approx(expected["fine"], abs=1e-9)
    assert float(parts["coarse"]) == pytest.approx(expected["coarse"], abs=1e-9)
    assert float(parts["loss"]) == pytest.approx(sum(expected.values()), abs=1e-9)


def test_objective__keeps_the_contract() -> None:
    check_objective(objective(), pairs(batch=3, seeds=30), steps=15, lr=1e-2)


def test_maps__say_where_the_views_took_their_voxels() -> None:
    views = VolumeViews(
        "volume", size=SIZE, spacing_mm=1.5, rotate_deg=20, scale=(0.8, 1.25), flip=0.5, normalize="none", points={}
    )
    volume = np.random.default_rng(0).normal(size=(1, 40, 50, 30)).astype(np.float32)
    crop = make_crop(volume, (1.0, 2.0, 3.0), views, centre_mm=(20.0, 44.0, 41.0))
    out = views.apply([crop], [[views.draw(crop.key, 0)]], "cpu", points=True)
    m, points = out["volume_map"][0, 0].numpy(), out["points_mm"][0, 0].numpy()
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"))
    expected = np.tensordot(m[:, :3], index, 1) + m[:, 3, None, None, None]
    assert np.abs(points - expected).max() < 1e-3


def test_body__is_the_foreground_of_the_domain() -> None:
    from medssl.domains.statistics import foreground, intensity_stats

    volume = np.zeros((1, *SIZE), dtype=np.int16)
    volume[0, 3:12, 4:20, 2:7] = 90 + np.arange(5, dtype=np.int16)
    mask = foreground(volume[0])
    views = VolumeViews("volume", size=SIZE, normalize="zscore", noise_std=1.0, points={})
    crop = make_crop(volume, (1.0, 1.0, 1.0), views, stats=intensity_stats(volume[0], mask))
    out = views.apply([crop], [[views.draw(crop.key, 0)]], "cpu")
    np.testing.assert_array_equal(out["volume_body"][0, 0].numpy(), mask)
    assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize("centres", ["first", "middle"])
def test_lattice__nearest_is_exact(centres: str) -> None:
    cells = lattice((8, 12, 4), 2, centres)
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    view = torch.from_numpy(np.concatenate([turn * [1.0, 2.0, 0.7], rng.normal(size=(3, 1))], axis=1))
    points = (
        torch.from_numpy(rng.uniform(-2, 1, size=(50, 3)) + rng.uniform(0, 1, size=(50, 3)) * [8, 12, 4]) @ view[:, :3].T
        + view[:, 3]
    )
    places = cells.places(view)
    distances = (points[:, None] - places[None]).norm(dim=2)
    number, distance = cells.nearest(points, view)
    inside = torch.isfinite(distance)
    assert 3 < int(inside.sum()) < 47
    assert torch.equal(number[inside], distances.argmin(dim=1)[inside])
    assert torch.allclose(distance[inside], distances.min(dim=1).values[inside])


def test_pick__takes_the_voxel_at_the_centre() -> None:
    voxels = torch.arange(8 * 4 * 6).reshape(8, 4, 6)
    cells = Lattice((4, 2, 3), 2, 0.0)
    at = cells.voxels("cpu").long()
    assert torch.equal(cells.pick(voxels), voxels[at[:, 0], at[:, 1], at[:, 2]])


def test_choose__draws_eligible_numbers_only() -> None:
    eligible = torch.tensor([False, True, False, True, True, False])
    assert choose(torch.tensor([0.0, 0.34, 0.67, 0.999]), eligible).tolist() == [1, 3, 4, 4]
    assert choose(torch.tensor([0.5]), torch.zeros(3, dtype=torch.bool)).tolist() in ([0], [1], [2])


def test_contrast__without_a_negative_is_zero_and_with_equal_ones_is_log() -> None:
    q = torch.nn.functional.normalize(torch.ones(1, 4, dtype=torch.float64), dim=1)
    keys = q.expand(5, 4)
    none = contrast(q, q, keys, torch.zeros(1, 5, dtype=torch.bool), torch.tensor([0, 1]), hard=3, temperature=0.5)
    assert float(none) == 0
    same = contrast(q, q, keys, torch.ones(1, 5, dtype=torch.bool), torch.tensor([0, 1]), hard=3, temperature=0.5)
    assert float(same) == pytest.approx(math.log(1 + 3 + 2))


def test_pairs_without_overlap__count_nothing_and_are_finite() -> None:
    model = objective()
    views = pairs()
    views.data["volume_map"][0, 1, :, 3] += 1000  # the second crop of sample 0 lies elsewhere
    counts = model.denominators(views)
    assert float(counts["fine_seeds"]) == 12
    parts = model(views, StepContext())
    parts["loss"].backward()
    assert torch.isfinite(parts["loss"])
    valid = {"volume": views.meta.valid["volume"][1:]}
    alone = Views({k: v[1:] for k, v in views.data.items()}, ViewsMeta("t", "mri", torch.arange(1), {}, {}, valid, ()))
    with torch.no_grad():
        expected = float(model(alone, StepContext())["loss"])
    assert float(parts["loss"].detach()) == pytest.approx(expected, rel=1e-4)


def test_bad_arguments__are_sentences() -> None:
    with pytest.raises(RequestError, match=r"views.spacing_mm: required by objective anatomical_embedding"):
        objective(spacing_mm=None)
    with pytest.raises(RequestError, match="fine positive_mm is 9 and ignore_mm 4; accepted: 0 < positive_mm <= ignore_mm"):
        objective(positive_mm=[9, 9], ignore_mm=[4, 20])
    with pytest.raises(RequestError, match=r"objective.hard: found 500; accepted is two numbers, \[fine, coarse\]"):
        objective(hard=500)
    with pytest.raises(ValueError, match="fine_stride is 4; accepted: 1, 2"):
        objective(fine_stride=4)
    with pytest.raises(RequestError, match=r"points: a warped view has no linear map"):
        VolumeViews("volume", size=8, warp={}, points={})
    with pytest.raises(RequestError, match=r"points.sed: unknown key \(did you mean"):
        VolumeViews("volume", size=8, points={"sed": 3})
    views, model = pairs(), objective()
    del views.data["volume_map"]
    with pytest.raises(RequestError, match=r"needs two views with points: set views.kind: pair"):
        model(views, StepContext())
    views = pairs()
    views.data["volume_partner"] = torch.tensor([0, 5])
    with pytest.raises(RequestError, match=r"pairs different volumes, .* set sampler.pairs: same_volume"):
        model(views, StepContext())


def test_dense_embedding__has_unit_length_at_both_scales() -> None:
    torch.manual_seed(0)
    head = DenseEmbedding([8, 16, 32], [1, 2, 4], fine_stride=2, dim=12)
    fine, coarse = head([torch.randn(2, c, *(n // s for n in SIZE)) for c, s in ((8, 1), (16, 2), (32, 4))])
    assert fine.shape == (2, 12, 8, 12, 4) and coarse.shape == (2, 12, 4, 6, 2)
    assert torch.allclose(fine.norm(dim=1), torch.ones(()), atol=1e-5) and torch.allclose(
        coarse.norm(dim=1), torch.ones(()), atol=1e-5
    )
