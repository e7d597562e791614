"""embed and match through the command line: the road of the matcher at toy size, and bad input."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medssl import api, build, data_sources
from medssl.archive.table import Archive
from medssl.correspondence import embed
from medssl.correspondence import match as match_volumes
from medssl.errors import RecipeError, RequestError
from medssl.matching.store import EmbeddingReader
from medssl.recipe import PretrainRecipe, shipped
from medssl.types import DrawKey
from tests.cli.test_bad_input import medssl
from tests.matching import toy

SMOKE = shipped()["smoke/anatomical_embedding_segresnet3d_mri"]
ALICE = shipped()["smoke/alice_segresnet3d_mri_pairs"]
SHORT = ["train.steps=3", "train.monitor_items=0", "views.size=[16, 16, 16]"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over four phantoms of 32^3 voxels at 4 mm."""
    from medssl.archive.index import index

    root = tmp_path_factory.mktemp("matching")
    (root / "images").mkdir()
    for seed in range(4):
        sample, _ = toy.phantom(seed, spacing=4.0)
        nib.save(nib.Nifti1Image(sample.image[0], sample.affine), root / "images" / f"p{seed}.nii.gz")  # type: ignore[attr-defined, no-untyped-call]
    key = root / "id.key"  # ids, and with them what three steps of training see, depend on the key
    key.write_text("the key of four phantoms, no patients\n")
    key.chmod(0o600)
    index([root / "images"], root / "index", modality="MR", key_file=key)
    return root / "index"


@pytest.fixture(scope="module")
def run(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matcher trained for three steps on that index."""
    out = tmp_path_factory.mktemp("matcher") / "run"
    api.pretrain(SMOKE, [f"data.index={archive}", f"out={out}", *SHORT])
    return out


def test_road__pretrain_embed_match_and_train_on_matched_pairs(
    archive: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "fine", "coarse", "fine_error_mm", "coarse_error_mm"} <= {key for line in lines for key in line}
    assert json.loads((run / "weights" / "index.json").read_text()) == {"default": "encoder", "parts": ["embedding", "encoder"]}
    request = ["embed", SMOKE, "--weights", run, f"data.index={archive}", "--json"]
    status, out, err = medssl(capsys, *request)
    assert status == 0, err
    facts = json.loads(out)["main"]
    assert (facts["written"], facts["present"]) == (4, 0) and 0 < facts["bytes_per_volume"] < 16**3 * 16 + 8**3 * 16 + 10_000
    status, out, err = medssl(capsys, *request[:-1])
    assert status == 0 and re.search(r"main: 0 written, 4 present, 0 failed; 0\.0\d MB per volume", out)
    assert (archive / "store") in Path(facts["folder"]).parents

    series = [row.series_id for row in Archive.open(archive).select()]
    picture = tmp_path / "overlay.png"
    points = ["--point", "0,0,0", "--point", "10,-4,6"]
    status, out, err = medssl(
        capsys, "match", series[0], series[1], *points, "--index", archive, "--weights", run, "--out", picture, "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["matcher"] == "embedding" and [row["a"] for row in found["points"]] == [[0, 0, 0], [10, -4, 6]]
    assert all(row["b"] is not None and 0 <= row["score"] <= 1 for row in found["points"])
    assert picture.read_bytes()[:4] == b"\x89PNG" and stat.S_IMODE(picture.stat().st_mode) == 0o600

    files = archive.parent / "images"
    status, out, err = medssl(
        capsys, "match", files / "p0.nii.gz", files / "p0.nii.gz", "--grid", "24", "--domain", "mri", "--weights", run
    )
    assert status == 0, err
    rows = [line.split() for line in out.splitlines()[2:] if line.split()[0].isdigit()]
    assert len(rows) > 20
    near = [row for row in rows if row[4] != "-"]
    assert len(near) == len(rows)
    away = np.array([[float(v) for v in row[1:7]] for row in near])
    moved = np.abs(away[:, :3] - away[:, 3:]).max(axis=1)  # between cells of 8 mm, vectors of a network that has learnt nothing
    assert np.median(moved) < 0.3 and moved.max() < 8.0
    assert min(float(row[7]) for row in near) > 0.99


def test_matched_pairs__train_from_embeddings_and_refuse_missing_ones(archive: Path, run: Path, tmp_path: Path) -> None:
    changes = [f"data.index={archive}", f"out={tmp_path / 'pairs'}", "train.steps=2", "train.monitor_items=0"]
    mae = ["objective={name: mae_cnn}", "views={kind: pair, size: [16, 16, 16], spacing_mm: 4.0, mask: {ratio: 0.5, cell: 4}}"]
    sampler = (
        f"data.sampler={{name: pairs, pairs: matched, min_score: 0, matcher: {{name: embedding, weights: {run}, step_mm: 16}}}}"
    )
    with pytest.raises(RequestError, match="run `medssl embed` with these weights again"):
        api.pretrain(SMOKE, [*changes, *mae, sampler])
    assert not (tmp_path / "pairs").exists()
    body = "data.sampler={name: pairs, pairs: matched, matcher: {name: body_axis}}"
    done = api.pretrain(SMOKE, [*changes, *mae, body])
    assert done.status == "finished" and done.items == 4


def test_matched_pairs__use_the_embeddings_of_the_store(archive: Path, run: Path) -> None:
    folder = embed(SMOKE, run, [f"data.index={archive}"])["main"].folder
    sampler = f"data.sampler={{name: pairs, pairs: matched, min_score: 0.5, matcher: {{name: embedding, weights: {run}}}}}"
    views = "views={kind: pair, size: [16, 16, 16], spacing_mm: 4.0, mask: {ratio: 0.5, cell: 4}}"
    recipe = api.load_recipe(SMOKE, [f"data.index={archive}", sampler, views, "objective={name: mae_cnn}"])
    shelf = data_sources.fill_shelf("main", recipe.sources["main"])
    items = data_sources.freeze_items([shelf], recipe.sources, build.assign_cards(recipe))
    source = data_sources.training_source(shelf, recipe.sources["main"], items, 2)
    draw = source.sampler.draw(DrawKey(0, 0, 0))  # type: ignore[attr-defined]
    reader = source.sampler.matcher.reader  # type: ignore[attr-defined, union-attr]
    assert isinstance(reader, EmbeddingReader) and reader.folder == folder and draw.ids[0] != draw.ids[1]


def matched(run: Path, **changes: str) -> str:
    """The sampler of pairs that a matcher's embeddings mine."""
    extra = "".join(f", {key}: {value}" for key, value in changes.items())
    return f"data.sampler={{name: pairs, pairs: matched, matcher: {{name: embedding, weights: {run}{extra}}}}}"


def source_of(recipe: PretrainRecipe, **changes: Any) -> Any:
    """The training source of a recipe; `changes` of all rows of the index."""
    shelf = data_sources.fill_shelf("main", recipe.sources["main"])
    shelf.rows = [replace(row, **{key: value(k) for key, value in changes.items()}) for k, row in enumerate(shelf.rows)]
    items = data_sources.freeze_items([shelf], recipe.sources, build.assign_cards(recipe))
    return data_sources.training_source(shelf, recipe.sources["main"], items, recipe.train.batch)


@pytest.mark.slow
def test_alice_road__matcher_embed_and_pairs_of_two_patients(archive: Path, run: Path, tmp_path: Path) -> None:
    changes = [f"data.index={archive}", f"out={tmp_path / 'alice'}", "train.steps=3", "train.monitor_items=0", matched(run)]
    embed(ALICE, run, changes)  # the recipe that needs the embeddings names the volumes
    done = api.pretrain(ALICE, [*changes, "train.checkpoint_every=2", "train.keep_checkpoints=2"])
    assert done.status == "finished" and done.items == 4
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    terms = {"loss_cls", "loss_patch", "loss_rec", "cls_spread", "cls_centre_entropy", "patch_teacher_entropy"}
    assert len(steps) == 3 and all(terms <= set(line) and np.isfinite(line["loss"]) for line in steps)
    first = (done.path / "weights" / "last" / "encoder.safetensors").read_bytes()
    api.pretrain(done.path, resume=True)  # finished already: nothing is written again
    assert (done.path / "weights" / "last" / "encoder.safetensors").read_bytes() == first

    recipe = api.load_recipe(ALICE, changes)
    source = source_of(recipe)
    batch = source.views(source.fetch([DrawKey(0, 0, place) for place in range(3)]), torch.device("cpu"))
    draws = [source.sampler.draw(DrawKey(0, 0, place)) for place in range(3)]
    assert all(draw.ids[0] != draw.ids[1] and draw.weight > 0 for draw in draws)
    assert batch["volume_partner"].tolist() == [draw.ids[1] for draw in draws]
    objective, _ = build.build_objective(recipe, 4)
    counts = objective.denominators(batch)
    assert float(counts["pairs"]) == pytest.approx(sum(draw.weight for draw in draws), rel=1e-6)
    x, hidden, _, weight = objective.inputs(batch)
    assert weight.tolist() == pytest.approx([draw.weight for draw in draws])
    assert not torch.equal(hidden[:, 0], hidden[:, 1]) and not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(x[:, 0], x[:, 1])


def test_pairs_that_cannot_be_mined__are_refused_before_anything_is_written(archive: Path, run: Path, tmp_path: Path) -> None:
    changes = [f"data.index={archive}", f"out={tmp_path / 'none'}", "train.steps=2", "train.monitor_items=0"]
    body = "data.sampler={pairs: matched, matcher: {name: body_axis}}"
    one = Archive.open(archive).select()[0].series_id
    for words, match in (
        ([body, f"data.where=series_id = '{one}'"], r"source main holds volumes of one patient only, and pairs: matched takes two"),
        (
            [matched(run, spacing_mm="2")],
            "the matcher was trained at a spacing of 4x4x4 mm and 2x2x2 mm is asked for; leave the spacing out",
        ),
        (
            [matched(run, step_mm="32")],
            r"the embeddings in .* were made with .* wanted; run `medssl embed` with these weights again",
        ),
    ):
        with pytest.raises(RequestError, match=match):
            api.pretrain(ALICE, [*changes, *words])
    assert not (tmp_path / "none").exists()
    recipe = api.load_recipe(ALICE, [*changes, body])
    regions = (("head",), ("abdomen",), ("pelvis",), ("foot",))
    with pytest.raises(
        RequestError, match=r"source main: 128 of 128 candidate pairs were dropped, because no partner shows the same part"
    ):
        source_of(recipe, body_region=lambda k: regions[k])
    half = source_of(recipe, body_region=lambda k: regions[k // 2])  # two heads, two abdomens
    assert half.sampler.draw(DrawKey(0, 0, 0)).weight > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point", "1,2"], "--point: give three numbers x,y,z in world mm"),
        ([], "give points .* or a grid .*, and not both"),
        (["--point", "0,0,0", "--matcher", "afine"], r'unknown matcher "afine" \(did you mean "affine"\?\)'),
        (["--point", "0,0,0", "--matcher", "embedding"], "the matcher embedding needs weights; give --weights RUN"),
        (["--point", "900,0,0", "--domain", "mri"], r"point 1 lies outside volume A, which spans x -\d+ to \d+"),
        (["--point", "0,0,0"], "volume A is a file: say what it is with --domain ct or --domain mri"),
        (["--grid", "-3", "--domain", "mri"], "the grid's step is -3 mm; accepted: a number above 0"),
        (["--point", "0,0,0", "--domain", "mri", "--matcher", "body_axis", "--out", "x.jpg"], "x.jpg: the overlay is a PNG"),
    ],
)
def test_match__bad_input_is_a_sentence(
    archive: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    files = archive.parent / "images"
    status, _, err = medssl(capsys, "match", files / "p0.nii.gz", files / "p1.nii.gz", *arguments)
    assert status == 2, err
    assert re.search(message, err)


def test_match__series_that_are_not_there(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = medssl(capsys, "match", "f" * 32, "e" * 32, "--point", "0,0,0")
    assert status == 2 and "volume A is a series id, which an archive knows; give --index ARCHIVE" in err
    status, _, err = medssl(capsys, "match", "f" * 32, "e" * 32, "--point", "0,0,0", "--index", archive)
    assert status == 2 and "has no usable volume with this series id" in err
    status, _, err = medssl(capsys, "match", "nothing.nii.gz", "e" * 32, "--point", "0,0,0")
    assert status == 2 and "no such file or folder" in err


def test_embed__weights_at_another_spacing_or_step(archive: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["embed", SMOKE, "--weights", run, f"data.index={archive}"]
    status, _, err = medssl(capsys, *request, "--spacing", "2")
    assert status == 2 and "the matcher was trained at a spacing of 4x4x4 mm and 2x2x2 mm is asked for" in err
    status, _, err = medssl(capsys, *request, "--step", "5")
    assert status == 2 and "step_mm is 5; accepted with these weights: 8, 16 or 32" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["views.spacing_mm=null"],
            r"views.spacing_mm: required for kind: pair \(both crops must cover the same millimetres\)",
        ),
        (["data.sampler={pairs: matched}"], r"data.sampler.matcher: required for pairs: matched; give \{name: embedding"),
        (["data.sampler={pairs: matched, matcher: {name: afine}}"], r'unknown matcher "afine" \(did you mean "affine"\?\)'),
        (["data.sampler={pairs: matched, matcher: {name: embedding}}"], "data.sampler.matcher.weights: required and missing"),
        (["data.sampler={pairs: same_volume, matcher: {name: affine}}"], "used only where sampler.pairs is matched"),
        (["data.sampler={pairs: same_volume, sift: 1}"], r'data.sampler.sift: unknown key \(did you mean "shift"\?\)'),
        (
            ["data.sampler={pairs: matched, matcher: {name: affine}}"],
            "data.sampler.pairs: objective anatomical_embedding learns from pairs",
        ),
        (["views.points=null"], "views.points: required by objective anatomical_embedding"),
        (["views.count=3"], "views.count: unknown key"),
        (
            ["encoder={name: vit3d, image_size: [24, 24, 16], patch_size: 8}"],
            r"needs pyramid_centres\); encoders that fit: resenc3d, segresnet3d",
        ),
    ],
)
def test_recipes_of_pairs__faults_name_the_key(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        api.load_recipe(SMOKE, ["data.index=somewhere", *changes])


def test_match__through_python(archive: Path) -> None:
    files = archive.parent / "images"
    found = match_volumes(files / "p0.nii.gz", files / "p1.nii.gz", points=[[0.0, 0.0, 0.0]], matcher="body_axis", domain="mri")
    assert found.matcher == "body_axis" and found.points[0]["b"] is not None and found.picture is None
