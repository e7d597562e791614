"""Bags of tile features: joined by name, shown whole or drawn, learnt from by attention."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.domains.slides.features import write_features
from medssl.errors import RequestError, StoreError
from medssl.evaluation.bags import BagBatches, BagEncoder, LabelledBags, labelled_bags
from medssl.evaluation.finetune_targets import TargetSettings, finetune_targets
from medssl.networks.classification import AttentionHead

pytest.importorskip("h5py", reason="extra wsi")

DIM = 16


def write_slides(root: Path, n: int = 80, *, width: int = DIM, encoder: str = "means", seed: int = 0) -> Path:
    """Slides of 20 to 60 tiles; one tile in ten of a positive slide has a high first feature, so that the mean tells little."""
    rng = np.random.default_rng(seed)
    (root / "features").mkdir(parents=True, exist_ok=True)
    with (root / "slides.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "split", "patient", "tumour", "area"])
        for k in range(n):
            count = int(rng.integers(20, 60))
            features = rng.normal(size=(count, width)).astype(np.float32)
            positive = k % 2
            if positive:
                features[: max(2, count // 10), 0] += 6
            name = f"Quillfeather_{k:02d}"
            write_features(root / "features" / f"{name}.h5", features, np.zeros((count, 2), dtype=np.int64), {"encoder": encoder})
            split = ("train", "train", "val", "test")[k // 2 % 4]
            table.writerow([f"{name}.svs", split, f"MRN{k // 2}", ("no", "yes")[positive], count])
    return root


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("bags"))


def read(root: Path, table: str = "slides.csv", target: str = "tumour", classes: tuple[str, ...] = ("no", "yes")) -> LabelledBags:
    task = "classification" if classes else "regression"
    return labelled_bags(root / "features", root / table, task=task, target=target, classes=classes)  # type: ignore[arg-type]


def test_table__is_joined_by_name_and_nobody_is_named(slides: Path) -> None:
    found = read(slides)
    assert len(found.files) == 80 and found.dim == DIM and found.made_by == "means" and found.without_features == 0
    assert found.cases.groups is not None and found.cases.groups[:3] == ["patient0001", "patient0001", "patient0002"]
    assert found.cases.targets[:4].tolist() == [0, 1, 0, 1] and found.files[3].name == "Quillfeather_03.h5"
    area = read(slides, target="area", classes=())
    assert area.cases.task == "regression" and area.cases.targets.min() >= 20


def test_training__shows_every_slide_once_a_turn_and_draws_tiles(slides: Path) -> None:
    found = read(slides)
    batches = BagBatches(found.files, 24, torch.device("cpu"))
    ids = list(range(10))
    seen = [number for step in range(5) for number in batches.training(ids, step, 1, 2)[1]]
    assert sorted(seen) == ids
    bags, shown = batches.training(ids, 0, 1, 4)
    again, _ = batches.training(ids, 0, 1, 4)
    assert torch.equal(bags, again) and bags.shape[1] <= 24 and len(shown) == 4
    whole = {ids[0]: tile for tile, ids in batches.plain(shown)}
    for bag, number in zip(bags, shown):
        tiles = {tuple(row.tolist()) for row in whole[number][0]}
        kept = [tuple(row.tolist()) for row in bag if row.any()]
        assert len(set(kept)) == len(kept) == min(24, len(tiles)) and set(kept) <= tiles


def test_padding__changes_nothing() -> None:
    encoder, head = BagEncoder(DIM), AttentionHead(DIM, 2)
    bag = torch.randn(1, 7, DIM, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([bag, torch.zeros(1, 5, DIM)], dim=1)
    one, other = encoder.forward_features(bag), encoder.forward_features(padded)
    assert torch.allclose(one.pooled, other.pooled) and torch.allclose(head(one), head(other), atol=1e-6)
    assert torch.isfinite(head(encoder.forward_features(torch.zeros(1, 3, DIM)))).all()


def test_attention__finds_the_few_tiles_that_matter(slides: Path) -> None:
    found = read(slides)
    settings = TargetSettings(head="attention", steps=80, batch=16, lr=1e-2, warmup_steps=5, val_every=0)
    batches = BagBatches(found.files, 64, torch.device("cpu"))
    result, network = finetune_targets(
        BagEncoder(found.dim), batches, found.cases, settings, seed=0, pretrained=True, arm="features"
    )
    auc = next(row["value"] for row in result.rows if row["metric"] == "auroc")
    assert auc > 0.9
    bag, _ = next(iter(batches.plain([1])))
    assert isinstance(network.head, AttentionHead)
    weights = network.head.attention(bag)[0]
    marked = bag[0, :, 0] > 3
    assert weights[marked].mean() > 3 * weights[~marked].mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("yes", "Zebediah"), "row 3: tumour is none of the classes"),
        (("train", "training"), "split is not train, val or test"),
        (("MRN2,", "MRN0,"), "slides of 1 patients are in several splits"),
        (("MRN0,", ","), "column patient is empty in 2 of 80 rows, so a patient could be in two splits unseen"),
        (("Quillfeather_01.svs", "north/Quillfeather_00.tif"), "row 3: names the slide of row 2 again"),
        (("tumour", "grade"), "has no column tumour"),
        (("Quillfeather", "Other"), "none of the 80 rows of other.csv has a feature file"),
    ],
)
def test_tables_that_do_not_fit__are_refused(slides: Path, change: tuple[str, str], message: str) -> None:
    text = (slides / "slides.csv").read_text().replace(*change)
    (slides / "other.csv").write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        read(slides, "other.csv")
    assert "Zebediah" not in str(caught.value) and "MRN" not in str(caught.value)


def test_features_of_two_kinds__are_refused(tmp_path: Path) -> None:
    write_slides(tmp_path, 8)
    for name, width, encoder, message in (("a", 5, "means", "several widths"), ("b", DIM, "other", "several encoders")):
        root = tmp_path / name
        write_slides(root, 8)
        target = root / "features" / "Quillfeather_03.h5"
        target.unlink()
        write_features(target, np.ones((4, width)), np.zeros((4, 2), dtype=np.int64), {"encoder": encoder})
        with pytest.raises(RequestError, match=f"the feature files are of {message}"):
            read(root)


def test_damaged_file__is_told_by_its_row_not_by_its_name(tmp_path: Path) -> None:
    root = write_slides(tmp_path, 8)
    found = read(root)
    (root / "features" / "Quillfeather_03.h5").write_bytes(b"no HDF5")
    with pytest.raises(StoreError, match="the feature file of row 5 is damaged") as caught:
        read(root)
    assert "Quillfeather" not in str(caught.value)
    with pytest.raises(StoreError, match="the feature file of slide0004 is damaged") as caught:
        list(BagBatches(found.files, 8, torch.device("cpu")).plain([3]))
    assert "Quillfeather" not in str(caught.value)
