"""Global and local contrast: formulas, and sanity experiments 8.1, 8.2, 8.4 and 8.6 of the method card with its reference values."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError
from medssl.layers.tokens import flatten_tokens
from medssl.objectives.global_local_contrast import (
    COLLAPSED,
    GlobalLocalContrast,
    contrast_pairs,
    cosines,
    local_loss,
    neighbours,
    off_region_cosine,
    pair_loss,
    partition_of,
    region_centres,
)
from medssl.testing import check_objective
from medssl.training.engine import frozen_names, set_trainable
from medssl.types import EncoderOutput, Part, StepContext, Views, ViewsMeta, ViewSpec

SPECS = {"image": ViewSpec("image", (32, 32), None, 2)}


class PyramidEncoder(nn.Module):
    """Maps of 16, 8 and 4 cells for a view of 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.in_channels, self.patch_size = 16, 1, (8, 8)
        self.net = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((1, 8), (8, 12), (12, 16))
        )

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
        maps = []
        for stage in self.net:
            x = stage(x)
            maps.append(x)
        tokens = flatten_tokens(x)
        return EncoderOutput(tokens, tuple(x.shape[2:]), tokens.mean(dim=1), tuple(maps))

    def part(self, group: str) -> Part:
        return Part(self, {})


def build(**changes: Any) -> GlobalLocalContrast:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"view_specs": SPECS, "dim": 16, "hidden": 32, "decoder_blocks": 2, "decoder_width": 16}
    return GlobalLocalContrast(PyramidEncoder(), **{**arguments, **changes})


def make_slices(batch: int = 8, *, seed: int = 0, noise: float = 0.3) -> Views:
    """Slices of a phantom: a gradient that turns with height, seen twice under other contrasts. Slice b lies in quarter b mod 4."""
    generator = torch.Generator().manual_seed(seed)
    share = (torch.arange(batch) % 4 + torch.rand(batch, generator=generator) * 0.9) / 4
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle = share[:, None, None] * math.pi
    picture = (angle.cos() * x + angle.sin() * y + 0.5 * torch.sin(5 * x) * torch.cos(4 * y))[:, None, None]
    picture = picture + noise * functional.interpolate(torch.randn(batch, 1, 6, 6, generator=generator), size=(32, 32))[:, None]
    contrast = 0.7 + 0.6 * torch.rand(batch, 2, 1, 1, 1, generator=generator)
    views = contrast * picture + 0.3 * torch.randn(batch, 2, 1, 1, 1, generator=generator)
    data = {"image": views, "image_share": share[:, None].expand(batch, 2).clone(), "image_map": torch.ones(batch, 2, 2, 3)}
    valid = torch.ones(batch, 2, 32, 32, dtype=torch.bool)
    return Views(data, ViewsMeta("toy", "mri", torch.arange(batch), {}, {}, {"image": valid}, ()))


def rows(slices: int, views: int, volumes: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slice, volume, part and view of each row, slice by slice."""
    number = torch.arange(slices)
    return (
        number.repeat_interleave(views),
        volumes.repeat_interleave(views),
        parts.repeat_interleave(views),
        torch.arange(views).repeat(slices),
    )


def test_pair_loss__equals_plain_loops() -> None:
    torch.manual_seed(0)
    z = torch.randn(9, 5, dtype=torch.float64)
    positives, negatives = torch.rand(9, 9) < 0.3, torch.rand(9, 9) < 0.5
    negatives[4] = False  # an anchor without negatives
    unit = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in z.tolist()]
    s = [[sum(a * b for a, b in zip(x, y)) / 0.1 for y in unit] for x in unit]
    values = []
    for a in range(9):
        for b in range(9):
            if positives[a, b]:
                against = sum(math.exp(s[a][n]) for n in range(9) if negatives[a, n])
                values.append(-math.log(math.exp(s[a][b]) / (math.exp(s[a][b]) + against)))
    z.requires_grad_(True)
    loss = pair_loss(cosines(z, z) / 0.1, positives, negatives)
    assert float(loss.detach()) == pytest.approx(sum(values) / len(values), rel=1e-9)
    loss.backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("variant", "slices", "views", "against"), [("part_negatives", 12, 3, 27), ("part", 24, 2, 36)])
def test_global__values_of_identical_and_of_separated_embeddings(variant: str, slices: int, views: int, against: int) -> None:
    """Card 8.1: 12 slices x 3 views have 27 negatives, 24 x 2 have 36; ln 28 and ln 37 when all is equal, near 0 when parts separate."""
    parts = torch.arange(slices) % 4
    made = rows(slices, views, torch.arange(slices), parts)
    positives, negatives = contrast_pairs(*made, variant)
    assert negatives.sum(dim=1).tolist() == [against] * (slices * views)
    equal = torch.ones(slices * views, 8)
    assert float(pair_loss(cosines(equal, equal) / 0.1, positives, negatives)) == pytest.approx(math.log(1 + against), rel=1e-5)
    apart = torch.eye(4)[made[2]]
    assert float(pair_loss(cosines(apart, apart) / 0.1, positives, negatives)) < 0.01


def test_local__starts_at_ln_11() -> None:
    """Card 8.1: 10 negatives."""
    near_by = neighbours(region_centres(48, 48))
    equal = torch.ones(2, 13, 8)
    assert float(local_loss(equal, equal, near_by)) == pytest.approx(math.log(11), rel=1e-5)
    apart = torch.eye(13).expand(2, 13, 13)
    assert float(local_loss(apart, apart, near_by)) < 0.01


def test_local__equals_plain_loops() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 13, 6, dtype=torch.float64), torch.randn(2, 13, 6, dtype=torch.float64)
    near_by = neighbours(region_centres(16, 20))
    values = []
    for b in range(2):
        for own, other in ((first[b], second[b]), (second[b], first[b])):
            for a in range(13):

                def s(x: Tensor, anchor: Tensor = own[a]) -> float:
                    return float(anchor @ x / anchor.norm() / x.norm()) / 0.1

                against = sum(math.exp(s(m[n])) for m in (own, other) for n in near_by[a].tolist())
                values.append(-math.log(math.exp(s(other[a])) / (math.exp(s(other[a])) + against)))
    assert len(values) == 52
    assert float(local_loss(first, second, near_by)) == pytest.approx(sum(values) / 52, rel=1e-9)


@pytest.mark.parametrize("partitions", [3, 4, 6])
def test_audit__no_negative_shares_a_partition_and_all_positives_do(partitions: int) -> None:
    """Card 8.2, for any number of partitions."""
    slices = 4 * partitions
    volumes = torch.arange(slices) // partitions
    parts = torch.arange(slices) % partitions
    made = rows(slices, 2, volumes, parts)
    part = made[2]
    for variant in ("part_negatives", "part"):
        positives, negatives = contrast_pairs(*made, variant)
        for a in range(len(part)):
            assert (part[negatives[a]] != part[a]).all() and int(negatives[a].sum()) == 2 * (slices - 4)
            assert (part[positives[a]] == part[a]).all() and not positives[a, a]
        assert not (positives & negatives).any()
        assert positives.sum(dim=1).tolist() == [1 if variant == "part_negatives" else 1 + 3] * len(part)
    positives, negatives = contrast_pairs(*made, "random")
    assert positives.sum(dim=1).tolist() == [1] * len(part) and negatives.sum(dim=1).tolist() == [len(part) - 2] * len(part)


def test_positives__of_part_are_those_of_the_paper() -> None:
    """(x_i, x^_i), (x_j, x^_j), (x_i, x_j), (x^_i, x^_j) in both orders; never x_i with x^_j, never two slices of one volume."""
    made = rows(3, 2, torch.tensor([0, 1, 1]), torch.tensor([2, 2, 2]))
    positives, _ = contrast_pairs(*made, "part")
    pairs = {(int(a), int(b)) for a, b in positives.nonzero()}
    within = {(0, 1), (2, 3), (4, 5)}
    across = {(0, 2), (1, 3), (0, 4), (1, 5)}
    assert pairs == {(a, b) for a, b in within | across} | {(b, a) for a, b in within | across}


def test_within__takes_near_places_for_one_partition() -> None:
    """Card 9: a soft threshold instead of partitions, for volumes that partitions do not suit."""
    place = torch.tensor([0.0, 0.1, 0.3, 0.95])
    made = rows(4, 2, torch.tensor([0, 1, 2, 1]), place)
    positives, negatives = contrast_pairs(*made, "part", 0.25)
    slices, volumes, places, views = (x.tolist() for x in made)
    for a in range(8):
        for b in range(8):
            near = abs(places[a] - places[b]) < 0.25
            pair = (slices[a] == slices[b] and views[a] != views[b]) or (near and volumes[a] != volumes[b] and views[a] == views[b])
            assert bool(positives[a, b]) == pair and bool(negatives[a, b]) == (not near)
    assert positives.sum() == 8 + 2 * 2 * 2  # views of each slice; slices 0-1 and 1-2 in both views, both orders
    together, apart = (
        build(weights={"global": 1.0}, within=w).eval()(make_slices(8), StepContext())["negatives"] for w in (2.0, 0.01)
    )
    assert float(together) == 0 and float(apart) == 14


def test_within__in_mm_goes_by_depth_and_leaves_pictures_out() -> None:
    objective = build(weights={"global": 1.0}, within=20.0, position="mm").eval()
    views = make_slices(8)
    views.data["image_depth"] = (torch.arange(8.0)[:, None] * 15).expand(8, 2).clone()
    parts = objective(views, StepContext())
    assert float(parts["negatives"]) == pytest.approx(2 * sum(sum(abs(a - b) * 15 >= 20 for b in range(8)) for a in range(8)) / 8)
    views.data["image_share"][:4] = float("nan")
    assert float(objective(views, StepContext())["negatives"]) == pytest.approx(2 * (2 + 1 + 1 + 2) / 4)


def test_partition__is_a_function_of_the_place_alone() -> None:
    """Card 8.6: slices may change places within a partition, a reversed volume is another one."""
    share = torch.linspace(0, 1, 16)
    parts = partition_of(share, 4)
    assert parts.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    within = torch.cat([torch.randperm(4) + 4 * p for p in range(4)])
    assert torch.equal(partition_of(share[within], 4), parts)
    assert (partition_of(1 - share, 4) != parts).all()
    assert partition_of(torch.tensor([float("nan"), 1.0, 0.0]), 4).tolist() == [-1, 3, 0]


def test_loss__feels_a_reversed_volume_but_no_change_within_partitions() -> None:
    """Card 8.6."""
    objective = build(weights={"global": 1.0}).eval()
    views = make_slices(8)
    before = float(objective(views, StepContext())["loss"].detach())
    share = views["image_share"].clone()
    views.data["image_share"] = (share * 4).floor() / 4 + 0.1
    assert float(objective(views, StepContext())["loss"].detach()) == before
    views.data["image_share"] = share.clone()
    views.data["image_share"][4:] = 1 - share[4:]
    assert float(objective(views, StepContext())["loss"].detach()) != before


def test_regions__lie_inside_and_do_not_overlap() -> None:
    centres = region_centres(48, 40)
    assert centres.tolist()[:3] == [[1, 1], [1, 20], [1, 38]] and len({tuple(c) for c in centres.tolist()}) == 13
    assert centres.min() == 1 and int(centres[:, 0].max()) == 46
    near_by = neighbours(centres)
    assert near_by.shape == (13, 5) and all(a not in near_by[a].tolist() and len(set(near_by[a].tolist())) == 5 for a in range(13))
    with pytest.raises(RequestError, match="too small for 13 regions"):
        region_centres(14, 14)


def test_embed_regions__looks_at_three_by_three_cells() -> None:
    objective = build(weights={"local": 1.0}).eval()
    maps = torch.randn(1, 16, 16, 16)
    before = objective.embed_regions(maps).detach()
    row, column = objective.centres[10].tolist()
    for offset, felt in ((1, True), (2, False)):
        changed = maps.clone()
        changed[:, :, row + offset, column] += 1
        moved = (objective.embed_regions(changed).detach() - before).abs().sum(dim=-1)[0] > 1e-6
        assert bool(moved[10]) == felt


def test_embed_regions__equals_unfolding_the_whole_map() -> None:
    objective = build(weights={"local": 1.0}).eval()
    maps = torch.randn(2, 16, 16, 16)
    rows = functional.unfold(objective.regions(maps), 3, padding=1)
    place = objective.centres[:, 0] * 16 + objective.centres[:, 1]
    assert torch.equal(objective.embed_regions(maps), objective.region_head(rows[:, :, place].transpose(1, 2)))


def test_local__learns_places_and_a_probe_finds_them() -> None:
    """Card 8.4: a position probe of 13 classes on decoder features rises above 80 %."""
    objective = build(weights={"local": 1.0})
    optimiser = torch.optim.Adam(objective.parameters(), lr=3e-3)
    for step in range(60):
        optimiser.zero_grad()
        parts = objective(make_slices(8, seed=step), StepContext(step=step))
        parts["loss"].backward()
        optimiser.step()
    objective.eval()

    def features(seed: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            maps = objective.decode(make_slices(32, seed=seed)["image"][:, 0])
        found = maps[:, :, objective.centres[:, 0], objective.centres[:, 1]].transpose(1, 2)
        return found.flatten(0, 1), torch.arange(13).repeat(32)

    x, y = features(1000)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    design = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], dim=1)
    weight = torch.linalg.solve(design.T @ design + 1e-2 * torch.eye(design.shape[1]), design.T @ functional.one_hot(y, 13).float())
    x, y = features(2000)
    guess = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], dim=1) @ weight
    assert float((guess.argmax(dim=1) == y).float().mean()) > 0.8
    assert float(parts["loss_local"].detach()) < 0.5 * math.log(11)


def test_collapse__is_seen_by_the_cosine_between_regions() -> None:
    """Card 8.4."""
    torch.manual_seed(0)
    constant = torch.randn(1, 1, 16) + 0.01 * torch.randn(4, 13, 16)
    assert float(off_region_cosine(constant)) > COLLAPSED
    assert abs(float(off_region_cosine(torch.randn(4, 13, 256)))) < 0.1
    assert float(off_region_cosine(torch.eye(13)[None])) == 0


@pytest.mark.parametrize("variant", ["random", "part_negatives", "part"])
def test_contract(variant: str) -> None:
    objective = build(variant=variant)
    parts = objective(make_slices(8), StepContext())
    assert float(parts["negatives"]) == (14 if variant == "random" else 12)
    check_objective(objective, make_slices(8), steps=15)


def test_slices_without_content__stay_out() -> None:
    """Card 8.2: no blank image enters the batch."""
    objective = build().eval()
    whole = make_slices(8)
    views = make_slices(8)
    views.data["image"][2] = 0.0
    views.meta.valid["image"][5] = False
    parts = objective(views, StepContext())
    kept = [0, 1, 3, 4, 6, 7]
    few = Views(
        {key: value[kept] for key, value in whole.data.items()},
        ViewsMeta("toy", "mri", torch.tensor(kept), {}, {}, {"image": whole.meta.valid["image"][kept]}, ()),
    )
    expected = objective(few, StepContext())
    assert float(parts["loss"].detach()) == pytest.approx(float(expected["loss"].detach()), rel=1e-5)
    views.meta.valid["image"][:] = False
    nothing = objective(views, StepContext())
    nothing["loss"].backward()
    assert float(nothing["loss"].detach()) == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_pictures_without_a_place__stay_out() -> None:
    objective = build(weights={"global": 1.0})
    views = make_slices(8)
    views.data["image_share"][:] = float("nan")
    assert float(objective(views, StepContext())["loss"].detach()) == 0
    del views.data["image_share"]
    with pytest.raises(RequestError, match="set variant: random"):
        objective(views, StepContext())
    assert float(build(weights={"global": 1.0}, variant="random")(views, StepContext())["loss"].detach()) > 0


def test_sources_of_pictures__are_refused_where_they_would_train_nothing() -> None:
    both, one, two = (
        build(),
        build(weights={"global": 1.0}),
        {"image": SPECS["image"], "plain": ViewSpec("image", (32, 32), None, 2)},
    )
    flat, mixed, slices = ("image", 6, 6), ("image", 2, 6), ("image", 0, 6)
    with pytest.raises(RequestError, match=r"source x: its items are all pictures .* would train nothing; .* variant: random"):
        one.check_places({"ct": slices, "x": flat})
    with pytest.raises(RequestError, match="source x: its items are all pictures"):  # views for the local term have another key
        build(view_specs=two, local_view="plain").check_places({"ct": slices, "x": flat})
    with pytest.raises(RequestError, match=r"all items of x, y are pictures .* set weights: \{local: 1\}"):
        both.check_places({"x": flat, "y": flat})
    assert both.check_places({"ct": slices, "x": flat}) == [
        "source x: 6 of 6 items are pictures that belong to no volume or clip; the global term leaves them out"
    ]
    assert one.check_places({"ct": slices, "m": mixed}) == [
        "source m: 2 of 6 items are pictures that belong to no volume or clip; the global term leaves them out"
    ]
    assert build(view_specs=two, local_view="plain").check_places({"ct": slices, "x": ("plain", 6, 6)}) == []
    assert build(variant="random").check_places({"x": flat}) == build(weights={"local": 1.0}).check_places({"x": flat}) == []


def test_frozen_encoder__keeps_its_batch_norms() -> None:
    objective = build()
    objective.encoder.requires_grad_(False)
    objective.train()
    before = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    objective(make_slices(8), StepContext(loss_weights={"global": 0.0}))["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in objective.encoder.state_dict().items())
    assert objective.decoder.training
    objective.encoder.requires_grad_(True)
    assert objective.train().encoder.training


def test_second_stage__of_the_docstring_trains_all_of_the_local_term_and_nothing_else() -> None:
    """The linear map of the 3 x 3 regions is part of the local head (card 3, g2): left out of the patterns it would stay random."""
    named = re.search(r"train: (\[.*?\])", str(GlobalLocalContrast.__doc__))
    assert named is not None
    objective = build()
    set_trainable(objective, json.loads(named.group(1)), frozen_names(objective))
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    local = {name for name, _ in build(weights={"local": 1.0}).named_parameters() if not name.startswith("encoder.")}
    assert trained == local and "region_head.weight" in local
    assert not objective.train().encoder.training


def test_two_views__one_per_term() -> None:
    specs = {"image": SPECS["image"], "plain": ViewSpec("image", (32, 32), None, 2)}
    objective = build(view_specs=specs, local_view="plain")
    views = make_slices(8)
    views.data["image_map"] = torch.randn(8, 2, 2, 3)  # crops differ
    assert set(objective(views, StepContext())) == {"loss", "loss_global", "negatives"}
    plain = make_slices(8)
    plain.data = {"plain": plain["image"]}
    plain.meta.valid["plain"] = plain.meta.valid["image"]
    assert set(objective(plain, StepContext())) == {"loss", "loss_local", "off_region_cosine"}
    with pytest.raises(RequestError, match="differ in geometry"):
        build()(views, StepContext())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"globl": 1.0}}, r'weights names globl \(did you mean "global"\?\)'),
        ({"variant": "parts"}, "accepted: random, part_negatives, part"),
        ({"partitions": 1}, "2 or more"),
        ({"position": "cm", "within": 1.0}, "accepted: fraction, mm"),
        ({"position": "mm"}, "how many mm apart"),
        ({"within": 0.0}, "above 0"),
        ({"within": 0.2, "variant": "random"}, "random compares no places"),
        ({"decoder_blocks": 3}, "1 to 2 blocks fit"),
        ({"decoder_blocks": 1}, "too small for 13 regions"),
        ({"local_view": "plain"}, "name one of them"),
        ({"view_specs": {"image": ViewSpec("image", (32, 32))}}, "set count: 2"),
    ],
)
def test_bad_arguments__say_what_is_accepted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(**changes)
