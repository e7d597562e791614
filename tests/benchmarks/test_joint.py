"""The joint run at toy size: the tree, the probes against plain computation, the refusal of leaked images, the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from benchmarks import joint_data, joint_probes, joint_runs, medmnist_labels
from medssl.archive.index import index
from medssl.archive.operations.leakage import find_leakage
from medssl.archive.pixels.checks import content_hash
from medssl.archive.table import Archive
from medssl.errors import LeakageError
from medssl.evaluation.scores import roc_auc
from medssl.types import DrawKey
from medssl.views.planes import Planes, PlaneViews


def toy_set(folder: Path, name: str, shape: tuple[int, ...], counts: tuple[int, int, int] = (12, 4, 6)) -> Path:
    """A MedMNIST file whose labels show in the brightness; training image 1 equals test image 0, image 2 validation image 3."""
    rng = np.random.default_rng(0)
    content: dict[str, np.ndarray] = {}
    for split, count in zip(joint_data.SPLITS, counts):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, *shape)) + 100 * labels.reshape(-1, *[1] * len(shape))
        content |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    content["train_images"][1] = content["test_images"][0]
    content["train_images"][2] = content["val_images"][3]
    (folder / "medmnist").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "medmnist" / f"{name}.npz", **content)  # type: ignore[arg-type]
    return folder / "medmnist" / f"{name}.npz"


def test_tree__holds_the_pixels_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    import nibabel
    from PIL import Image

    flat = joint_data.write_medmnist(toy_set(tmp_path, "breastmnist", (28, 28)), tmp_path / "flat")
    solid = joint_data.write_medmnist(toy_set(tmp_path, "adrenalmnist3d_64", (8, 6, 4)), tmp_path / "solid")
    assert flat == solid == {"train": 10, "val": 4, "test": 6, "left_out_equal_to_held_out": 2}
    with np.load(tmp_path / "medmnist" / "breastmnist.npz") as data:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "flat" / "breastmnist_train_00003.png")), data["train_images"][3])
    with np.load(tmp_path / "medmnist" / "adrenalmnist3d_64.npz") as data:
        read: Any = nibabel.load(tmp_path / "solid" / "adrenalmnist3d_64_test_00002.nii.gz")  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(read.dataobj), data["test_images"][2])
    with open(tmp_path / "flat" / "labels.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert not {"breastmnist_train_00001.png", "breastmnist_train_00002.png"} & {row["file"] for row in rows}
    assert all(int(row["label"]) == int(row["file"].split("_")[2][:5]) % 2 for row in rows)


def test_patients__are_dealt_in_fifths() -> None:
    dealt = joint_data.deal([str(n % 10) for n in range(40)])
    assert [name for name, split in dealt.items() if split == "val"] == ["4", "9"]


def test_shown__equals_the_views_of_pretraining() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    views = PlaneViews("image", size=64, normalize={"window": [0, 255]})
    items = [
        Planes(image[None, None], np.ones((1, 28, 28), bool), None, np.zeros(1), np.zeros(1), {}, DrawKey(0, 0, n), n)
        for n, image in enumerate(images)
    ]
    data, _, _ = views.batch(items, "cpu")
    assert torch.allclose(data["image"][:, 0], joint_probes.shown(images), atol=1e-5)


def test_planes__are_turned_as_in_pretraining() -> None:
    volume = np.arange(4 * 5 * 64).reshape(4, 5, 64)
    planes = joint_probes.planes_of(volume)
    assert planes.shape == (8, 5, 4)
    # row 0 is anterior (largest y), column 0 the patient's right (largest x); slices 4, 12, 20 ...
    assert planes[0, 0, 0] == volume[3, 4, 4] and planes[1, 4, 3] == volume[0, 0, 12]


def test_pixel_scores__linear_map_and_enlarging_commute() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(3, 5, 8, 8), torch.randn(3, 7, 2, 2)]
    model = joint_probes.PixelModel(torch.randn(12, 3), torch.randn(3))
    case = joint_probes.Case("x", torch.zeros(3, 1, 64, 64), np.zeros((3, 30, 40), np.int64), 40)
    large = torch.cat([interpolate(level, size=(64, 64), mode="bilinear", align_corners=False) for level in levels], dim=1)
    expected = torch.einsum("schw,ck->skhw", large, model.weight) + model.bias[:, None, None]
    expected = interpolate(expected, size=(40, 40), mode="bilinear", align_corners=False)[:, :, 5:35]
    assert np.allclose(model.scores(levels, case), expected.numpy(), atol=1e-4)


def test_pixels__are_balanced_and_lie_where_the_label_is() -> None:
    labels = np.zeros((4, 64, 64), np.int64)
    labels[1, 10:20, 10:20], labels[2, 30:40, 5:9] = 1, 2
    planes = torch.from_numpy((labels * 0.4).astype(np.float32))[:, None]
    case = joint_probes.Case("x", planes, labels, 64)
    rows, values = joint_probes.pixel_rows(None, case, np.random.default_rng(0))
    assert rows.shape == (len(values), 49) and [int((values == k).sum()) for k in (1, 2)] == [100, 40]
    assert np.allclose(rows[:, 24], values * 0.4)  # the middle of 7 x 7 pixels


def test_mean_dice__counts_both_structures() -> None:
    labels = np.zeros((1, 2, 4), np.int64)
    labels[0, 0, :2], labels[0, 1, :2] = 1, 2
    scores = np.zeros((1, 3, 2, 4))
    scores[0, 1, 0, :4], scores[0, 2, 1, :2] = 1, 1
    assert joint_probes.mean_dice(scores, labels, 0.5) == pytest.approx((2 * 2 / 6 + 1) / 2)
    assert joint_probes.mean_dice(scores, labels, 2.0) == 0


def test_roc_auc__equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    target, score = rng.integers(0, 2, 60), rng.integers(0, 9, 60)  # few values, many ties
    wins = [(a > b) + 0.5 * (a == b) for a in score[target == 1] for b in score[target == 0]]
    assert roc_auc(np.stack([target, score], axis=1)) == pytest.approx(np.mean(wins))
    assert np.isnan(roc_auc(np.array([[1.0, 0.2], [1.0, 0.4]])))


def write_cells(folder: Path, quality: dict[str, float]) -> None:
    """Cells whose scores follow the target as far as `quality` says."""
    rng = np.random.default_rng(0)
    target = (np.arange(80) % 2).astype(float)
    noise = rng.normal(size=80)
    for arm, much in quality.items():
        for seed in joint_runs.PLANS[arm].seeds:
            out = folder / "cells" / f"{arm}_{seed}"
            out.mkdir(parents=True)
            for task in joint_probes.TASKS[:-1]:
                score = (0.5 + much * (target - 0.5) + noise).tolist()
                (out / f"{task}_test.json").write_text(json.dumps({"main": {"target": target.tolist(), "score": score}}))
            dice = (0.5 + 0.1 * much + 0.01 * noise[:20]).tolist()
            (out / "hippocampus_test.json").write_text(json.dumps({"main": {"dice": dice}}))


def test_table__joint_against_the_better_single_and_an_equal_arm(tmp_path: Path) -> None:
    write_cells(tmp_path, {"joint": 2.0, "intra": 2.0, "inter": 1.0, "raw": 0.0})
    summary = joint_runs.summarise(tmp_path, draws=200)
    by = {(row["joint minus"], row["task"]): row for row in summary["differences"]}
    assert by["intra", "mean"]["difference"] == 0 and by["intra", "mean"]["interval"] == [0, 0]
    assert by["better single", "mean"] == {**by["intra", "mean"], "joint minus": "better single"}
    assert by["raw", "hippocampus"]["difference"] == pytest.approx(0.2)
    low, high = by["raw", "mean"]["interval"]
    each = [by["raw", task]["difference"] for task in joint_probes.TASKS]
    assert 0 < low < by["raw", "mean"]["difference"] < high and by["raw", "mean"]["difference"] == pytest.approx(np.mean(each))
    row = next(r for r in summary["rows"] if r["arm"] == "inter" and r["task"] == "breastmnist")
    assert row["by"] == "image" and row["interval"][0] < row["value"] < row["interval"][1] and len(row["seeds"]) == 3


TOY = """
kind: pretrain
sources:
  chest_small:
    index: {archive}
    where: "split = 'train'"
    domain: ultrasound
    views: {{kind: image, size: 32, count: 2, normalize: {{window: [0, 255]}}, area: [0.5, 1]}}
encoders:
  encoder: {{name: slice_volume, dim: 16, slice_encoder: {{model: test_resnet}}, aggregator: {{depth: 1, heads: 2, dim_head: 8, hidden_dim: 16}}}}
objective: {{name: intra_inter_clustering, weights: {{intra: 1}}, intra_prototypes: 8, projector_dim: 4, standardise: true}}
train: {{steps: 2, batch: 4, workers: 0, monitor_items: 0, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shared data of one toy set, and a folder with the toy archive and recipe."""
    root = tmp_path_factory.mktemp("joint")
    npz = toy_set(root / "shared", "breastmnist", (28, 28))
    joint_data.write_medmnist(npz, root / "tree")
    index([root / "tree"], root / "archive", modality="US", splits=root / "tree" / "labels.csv")
    (root / "toy.yaml").write_text(TOY.format(archive=root / "archive"))
    return root / "shared", root


def test_cells__are_trained_probed_and_kept(toy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shared, root = toy
    plans = {
        "joint": joint_runs.Plan(root / "toy.yaml", seeds=(0,)),
        "random": joint_runs.Plan(root / "toy.yaml", seeds=(0,), trained=False),
    }
    monkeypatch.setattr(joint_runs, "PLANS", {**plans, "raw": joint_runs.Plan(None, seeds=(0,), trained=False)})
    monkeypatch.setattr(joint_runs, "held_out_hashes", lambda _: held_out(shared))
    assert joint_runs.cells() == [("random", 0), ("raw", 0), ("joint", 0)]
    joint_runs.compute(shared, root, joint_runs.cells(), split="test", tasks=["breastmnist"])
    summary = joint_runs.summarise(root, draws=20)
    values = {row["arm"]: row["value"] for row in summary["rows"]}
    assert set(values) == {"joint", "random", "raw"} and values["raw"] == 1  # brightness is the label
    facts = json.loads((root / "cells" / "joint_0" / "facts.json").read_text())
    assert facts["pretraining"]["status"] == "finished" and facts["compared_items"] == 10
    kept = root / "cells" / "joint_0" / "breastmnist_test.json"
    before = kept.stat().st_mtime_ns
    joint_runs.compute(shared, root, joint_runs.cells(), split="test", tasks=["breastmnist"])
    assert kept.stat().st_mtime_ns == before
    joint_runs.copy_cells(root / "cells", root / "kept")
    joint_runs.copy_cells(root / "kept", root / "elsewhere" / "cells")
    monkeypatch.setattr(joint_runs, "train", None)  # cells that are there are not trained again
    joint_runs.compute(shared, root / "elsewhere", joint_runs.cells(), split="test", tasks=["breastmnist"])
    again = joint_runs.summarise(root / "elsewhere", draws=20)
    assert {row["arm"]: row["value"] for row in again["rows"]} == values


def held_out(shared: Path) -> set[str]:
    """Pixel hashes of what the toy set holds out."""
    return {content_hash(image) for split in ("val", "test") for image in joint_probes.medmnist(shared, "breastmnist", split)[0]}


def test_check_apart__finds_a_trained_image_by_its_pixels(toy: tuple[Path, Path]) -> None:
    from medssl import api

    shared, root = toy
    run = api.pretrain(root / "toy.yaml", [f"out={root / 'apart'}"]).path
    assert joint_probes.check_apart(run, held_out(shared)) == 10
    trained = joint_probes.medmnist(shared, "breastmnist", "train")[0][5]
    with pytest.raises(LeakageError, match="1 of 10 training items"):
        joint_probes.check_apart(run, held_out(shared) | {content_hash(trained)})


@pytest.mark.slow
def test_label_shares__of_one_set_are_tested_beside_the_scratch_twin(toy: tuple[Path, Path], tmp_path: Path) -> None:
    from medssl import api

    shared, root = toy
    joint_data.write_medmnist(shared / "medmnist" / "breastmnist.npz", tmp_path / "tree" / "breastmnist")
    key = root / "archive" / "private" / "id.key"
    table = tmp_path / "tree" / "breastmnist" / "labels.csv"
    index([table.parent], tmp_path / "archive", modality="US", splits=table, site="breastmnist", key_file=key)
    run = api.pretrain(root / "toy.yaml", [f"out={root / 'labels'}"]).path
    asked = ["--weights", str(run), "--data", str(tmp_path), "--folder", str(tmp_path / "cells"), "--out", str(tmp_path)]
    asked += ["--sets", "breastmnist", "--seeds", "0", "--steps", "2"]
    medmnist_labels.main(asked)
    content = json.loads((tmp_path / "medmnist_labels.json").read_text())
    summary = content["sets"]["breastmnist"]
    assert summary["cells"]["done"] == 4  # 1 and 10 % of ten images are four labels, 100 % are ten
    assert [(row["labels"], row["arm"]) for row in summary["rows"]] == [
        (count, arm) for count in (4, 10) for arm in ("pretrained", "scratch")
    ]
    assert content["weights"]["weights_hash"] and {row["n_test"] for row in summary["rows"]} == {6}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("results.json")}
    medmnist_labels.main(asked)  # finished cells are kept
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("results.json")}


def alike(one: Path, small: Path) -> float:
    """Correlation of the central square of a picture, 28 x 28, with a picture of that size."""
    from PIL import Image

    picture = Image.open(one).convert("L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((28, 28), Image.Resampling.BICUBIC)
    return float(np.corrcoef(np.asarray(square, float).ravel(), np.asarray(Image.open(small), float).ravel())[0, 1])


@pytest.mark.data
@pytest.mark.slow
def test_leakage_check__says_that_breastmnist_is_busi(shared_data: Path, tmp_path: Path) -> None:
    joint_data.write_medmnist(shared_data / "medmnist" / "breastmnist.npz", tmp_path / "breastmnist")
    report = joint_data.busi_leakage(shared_data, tmp_path, tmp_path)
    assert report["found"] and report["busi"] == 20
    busi, breast = Archive.open(tmp_path / "busi"), Archive.open(tmp_path / "breast")
    pairs = find_leakage(busi, breast).perceptual
    # All 20 are there as central squares (correlation 0.997 or more); those that are nearly square themselves are found, nothing else.
    assert len(pairs) == report["busi_images_found"] == 4
    assert all(alike(busi.files(one)[0], breast.files(other)[0]) > 0.99 for one, other, _ in pairs)
