"""From label files of any form to what loss and scores see: values, uncertain voxels, partial labels, raters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.archive.table import Archive
from medssl.cli.training import summary_table
from medssl.errors import GeometryError, ImageError, RequestError
from medssl.evaluation.cohort import Case, Cohort, LabelRules
from medssl.evaluation.finetune import finetune
from medssl.evaluation.label_curve import label_curve
from medssl.evaluation.metrics import dice
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.segmentation_training import build_loss, class_frequencies, partial_loss
from medssl.evaluation.volumes import CaseReader, TrainingCrops, Volume, comparable, labelled_classes, majority
from medssl.registry import lookup
from medssl.types import DrawKey
from tests.archive.small import set_public, small_archive
from tests.evaluation.test_finetune import SETTINGS
from tests.evaluation.tiny_cohort import tiny_volume
from tests.synthetic import oblique_affine, plain_affine, reorient, write_dicom_series, write_nifti
from tests.synthetic_labels import at, frame_uid, write_dicom_seg, write_rtstruct, write_seg_nrrd

STRUCTURES = {"one": 1, "two": 2}
CPU = torch.device("cpu")


def write_image(folder: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write an oblique DICOM series; return its label and affine in the order of the file's axes."""
    image, label = tiny_volume(seed)
    affine = oblique_affine((1.0, 1.2, 2.0))
    write_dicom_series(folder, image, affine, uid_seed=f"labels {seed}")
    return label, affine


def table(
    folder: Path, lines: list[str], structures: Mapping[str, int] | None = STRUCTURES, header: str = "image,label,split"
) -> Cohort:
    if structures is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": dict(structures)}))
    (folder / "t.csv").write_text("\n".join([header, *lines]) + "\n")
    return Cohort.load(folder / "t.csv")


def box_contours(mask: np.ndarray, affine: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the outline of a box of voxels in every slice."""
    low, high = np.argwhere(mask).min(axis=0) - 0.5, np.argwhere(mask).max(axis=0) + 0.5
    contours = []
    for z in range(int(low[2] + 0.5), int(high[2] + 0.5)):
        x = [low[0], high[0], high[0], low[0]]
        y = [low[1], low[1], high[1], high[1]]
        contours.append(("CLOSED_PLANAR", at(affine, np.stack([x, y, [z] * 4], axis=1))))
    return contours


def test_all_forms__give_the_same_volume(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    one, two = label == 1, label == 2
    write_nifti(tmp_path / "map.nii.gz", label, affine)
    (tmp_path / "organs").mkdir()
    write_nifti(tmp_path / "organs" / "One.nii.gz", one.astype(np.uint8), affine)
    write_nifti(tmp_path / "organs" / "two.nii.gz", two.astype(np.uint8), affine)
    segments = [{"Name": "one", "LabelValue": 7, "Layer": 0}, {"Name": "two", "LabelValue": 1, "Layer": 1}]
    write_seg_nrrd(tmp_path / "s.seg.nrrd", np.stack([one * 7, two]), affine, segments)
    write_dicom_seg(tmp_path / "seg.dcm", {"one": one, "two": two}, affine, frame=frame_uid("labels 0"))
    rois = {"two": box_contours(two, affine), "ONE": box_contours(one, affine)}
    write_rtstruct(tmp_path / "rt.dcm", rois, frame=frame_uid("labels 0"))
    expected, _ = reorient(label, affine, "RAS")
    for form in ("map.nii.gz", "organs", "s.seg.nrrd", "seg.dcm", "rt.dcm"):
        cohort = table(tmp_path, [f"image,{form},train"])
        volume = CaseReader("mri")(cohort.cases[0])
        assert volume.label is not None
        assert np.array_equal(volume.label, expected), form
        assert volume.label.dtype == np.int16
        assert volume.complete, form
        assert volume.flags == ()
        assert sorted(volume.points) == [1, 2]
    assert expected.any()


def test_frame_of_reference__of_another_scan_is_refused_by_case(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "DOE")
    for name, file in (("DOE.dcm", "seg"), ("DOE_rt.dcm", "rt")):
        if file == "seg":
            write_dicom_seg(tmp_path / name, {"one": label == 1}, affine, frame="1.2.3")
        else:
            write_rtstruct(tmp_path / name, {"one": box_contours(label == 1, affine)}, frame="1.2.3")
        cohort = table(tmp_path, [f"DOE,{name},train"])
        with pytest.raises(GeometryError, match="case case0001: the label refers to another frame of reference") as caught:
            CaseReader("mri")(cohort.cases[0])
        assert "DOE" not in str(caught.value)


def test_unknown_values__are_refused_with_what_is_listed(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    other = label.astype(np.int32)
    other[0, 0, 0], other[0, 0, 1] = 9, -3
    write_nifti(tmp_path / "map.nii.gz", other, affine)
    listed = table(tmp_path, ["image,map.nii.gz,train"])
    with pytest.raises(
        ImageError, match=r"case case0001: its label map holds the values -3, 9, which stand for no structure; structures are 1, 2"
    ):
        CaseReader("mri")(listed.cases[0])
    other[0, 0, 1], other[0, 0, 0] = 0, 70000
    write_nifti(tmp_path / "map.nii.gz", other, affine)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ImageError, match="the value 70000, which stands for no structure; structures are 1 to 32767"):
        CaseReader("mri")(table(tmp_path, ["image,map.nii.gz,train"], None).cases[0])


def test_values_of_no_training_label__are_refused_where_none_are_listed(tmp_path: Path) -> None:
    for n, top in ((0, 0), (1, 5)):
        label, affine = write_image(tmp_path / f"image{n}", n)
        label[0, 0, 0] = top
        write_nifti(tmp_path / f"{n}.nii.gz", label, affine)
    cohort = table(tmp_path, ["image0,0.nii.gz,train", "image1,1.nii.gz,test"], None)
    with pytest.raises(ImageError, match="case case0002: its label map holds the value 5, which no training label has"):
        finetune(cohort, SETTINGS, tmp_path / "out")


def test_uncertain__is_minus_one_and_the_value_of_ignore(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    stored = label.astype(np.int16)
    stored[0], stored[1] = -1, 3
    write_nifti(tmp_path / "map.nii.gz", stored, affine)
    cohort = table(tmp_path, ["image,map.nii.gz,train"], {**STRUCTURES, "ignore": 3})
    volume = CaseReader("mri")(cohort.cases[0])
    assert volume.label is not None
    expected, _ = reorient(np.where(stored == 3, -1, stored), affine, "RAS")
    assert np.array_equal(volume.label, expected)
    assert not volume.complete
    assert labelled_classes([volume], [0, 1, 2]) is not None
    assert volume.labels(1)
    assert sorted(volume.points) == [1, 2]


@pytest.mark.parametrize(
    "listed", [{**STRUCTURES, "ignore": 3}, {"ignore": 1}, STRUCTURES, None], ids=["all", "ignore", "others", "none"]
)
@pytest.mark.parametrize("form", ["organs", "s.seg.nrrd", "seg.dcm", "rt.dcm"])
def test_ignore__is_uncertain_in_forms_with_names(tmp_path: Path, form: str, listed: dict[str, int] | None) -> None:
    label, affine = write_image(tmp_path / "image")
    doubt = np.zeros(label.shape, dtype=bool)
    doubt[1:6, 2:16, 2:14] = True  # over some of one, and background
    masks = {"one": label == 1, "two": label == 2, "Ignore": doubt}
    if form == "organs":
        (tmp_path / form).mkdir()
        for name, mask in masks.items():
            write_nifti(tmp_path / form / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    elif form == "s.seg.nrrd":
        segments = [{"Name": name, "LabelValue": 1, "Layer": n} for n, name in enumerate(masks)]
        write_seg_nrrd(tmp_path / form, np.stack([mask * 1 for mask in masks.values()]), affine, segments)
    elif form == "seg.dcm":
        write_dicom_seg(tmp_path / form, masks, affine, frame=frame_uid("labels 0"))
    else:
        rois = {name: box_contours(mask, affine) for name, mask in masks.items()}
        write_rtstruct(tmp_path / form, rois, frame=frame_uid("labels 0"))
    cohort = table(tmp_path, [f"image,{form},train"], listed)
    assert sorted(cohort.structures) == [1, 2]
    assert sorted(cohort.file_names.values()) == ([] if listed and "one" in listed else ["one", "two"])
    volume = CaseReader("mri")(cohort.cases[0])
    expected, _ = reorient(np.where(doubt, -1, label.astype(int)), affine, "RAS")
    assert volume.label is not None
    assert np.array_equal(volume.label, expected)
    assert sorted(volume.points) == [1, 2]
    assert volume.labelled is None and volume.counts == {"uncertain_voxels": int(doubt.sum())}  # and no reader counted anything


def test_unlabelled__is_not_empty(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    one = (label == 1).astype(np.uint8)
    for folder, names in (("only", ("one",)), ("both", ("one", "two"))):
        (tmp_path / folder).mkdir()
        for name in names:
            write_nifti(tmp_path / folder / f"{name}.nii.gz", one if name == "one" else one * 0, affine)
    write_nifti(tmp_path / "map.nii.gz", label, affine)
    header = "image,label,split,labelled"
    read = {}
    for form, labelled in (("only", ""), ("both", ""), ("map.nii.gz", "one"), ("both", "two")):
        cohort = table(tmp_path, [f"image,{form},train,{labelled}"], header=header)
        read[form, labelled] = CaseReader("mri")(cohort.cases[0])
    assert read["only", ""].labelled == (1,)
    assert read["both", ""].labelled is None  # two is labelled, and nowhere
    assert read["both", "two"].labelled == (2,)
    partial = read["map.nii.gz", "one"]
    assert partial.labelled == (1,)
    expected, _ = reorient(np.where(label == 2, -1, label.astype(int)), affine, "RAS")
    assert partial.label is not None
    assert np.array_equal(partial.label, expected)  # what somebody drew of two is neither two nor background
    everywhere = np.full(partial.label.shape, 2)
    for key, scored in ((("only", ""), [1]), (("both", ""), [1, 2]), (("both", "two"), [2])):
        found, sure, structures = comparable(everywhere, read[key], (1, 2))
        assert structures == scored
        scores = dice(found, sure, structures)
        assert scores == dict.fromkeys(scored, 0.0)  # a prediction where two is known to be nowhere is wrong
    assert labelled_classes([read["only", ""], read["both", ""]], [0, 1, 2]).tolist() == [[True, True, False], [True, True, True]]  # type: ignore[union-attr]
    assert labelled_classes([read["both", ""]] * 2, [0, 1, 2]) is None


def test_scores__do_not_see_uncertain_voxels() -> None:
    label = np.array([[[1, 1, -1, -1, 0, 0]]], np.int16)
    volume = Volume(label[None], label == label, label, (1.0, 1.0, 1.0), np.eye(4), {})
    for guess in ([1, 0, 1, 1, 0, 1], [1, 0, 0, 2, 0, 1]):
        found, sure, structures = comparable(np.array([[guess]]), volume, (1,))
        assert dice(found, sure, structures) == {1: 0.5}


def test_majority__takes_the_leading_value_and_leaves_ties_uncertain() -> None:
    columns = {
        (1, 1, 2): 1,
        (1, 2, 0): -1,
        (0, 0, 1): 0,
        (-1, 2, 2): 2,
        (-1, -1, 1): 1,
        (-1, -1, -1): -1,
        (2, 1, 2): 2,
        (-1, 1, 2): -1,
    }
    maps = [np.array([[list(row)]], np.int16) for row in zip(*columns)]
    label, ties = majority(maps)
    assert label.ravel().tolist() == list(columns.values())
    assert ties == 2
    rng = np.random.default_rng(0)
    many = [rng.integers(-1, 4, (6, 5, 4)).astype(np.int16) for _ in range(5)]
    label, _ = majority(many)
    for place in np.ndindex(6, 5, 4):
        votes = [int(m[place]) for m in many if m[place] >= 0]
        tops = [v for v in set(votes) if votes.count(v) == max(map(votes.count, votes))]
        assert label[place] == (tops[0] if len(tops) == 1 else -1)


def test_raters__are_voted_on_or_drawn_by_crop(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    for rater in range(3):
        drawn = label.copy()
        drawn[rater] = 1  # each adds a slab of their own
        write_nifti(tmp_path / f"r{rater}.nii.gz", drawn, affine)
    cohort = table(tmp_path, ["image,r0.nii.gz,train,r1.nii.gz,r2.nii.gz"], header="image,label,split,label_2,label_3")
    volume = CaseReader("mri")(cohort.cases[0])
    expected, _ = reorient(label, affine, "RAS")
    assert volume.label is not None
    assert np.array_equal(volume.label, expected)
    assert len(volume.raters) == 3
    seen: dict[str, set[int]] = {"majority": set(), "draw": set()}
    for mode, found in seen.items():
        crops = TrainingCrops(
            size=volume.label.shape,
            spacing_mm=None,
            normalize="zscore",
            augment={},
            foreground=0.0,
            seed=0,
            device=CPU,
            raters=mode,
        )
        for step in range(24):
            _, drawn = crops.cut(volume, DrawKey(0, step, 0))
            matching = [k for k, rater in enumerate(volume.raters) if np.array_equal(rater, drawn)]
            found.update(matching or [-1])
            assert matching or np.array_equal(drawn, expected)
    assert seen == {"majority": {-1}, "draw": {0, 1, 2}}
    with pytest.raises(RequestError, match="raters: 'vote'; majority or draw"):
        replace(SETTINGS, raters="vote")


def plain_partial(logits: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor, settings: FinetuneSettings) -> float:
    """Write the loss out as loops over samples, classes and voxels."""
    n, k = logits.shape[:2]
    p = logits.double().softmax(dim=1).reshape(n, k, -1)
    y = labels.reshape(n, -1)
    inter, total = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)
    entropy, sure = 0.0, 0
    for b in range(n):
        for v in range(y.shape[1]):
            if y[b, v] < 0:
                continue
            sure += 1
            background = p[b, 0, v] + sum(float(p[b, c, v]) for c in range(1, k) if not labelled[b, c])
            own = [background if c == 0 else p[b, c, v] for c in range(k)]
            entropy -= float(torch.log(own[int(y[b, v])]))
            for c in range(k):
                if labelled[b, c]:
                    inter[b, c] += own[c] * (y[b, v] == c)
                    total[b, c] += own[c] + (y[b, v] == c)
    terms = []
    for c in range(0 if settings.include_background else 1, k):
        rows = [b for b in range(n) if labelled[b, c]]
        if settings.batch_dice and rows:
            terms.append(1 - (2 * sum(inter[b, c] for b in rows) + 1e-5) / (sum(total[b, c] for b in rows) + 1e-5))
        elif not settings.batch_dice:
            terms += [1 - (2 * inter[b, c] + 1e-5) / (total[b, c] + 1e-5) for b in rows]
    return settings.dice_weight * float(sum(terms)) / max(1, len(terms)) + settings.ce_weight * entropy / max(1, sure)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("include_background", [True, False])
def test_partial_loss__equals_loops_and_with_everything_labelled_monai(batch_dice: bool, include_background: bool) -> None:
    settings = replace(SETTINGS, batch_dice=batch_dice, include_background=include_background, dice_weight=0.7, ce_weight=1.3)
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 2, 3, 4)
    labelled = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()
    labels = torch.randint(-1, 5, (3, 1, 2, 3, 4))
    for b in range(3):
        known = torch.tensor([-1, *(c for c in range(5) if labelled[b, c])])
        labels[b][~torch.isin(labels[b], known)] = -1
    loss = build_loss(settings)
    assert float(loss(logits, labels, labelled)) == pytest.approx(plain_partial(logits, labels, labelled, settings), rel=1e-5)
    whole = torch.randint(0, 5, (3, 1, 2, 3, 4))
    full = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(loss(logits, whole, full), loss(logits, whole))
    nothing = loss(logits, torch.full_like(labels, -1), labelled)
    assert torch.isfinite(nothing)


def test_partial_loss__tells_an_unlabelled_class_not_from_background() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    labels = torch.randint(0, 2, (2, 1, 3, 3, 3))
    labels[0, 0, 0] = -1
    labelled = torch.tensor([[True, True, False, False]] * 2)
    loss = partial_loss(logits, labels, labelled, SETTINGS)
    swapped = logits.detach()[:, [2, 1, 0, 3]]
    torch.testing.assert_close(partial_loss(swapped, labels, labelled, SETTINGS), loss.detach())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[0, :, 0].any()  # uncertain
    p = logits.detach().softmax(dim=1)
    for other in (2, 3):  # the gradient pushes background and the unlabelled classes together, in proportion to their share
        torch.testing.assert_close(gradient[:, other] * p[:, 0], gradient[:, 0] * p[:, other], rtol=1e-4, atol=1e-7)
    empty = partial_loss(logits, labels, torch.ones(2, 4, dtype=torch.bool), SETTINGS)
    (pressed,) = torch.autograd.grad(empty, logits)
    assert (pressed[:, 2][labels[:, 0] == 0] > 0).all()  # labelled and empty: pushed down


def test_frequencies__are_over_the_cases_that_label_a_structure() -> None:
    def volume(values: list[int], labelled: tuple[int, ...] | None) -> Volume:
        label = np.array([[values]], np.int16)
        return Volume(label[None], label == label, label, (1.0, 1.0, 1.0), np.eye(4), {}, labelled=labelled)

    volumes = [volume([0, 0, 1, 2], None), volume([0, 1, 1, -1], (1,))]
    assert class_frequencies(volumes, [0, 1, 2]) == pytest.approx([1 - (0.25 + 2 / 3) / 2 - 0.25, (0.25 + 2 / 3) / 2, 0.25])


def test_run__scores_only_what_is_labelled_and_says_what_was_counted(tmp_path: Path) -> None:
    lines = []
    for n, labelled in enumerate(("one", "", "one", "")):
        label, affine = write_image(tmp_path / f"image{n}", n)
        stored = label.astype(np.int16)
        stored[:2] = -1
        write_nifti(tmp_path / f"{n}.nii.gz", stored, affine)
        lines.append(f"image{n},{n}.nii.gz,{'train' if n < 2 else 'test'},{labelled}")
    cohort = table(tmp_path, lines, header="image,label,split,labelled")
    result = finetune(cohort, replace(SETTINGS, figures=2), tmp_path / "out")
    first, second = result.cases
    assert first.dice["two"] is None
    assert first.hd95_mm["two"] is None
    assert None not in (first.dice["one"], second.dice["one"], second.dice["two"])
    facts = json.loads((tmp_path / "out" / "labels.json").read_text())["cases"]
    assert {name: (case["flags"], case["labelled"]) for name, case in facts.items()} == {
        f"case000{n}": ([], [1] if n % 2 else None) for n in range(1, 5)
    }
    unsure = [facts[f"case000{n}"]["counts"].pop("uncertain_voxels") for n in range(1, 5)]
    edge = 2 * 18 * 16  # the two slices of -1; where structure 2 is unlabelled its few voxels are uncertain as well
    assert unsure[1] == unsure[3] == edge and unsure[0] > edge and not any(case["counts"] for case in facts.values())
    with np.load(tmp_path / "out" / "figures" / "segmentation.npz") as figures:
        assert set(np.unique(figures["label"])) <= {0, 1, 2}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    found = small_archive(tmp_path_factory.mktemp("query"), 4)
    rows = found.select()
    set_public(found, {row.series_id: {"split": side} for row, side in zip(rows, ("train", "train", "test", "val"))})
    return Archive.open(found.path)


def query(tmp_path: Path, **content: Any) -> Path:
    path = tmp_path / "query.json"
    path.write_text(json.dumps(content))
    return path


def test_query__takes_maps_by_series_id_and_attached_values(archive: Archive, tmp_path: Path) -> None:
    rows = archive.select()
    maps = tmp_path / "maps"
    maps.mkdir()
    label = np.zeros((8, 9, 2), np.uint8)
    label[2:5, 3:6] = 1
    affine = plain_affine((1.0, 1.0, 2.0))
    write_nifti(maps / f"{rows[0].series_id}.nii.gz", label, affine)
    write_dicom_seg(maps / f"{rows[2].series_id}.dcm", {"one": label == 1}, affine)
    attached = tmp_path / "attached.csv"
    attached.write_text(f"series_id,grade\n{rows[1].series_id},high\n{rows[2].series_id},low\n")
    path = query(tmp_path, index=str(archive.path), maps="maps", attached="attached.csv", labels=STRUCTURES)
    cohort = Cohort.load(path)
    assert [case.series_id for case in cohort.cases] == [row.series_id for row in rows[:3]]
    assert [case.split for case in cohort.cases] == ["train", "train", "test"]
    assert [dict(case.values) for case in cohort.cases] == [{}, {"grade": "high"}, {"grade": "low"}]
    assert cohort.left_out == 1
    assert [case.series_id for case in cohort.split("train")] == [rows[0].series_id]  # with a map
    reader = CaseReader("mri")
    for number in (0, 2):
        volume = reader(cohort.cases[number])
        assert volume.label is not None
        assert np.array_equal(volume.label, label)
    assert volume.labelled == (1,)
    assert volume.flags == ("frame_unverified",)
    flags = list(rows[2].quality_flags)
    set_public(archive, {rows[2].series_id: {"quality_flags": [*flags, "patient_unknown"]}})
    try:
        assert [case.patient_known for case in Cohort.load(path).cases] == [True, True, False]
    finally:
        set_public(archive, {rows[2].series_id: {"quality_flags": flags}})
    only = Cohort.load(query(tmp_path, index=str(archive.path), where="split = 'test'", maps="maps", labels=STRUCTURES))
    assert [case.series_id for case in only.cases] == [rows[2].series_id]


def test_query__wrong_requests(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    index = str(archive.path)
    for content, message in (
        ({"index": index, "map": "maps"}, r'unknown key map \(did you mean "maps"'),
        ({"index": index}, "a query without labels"),
        ({"index": index, "maps": "other"}, "no such folder"),
        ({"index": index, "maps": "maps"}, "4 series are selected and none has a label"),
    ):
        with pytest.raises(RequestError, match=message):
            Cohort.load(query(tmp_path, **content))
    row = archive.select()[0]
    label = np.zeros((8, 9, 2), np.uint8)
    write_nifti(tmp_path / "maps" / f"{row.series_id}.nii.gz", label, plain_affine((1.0, 1.0, 2.0)))
    set_public(archive, {row.series_id: {"split": "unknown"}})
    try:
        with pytest.raises(RequestError, match=f"series {row.series_id} is on no side of the split; run `medssl archive split`"):
            Cohort.load(query(tmp_path, index=index, maps="maps"))
    finally:
        set_public(archive, {row.series_id: {"split": "train"}})


def test_rules__without_a_list_number_names_by_file(tmp_path: Path) -> None:
    label, affine = write_image(tmp_path / "image")
    write_dicom_seg(tmp_path / "seg.dcm", {"b": label == 1, "a": label == 2}, affine)
    case = Case("case0001", tmp_path / "image", tmp_path / "seg.dcm", "p", "train", rules=LabelRules())
    volume = CaseReader("mri")(case)
    expected, _ = reorient(np.array([0, 2, 1])[label], affine, "RAS")
    assert volume.label is not None
    assert np.array_equal(volume.label, expected)


def test_predictions__lie_on_the_file_of_their_image(tmp_path: Path) -> None:
    import nibabel

    from medssl.evaluation.segmentation_results import write_prediction

    image, label = tiny_volume(0)
    affine = oblique_affine((1.0, 1.2, 2.0))
    stored, own = reorient(image, affine, "PIL")
    stored_label, _ = reorient(label, affine, "PIL")
    write_nifti(tmp_path / "image.nii.gz", stored, own)
    write_nifti(tmp_path / "map.nii.gz", stored_label, own)
    case = table(tmp_path, ["image.nii.gz,map.nii.gz,train"]).cases[0]
    volume = CaseReader("mri")(case)
    assert volume.label is not None
    write_prediction(tmp_path / "p.nii.gz", volume.label, volume, case)
    back = nibabel.load(tmp_path / "p.nii.gz")
    assert np.array_equal(np.asarray(back.dataobj), stored_label)
    np.testing.assert_array_equal(back.affine, nibabel.load(tmp_path / "image.nii.gz").affine)


def test_dicom_predictions__are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medssl.evaluation import segmentation_results as module

    for n in range(2):
        image, label = tiny_volume(n)
        write_nifti(tmp_path / f"i{n}.nii.gz", image, plain_affine())
        write_nifti(tmp_path / f"{n}.nii.gz", label, plain_affine())
    cohort = table(tmp_path, ["i0.nii.gz,0.nii.gz,train", "i1.nii.gz,1.nii.gz,test"])
    monkeypatch.setattr(module, "need_highdicom", lambda: None)
    with pytest.raises(RequestError, match="case case0002: DICOM-SEG predictions need images that are DICOM series"):
        finetune(cohort, replace(SETTINGS, dicom_seg=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_organs_under_other_names__are_refused_before_training(tmp_path: Path) -> None:
    lines = []
    for n in range(3):
        image, label = tiny_volume(n)
        write_nifti(tmp_path / f"i{n}.nii.gz", image, plain_affine())
        (tmp_path / f"L{n}").mkdir()
        for value, name in ((1, "liver"), (2, "DOE")):
            write_nifti(tmp_path / f"L{n}" / f"{name}.nii.gz", (label == value).astype(np.uint8), plain_affine())
        lines.append(f"i{n}.nii.gz,L{n},{('train', 'train', 'test')[n]}")
    cohort = table(tmp_path, lines, {"Leber": 1, "Milz": 2})
    with pytest.raises(RequestError, match="class Leber, Milz is labelled by none of the 2 training cases") as caught:
        finetune(cohort, SETTINGS, tmp_path / "out")
    assert "DOE" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="class Milz is labelled by none of the 2 training cases"):
        finetune(table(tmp_path, lines, {"liver": 1, "Milz": 2}), SETTINGS, tmp_path / "out")


def test_dicom_predictions__of_a_resampled_series_are_nifti(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra seg)")
    lines = []
    for n in range(3):
        image, label = tiny_volume(n)
        affine = plain_affine((1.0, 1.2, 2.0))
        if n == 1:
            affine[1, 2] += 0.6  # a tilted gantry
        write_dicom_series(tmp_path / f"image{n}", image, affine, uid_seed=f"labels {n}")
        if n == 1:
            seen = lookup("domain", "mri")().read(sorted((tmp_path / "image1").iterdir()), series_id="x")
            label, affine = (seen.image[0] > 400).astype(np.uint8), seen.affine
        write_nifti(tmp_path / f"{n}.nii.gz", label, affine)
        lines.append(f"image{n},{n}.nii.gz,{('train', 'test', 'test')[n]}")
    out = tmp_path / "out"
    summary = label_curve(
        table(tmp_path, lines), replace(SETTINGS, dicom_seg=True, figures=0), out, arms={"scratch": None}, counts=[1], seeds=[0]
    )
    cell = out / "cells" / "scratch_n1_s0"
    assert [path.name for path in (cell / "private" / "predictions").iterdir()] == ["case0003.dcm"]
    assert [path.name for path in (cell / "predictions").iterdir()] == ["case0002.nii.gz"]
    assert json.loads((cell / "results.json").read_text())["without_dicom_seg"] == ["case0002"]
    assert summary["without_dicom_seg"] == ["case0002"]
    said = "1 test case(s) have NIfTI for DICOM-SEG, as their series was resampled: case0002"
    assert said in summary_table(summary) and said in (out / "table.md").read_text()


def test_dicom_predictions__go_to_private(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed (extra seg)")
    lines = []
    for n in range(2):
        label, affine = write_image(tmp_path / f"image{n}", n)
        write_nifti(tmp_path / f"{n}.nii.gz", label, affine)
        lines.append(f"image{n},{n}.nii.gz,{('train', 'test')[n]}")
    finetune(table(tmp_path, lines), replace(SETTINGS, dicom_seg=True, figures=0), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "private" / "predictions").iterdir()] == ["case0002.dcm"]
    assert not (tmp_path / "out" / "predictions").exists()
