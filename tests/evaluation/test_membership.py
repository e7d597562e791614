"""Membership inference: the AUC against a plain loop, an encoder that has learnt its images by heart, and one that has learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medssl.cli import main as cli
from medssl.errors import RequestError
from medssl.evaluation.membership import auc, checked, membership_auc, read_membership, view_similarity
from medssl.export.write import export_weights
from medssl.membership import HELD_OUT, default_held_out
from medssl.phantoms.cohort import make_cohort
from medssl.recipe import SourceSection, recipe_folder
from medssl.weights import read_manifest


def test_auc__equals_a_plain_loop_with_ties() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 6, 17).tolist(), rng.integers(0, 5, 11).tolist()
    expected = np.mean([1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others])
    assert auc(members, others) == pytest.approx(expected, abs=1e-12)
    assert auc([2, 3], [0, 1]) == 1 and auc([0], [1]) == 0 and auc([1, 1], [1]) == 0.5


def test_view_similarity__equals_a_plain_loop() -> None:
    features = np.random.default_rng(1).normal(size=(4, 3, 5)).astype(np.float32)
    for image, found in enumerate(view_similarity(features)):
        rows = features[:, image].astype(np.float64)
        pairs = [
            rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for i in range(4) for j in range(4) if i != j
        ]
        assert found == pytest.approx(np.mean(pairs), abs=1e-9)


def views_of(images: torch.Tensor, views: int, seed: int) -> torch.Tensor:
    """Noisy copies (V, N, D)."""
    return images + 0.7 * torch.randn(views, *images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="toy", scope="module")
def _toy() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """An encoder fresh and after learning forty images by heart (each its own class, under noise), those images and forty others."""
    torch.manual_seed(0)
    members, others = torch.randn(40, 24), torch.randn(40, 24)
    fresh, trained = (nn.Sequential(nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 40)) for _ in range(2))
    optimiser = torch.optim.Adam(trained.parameters(), lr=3e-3)
    for step in range(300):
        loss = nn.functional.cross_entropy(trained(views_of(members, 1, step)[0]), torch.arange(40))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return fresh, trained, members, others


def measured(encoder: nn.Module, members: torch.Tensor, others: torch.Tensor) -> dict[str, Any]:
    with torch.no_grad():
        scores = [view_similarity(encoder(views_of(images, 8, 1000 + n)).numpy()) for n, images in enumerate((members, others))]
    names = [[f"{side}{i // 2}" for i in range(40)] for side in ("m", "o")]  # two images per patient
    return membership_auc(*(list(zip(who, found, strict=True)) for who, found in zip(names, scores, strict=True)), samples=500)


def test_overfitted_encoder__tells_its_images_and_an_untrained_one_does_not(toy: Any) -> None:
    fresh, trained, members, others = toy
    found = measured(trained, members, others)
    assert found["low"] > 0.5 and found["auc"] > 0.8
    assert found["low"] <= found["auc"] <= found["high"] and found["members"] == 20 and found["member_images"] == 40
    chance = measured(fresh, members, others)
    assert chance["low"] < 0.5 < chance["high"]


def test_interval__depends_on_patients_and_seed_alone() -> None:
    rng = np.random.default_rng(2)
    members = [(f"m{i}", v) for i, v in enumerate(rng.normal(0.5, 1, 12))]
    others = [(f"o{i}", v) for i, v in enumerate(rng.normal(0, 1, 12))]
    single = membership_auc(members, others, samples=300)
    assert single == membership_auc(members, others, samples=300)
    tripled = membership_auc([m for m in members for _ in range(3)], others, samples=300)
    assert tripled["auc"] == pytest.approx(single["auc"]) and tripled["low"] == pytest.approx(single["low"])


@pytest.mark.parametrize(("members", "others", "match"), [
    ([("a", 1.0)] * 9, [(f"o{i}", 0.0) for i in range(9)], r"1 trained and 9 held-out patients; at least 5"),
    ([(f"p{i}", 1.0) for i in range(9)], [(f"p{i}", 0.0) for i in range(8, 20)], r"1 patient\(s\) have images on both sides"),
    ([(f"p{i}", float("nan")) for i in range(9)], [(f"o{i}", 0.0) for i in range(9)], r"a score is no number"),
])  # fmt: skip
def test_membership_auc__refuses_what_says_nothing(members: Any, others: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        membership_auc(members, others)


def test_views_that_are_all_alike__are_refused() -> None:
    with pytest.raises(RequestError, match="draw nothing at random"):
        view_similarity(np.ones((3, 4, 5)))
    with pytest.raises(RequestError, match=r"1 view\(s\)"):
        view_similarity(np.ones((1, 4, 5)))


def test_file__is_checked_and_keeps_numbers_alone(tmp_path: Path) -> None:
    good = {"auc": 0.6, "low": 0.5, "high": 0.7, "members": 9, "non_members": 8, "score": "x"}
    assert checked({**good, "held_out": "split = 'test'", "patients": ["a"]}, "file") == good
    (tmp_path / "auc.json").write_text("[")
    with pytest.raises(RequestError, match=r"no membership result .*write one with `medssl membership`"):
        read_membership(tmp_path / "auc.json")
    for wrong in ({"auc": 1.4}, {"low": 0.8}, {"high": "0.9"}):
        with pytest.raises(RequestError, match="accepted: numbers from 0 to 1"):
            checked({**good, **wrong}, "file")
    with pytest.raises(RequestError, match="lacks score"):
        checked({name: value for name, value in good.items() if name != "score"}, "file")


def test_export__carries_the_result_of_its_own_weights_alone(tmp_path: Path) -> None:
    from tests.export.conftest import make_segresnet, save_run

    run = save_run(make_segresnet(), tmp_path / "run", image_size=[16, 24, 8])
    result = {"auc": 0.6, "low": 0.5, "high": 0.7, "members": 9, "non_members": 8, "score": "x"}
    file = tmp_path / "auc.json"
    file.write_text(json.dumps({**result, "weights_hash": "of another run"}))
    with pytest.raises(RequestError, match=r"is of weights of another run, these are"):
        export_weights(run, "segresnet", tmp_path / "out", membership=file)
    assert not (tmp_path / "out").exists()
    file.write_text(json.dumps({**result, "weights_hash": read_manifest(run)["weights_hash"], "held_out": "split = 'test'"}))
    for to, sidecar in (
        ("segresnet", "segresnet.json"),
        ("safetensors", "encoder.json"),
        ("monai-bundle", "configs/manifest.json"),
    ):
        export_weights(run, to, tmp_path / to, membership=file)
        found = json.loads((tmp_path / to / sidecar).read_text())["membership_inference"]
        assert found == {**result, "weights_hash": read_manifest(run)["weights_hash"]}


@pytest.mark.slow
def test_command__measures_a_run_and_export_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = make_cohort(tmp_path / "cohort", patients=16, seed=1, size=(40, 36, 32))
    smoke = recipe_folder() / "smoke" / "mae_cnn_segresnet3d_mri.yaml"
    archive, run, file = tmp_path / "archive", tmp_path / "run", tmp_path / "auc.json"

    def medssl(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    def step(*args: object) -> str:
        status, out, err = medssl(*args)
        assert status == 0, err
        return out

    step("index", cohort / "images", "--splits", cohort / "split.csv", "--modality", "MR", "--out", archive)
    step("pretrain", smoke, f"data.index={archive}", f"out={run}", "train.steps=4", "views.size=[32, 32, 32]", "probes={}")
    out = step("membership", run, "--out", file, "--views", "4", "--json")
    found, said = json.loads(file.read_text()), json.loads(out)
    assert found == said and 0 <= found["low"] <= found["auc"] <= found["high"] <= 1
    assert found["members"] >= 5 and found["non_members"] >= 5 and found["left_out"] == 0
    step("export", run, "--to", "segresnet", "--out", tmp_path / "export", "--membership", file)
    manifest = json.loads((tmp_path / "export" / "segresnet.json").read_text())
    assert manifest["membership_inference"]["auc"] == found["auc"]
    status, _, err = medssl("membership", run, "--out", tmp_path / "none.json", "--held-out", "split = 'train'")
    assert status == 2 and "0 held-out images" in err and not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    "where", ["split = 'train'", " split in ('train', 'val')", "split not in ('val', 'test')", "split != 'test'"]
)
def test_held_out__follows_where_the_recipe_selects_by_split(where: str) -> None:
    assert default_held_out(SourceSection(index="a", domain="mri", where=where, views={})) == HELD_OUT


@pytest.mark.parametrize("where", ["split = 'train' and modality = 'CT'", "modality = 'CT'", "split = 'train' or n_files > 3"])
def test_held_out__must_be_named_where_the_recipe_selects_by_more(where: str) -> None:
    with pytest.raises(RequestError, match="give --held-out with the same conditions and the other splits"):
        default_held_out(SourceSection(index="a", domain="mri", where=where, views={}))
