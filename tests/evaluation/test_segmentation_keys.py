"""Keys of segmentation recipes: layer-wise decay, class weights, mirrored views, early stopping, folds of patients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from medssl import api
from medssl.errors import MedsslError, RequestError
from medssl.evaluation import finetune as module
from medssl.evaluation.clinical import clinical_facts
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.finetune import build_network, finetune, predict, start_encoder
from medssl.evaluation.label_curve import label_curve
from medssl.evaluation.learning_rates import layer_scales, parameter_groups
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.segmentation_training import (
    as_classes,
    build_loss,
    class_weights,
    encoder_scales,
    partial_loss,
)
from medssl.evaluation.volumes import CaseReader
from medssl.networks.segmentation import encoder_parameters
from medssl.weights import load_part
from tests.evaluation.test_finetune import SETTINGS, pretrained
from tests.evaluation.tiny_cohort import TINY_ENCODER, write_cohort

VIT = {"name": "vit3d", "args": {"image_size": [16, 16, 16], "patch_size": 16, "hidden_size": 24, "num_heads": 2}}
SWIN = {"name": "swin3d", "args": {"feature_size": 12, "window_size": 2}}
RESENC = {"name": "resenc3d", "args": {"features_per_stage": [8, 12], "n_blocks_per_stage": [1, 1], "strides": [1, 2]}}
RESNET = {"name": "image2d", "args": {"model": "resnet18"}}
TINY_RESNET = {"name": "image2d", "args": {"model": "test_resnet"}}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_cohort(tmp_path_factory.mktemp("cohort")))


# --- layer-wise decay


@pytest.mark.parametrize(
    ("network", "encoder", "crop", "first", "last"),
    [
        ("segresnet", TINY_ENCODER, (64, 32, 32), ("convInit.conv.weight", 3), ("down_layers.1.1.conv1.conv.weight", 1)),
        ("unetr", VIT, (64, 32, 32), ("vit.patch_embedding.patch_embeddings.weight", 13), ("vit.blocks.11.mlp.linear1.weight", 1)),
        (
            "swin_unetr",
            SWIN,
            (64, 32, 32),
            ("swinViT.patch_embed.proj.weight", 5),
            ("swinViT.layers4.0.blocks.0.mlp.linear1.weight", 1),
        ),
        (
            "resenc_unet",
            RESENC,
            (16, 16, 16),
            ("encoder.stem.convs.0.conv.weight", 3),
            ("encoder.stages.1.blocks.0.conv1.conv.weight", 1),
        ),
        ("flexible_unet", RESNET, (64, 64), ("encoder.conv1.weight", 9), ("encoder.layer4.1.conv2.weight", 1)),
        (
            "pyramid",
            TINY_RESNET,
            (32, 32),
            ("pyramid.encoder.net.conv1.0.weight", 5),
            ("pyramid.encoder.net.layer4.0.conv1.weight", 1),
        ),
        (
            "pyramid",
            TINY_ENCODER,
            (16, 16, 16),
            ("pyramid.encoder.net.convInit.conv.weight", 3),
            ("pyramid.encoder.net.down_layers.1.1.conv1.conv.weight", 1),
        ),
    ],
)
def test_layer_decay__falls_from_the_decoder_to_the_stem(network: str, encoder: Any, crop: Any, first: Any, last: Any) -> None:
    settings = replace(SETTINGS, network=network, encoder=encoder, crop=crop, layer_decay=0.5)
    net = build_network(settings, n_classes=3, seed=0)
    scales = encoder_scales(net, start_encoder(settings, None, 0), settings, pretrained=True)
    assert {name: scales[name] for name, _ in (first, last)} == {name: 0.5**steps for name, steps in (first, last)}
    assert set(scales) == {name for name in encoder_parameters(net) if net.get_parameter(name).requires_grad}
    groups = parameter_groups(net, scales, 0.1)
    by_id = {id(p): group["scale"] for group in groups for p in group["params"]}
    names = dict(net.named_parameters())
    assert by_id[id(names[first[0]])] == 0.5 ** first[1]
    assert {group["scale"] for group in groups if not group["encoder"]} == {1.0}
    twin = encoder_scales(net, start_encoder(settings, None, 0), settings, pretrained=False)
    assert set(twin) == set(scales) and set(twin.values()) == {1.0}


def test_encoder_scales__miss_no_parameter_in_silence() -> None:
    settings = replace(SETTINGS, layer_decay=0.5)
    more = {"name": "segresnet3d", "args": {**TINY_ENCODER["args"], "blocks_down": [1, 2]}}
    net = build_network(replace(settings, encoder=more), n_classes=3, seed=0)
    match = r"6 of 20 parameters of the encoder in this SegResNet, down_layers\.1\.2\..* are not in SegResNet3D.*fault of medssl"
    with pytest.raises(MedsslError, match=match) as caught:
        encoder_scales(net, start_encoder(settings, None, 0), settings, pretrained=True)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("encoder", [TINY_ENCODER, SWIN], ids=["segresnet3d", "swin3d"])
def test_layer_scales__do_not_count_the_blocks_of_a_decoder(encoder: Any) -> None:
    scales = layer_scales(start_encoder(replace(SETTINGS, encoder=encoder, crop=(64, 32, 32)), None, 0), 0.5)
    inside = {name: s for name, s in scales.items() if name.startswith(("net.convInit", "net.down_layers", "net.swinViT"))}
    assert max(inside.values()) == 0.5  # the last stage is one step from the decoder, with or without a decoder inside


def test_layer_decay__slows_a_pretrained_encoder_and_leaves_the_scratch_twin(cohort: Cohort, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1, warmup_steps=0, weight_decay=0.0)
    moved: dict[Any, dict[str, float]] = {}
    for decay in (1.0, 0.1):
        for weights in (pretrained(), None):
            start = build_network(replace(settings, encoder=TINY_ENCODER), n_classes=3, seed=0).state_dict()
            finetune(cohort, replace(settings, layer_decay=decay), tmp_path / "run", weights=weights)
            state, _ = load_part(tmp_path / "run" / "network.safetensors")
            before = {**start, **(weights.state if weights else {})}
            moved[decay, weights is not None] = {key: float((state[key] - before[key]).abs().max()) for key in state}
    stem, head = "convInit.conv.weight", "conv_final.2.conv.weight"
    assert moved[0.1, True][stem] == pytest.approx(moved[1.0, True][stem] * 0.1**3, rel=1e-2)
    assert moved[0.1, True][head] == pytest.approx(moved[1.0, True][head], rel=1e-3)
    assert moved[0.1, False] == moved[1.0, False]


# --- class weights


def test_class_weights__are_a_weighted_mean_of_the_voxels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, 3), torch.randint(0, 3, (2, 1, 4, 5, 3))
    weights = torch.tensor([0.2, 1.0, 3.0])
    settings = replace(SETTINGS, dice_weight=0.0, ce_weight=1.0)
    losses = -logits.log_softmax(dim=1).gather(1, labels)
    expected = (weights[labels] * losses).sum() / weights[labels].sum()
    torch.testing.assert_close(build_loss(settings, weights)(logits, labels), expected)
    every = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(partial_loss(logits, labels, every, settings, weights), expected)
    unsure = labels.clone()
    unsure[0] = -1
    torch.testing.assert_close(
        partial_loss(logits, unsure, every, settings, weights), functional.cross_entropy(logits[1:], labels[1:, 0], weight=weights)
    )


def test_balanced_weights__have_a_mean_of_one_over_the_voxels() -> None:
    shares = [0.9, 0.08, 0.02]
    weights = class_weights(replace(SETTINGS, class_weights="balanced"), shares)
    assert weights is not None
    assert float((weights * torch.tensor(shares)).sum()) == pytest.approx(1.0)
    assert float(weights[2] / weights[0]) == pytest.approx(45.0)
    assert class_weights(SETTINGS, shares) is None
    assert class_weights(replace(SETTINGS, class_weights=(1, 2, 4)), shares).tolist() == [1, 2, 4]  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="2 numbers for 3 classes, background included"):
        class_weights(replace(SETTINGS, class_weights=(1, 2)), shares)


def test_class_weights__that_are_wrong_stop_the_run_before_it_writes(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="class_weights: 2 numbers for 3 classes"):
        finetune(cohort, replace(SETTINGS, class_weights=(1.0, 2.0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="class_weights: 'some'; none, balanced, or one number per class"):
        replace(SETTINGS, class_weights="some")


# --- mirrored views


def test_flips__make_a_prediction_that_mirrors_with_its_volume(cohort: Cohort) -> None:
    network = build_network(SETTINGS, n_classes=3, seed=0)
    volume = CaseReader("mri")(cohort.cases[0])
    mirrored = replace(volume, image=volume.image[:, ::-1].copy(), valid=volume.valid[::-1].copy())
    settings = replace(SETTINGS, overlap=0.0, crop=(20, 18, 16))
    plain = [predict(network, v, settings) for v in (volume, mirrored)]
    assert not np.array_equal(plain[0], plain[1][::-1])
    both = [predict(network, v, replace(settings, flips=(0,))) for v in (volume, mirrored)]
    assert (both[0] != both[1][::-1]).mean() < 1e-3  # sums in another order may tip a voxel
    with pytest.raises(RequestError, match="flips"):
        replace(SETTINGS, flips=(0, 0))


# --- early stopping


def test_patience__scores_the_best_state_and_says_who_chose_it(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merits = iter([0.3, 0.7, 0.6, 0.5, 0.9])
    states: list[dict[str, torch.Tensor]] = []

    def validation(run: Any, cases: Any) -> dict[str, float | None]:
        states.append({key: value.clone() for key, value in run.network.state_dict().items()})
        return {"structure_1": next(merits), "structure_2": None}

    monkeypatch.setattr(module, "_validation_dice", validation)
    result = finetune(cohort, replace(SETTINGS, steps=10, val_every=1, patience=2), tmp_path)
    assert [line["step"] for line in result.curve] == [1, 2, 3, 4]
    assert result.choice == "step 2, the best of 1 validation cases"
    state, _ = load_part(tmp_path / "network.safetensors")
    assert all(torch.equal(state[key], value) for key, value in states[1].items())


def test_patience__without_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="patience: 2; 1 or more, with val_every"):
        replace(SETTINGS, patience=2)
    cohort = Cohort.load(write_cohort(tmp_path / "cohort", val=0))
    with pytest.raises(RequestError, match="patience needs labelled validation cases"):
        finetune(cohort, replace(SETTINGS, val_every=1, patience=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropout__is_drawn_from_the_seed_of_the_run(cohort: Cohort, tmp_path: Path) -> None:
    settings = replace(SETTINGS, network_args={"dropout_prob": 0.5})
    losses = []
    for number in (0, 1):
        torch.manual_seed(number)  # what else the process has drawn says nothing
        losses.append([line["loss"] for line in finetune(cohort, settings, tmp_path / str(number)).curve])
    assert losses[0] == losses[1]


# --- folds


def patients_of(cases: list[Case]) -> set[str]:
    return {case.patient for case in cases}


def test_folds__test_every_labelled_patient_once(cohort: Cohort) -> None:
    twice = [replace(case, patient=f"p{number // 2}", patient_known=True) for number, case in enumerate(cohort.cases)]
    cohort = replace(cohort, cases=tuple(twice))
    dealt = [cohort.dealt(3, 0, fold) for fold in range(3)]
    assert sorted(case.id for one in dealt for case in one.split("test")) == sorted(case.id for case in cohort.cases)
    for one in dealt:
        sides = [patients_of(one.split(side)) for side in ("train", "val", "test")]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert any(cohort.dealt(3, seed, 0) != dealt[0] for seed in range(1, 6))
    with pytest.raises(RequestError, match="4 folds of 3 labelled patients; ask for 3 or fewer"):
        cohort.dealt(4, 0, 0)
    some = replace(cohort, cases=(replace(twice[0], patient_known=False), *twice[1:]))
    with pytest.raises(RequestError, match=f"folds: 1 of {len(twice)} labelled series have no usable patient identity"):
        some.dealt(3, 0, 0)
    none = replace(cohort, cases=tuple(replace(case, patient_known=False) for case in twice))
    assert none.dealt(3, 0, 0).split("test")


def test_folds__are_one_test_set_of_a_curve_and_of_the_page(cohort: Cohort, tmp_path: Path) -> None:
    settings = FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), steps=1, warmup_steps=0, figures=0)
    summary = label_curve(cohort, settings, tmp_path, arms={"scratch": None}, counts=[2], seeds=[0], folds=3)
    assert summary["cells"] == {"planned": 3, "done": 3}
    (row,) = summary["rows"]
    assert row["n_test"] == len(cohort.cases) and row["seeds"] == [0]
    cells = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("cells/*/results.json"))]
    scores = {
        case["id"]: np.nanmean([v for v in case["dice"].values() if v is not None]) for cell in cells for case in cell["cases"]
    }
    assert row["dice"] == pytest.approx(np.mean(list(scores.values())))
    facts = clinical_facts(cells, draws=20)
    assert facts["folds"] == 3 and facts["headlines"][0]["n_cases"] == len(cohort.cases)
    (tmp_path / "cells" / "scratch_n2_s0_f1" / "results.json").unlink()
    with pytest.raises(RequestError, match=r"folds 3 \(now None\)"):
        label_curve(cohort, settings, tmp_path, arms={"scratch": None}, counts=[2], seeds=[0])
    with pytest.raises(RequestError, match="3 labelled training cases asked for"):
        label_curve(cohort, settings, tmp_path / "b", arms={"scratch": None}, counts=[3], seeds=[0], folds=3)
    assert not (tmp_path / "b").exists()


def test_unfinished_folds__are_left_out_of_the_table(cohort: Cohort, tmp_path: Path) -> None:
    settings = FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), steps=1, warmup_steps=0, figures=0)

    def stop(number: int, total: int, cell: Any, result: Any) -> None:
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_curve(cohort, settings, tmp_path, arms={"scratch": None}, counts=[2], seeds=[0, 1], folds=3, on_cell=stop)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cells"] == {"planned": 6, "done": 4} and summary["rows"][0]["seeds"] == [0]


def test_folds__are_a_key_of_the_recipe(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort")
    recipe = {
        "kind": "finetune", "cohort": {"path": str(folder), "domain": "mri"}, "network": "segresnet",
        "encoder": {"name": "segresnet3d", **TINY_ENCODER["args"]}, "folds": 3, "out": str(tmp_path / "out"),
        "settings": {"crop": [16, 16, 16], "steps": 1, "warmup_steps": 0, "figures": 0, "device": "cpu"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    summary = api.finetune(path, None)
    assert summary["cells"] == {"planned": 3, "done": 3} and summary["rows"][0]["labels"] == 2
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    for wrong, counts, match in ((["folds=9"], None, "9 folds of 6 labelled patients"), ([], [5], "5 labelled training cases")):
        with pytest.raises(RequestError, match=match):
            api.label_curve(path, None, [*wrong, f"out={tmp_path / 'refused'}"], counts=counts, seeds=[0])
        assert not (tmp_path / "refused").exists()


# --- values with gaps


def test_label_values__with_gaps_are_classes_without(tmp_path: Path) -> None:
    import nibabel

    folder = write_cohort(tmp_path / "cohort")
    plain = finetune(Cohort.load(folder), SETTINGS, tmp_path / "plain")
    for path in (folder / "labels").iterdir():
        image = nibabel.load(path)
        label = np.array([0, 7, 255], dtype=np.uint8)[np.asarray(image.dataobj)]
        nibabel.save(nibabel.Nifti1Image(label, image.affine, image.header), path)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "edge": 7, "lesion": 255}}))
    settings = replace(SETTINGS, predictions=True)
    gaps = finetune(Cohort.load(folder), settings, tmp_path / "gaps")
    _, manifest = load_part(tmp_path / "gaps" / "network.safetensors")
    assert manifest["out_channels"] == 3 and manifest["label_values"] == [0, 7, 255]
    assert manifest["structures"] == {"7": "edge", "255": "lesion"}
    assert [line["loss"] for line in gaps.curve] == [line["loss"] for line in plain.curve]
    assert [list(c.dice.values()) for c in gaps.cases] == [list(c.dice.values()) for c in plain.cases]
    for path in (tmp_path / "gaps" / "predictions").iterdir():
        assert set(np.unique(np.asarray(nibabel.load(path).dataobj))) <= {0, 7, 255}


def test_classes__keep_what_is_uncertain() -> None:
    labels = torch.tensor([[-1, 0, 255], [7, 0, -1]])
    assert as_classes(labels, [0, 7, 255]).tolist() == [[-1, 0, 2], [1, 0, -1]]
    assert as_classes(labels.clamp(max=1), [0, 1]).tolist() == labels.clamp(max=1).tolist()


def test_folds__have_one_set_of_classes_where_none_is_listed(tmp_path: Path) -> None:
    import nibabel

    folder = write_cohort(tmp_path / "cohort")
    for n in range(1, 6):  # only the first case has structure 2
        path = folder / "labels" / f"v{n}.nii.gz"
        image = nibabel.load(path)
        label = np.asarray(image.dataobj)
        nibabel.save(nibabel.Nifti1Image(np.where(label == 2, 0, label).astype(np.uint8), image.affine, image.header), path)
    settings = FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), steps=1, warmup_steps=0, figures=0)
    with pytest.raises(
        RequestError, match=r"class structure_2 has no voxel in the 2 training cases of a fold; .* ask for fewer folds"
    ):
        label_curve(Cohort.load(folder), settings, tmp_path / "out", arms={"scratch": None}, counts=[2], seeds=[0], folds=3)


def test_folds__learn_from_other_cases_for_every_seed(cohort: Cohort) -> None:
    first = {tuple(case.id for case in cohort.dealt(3, seed, 0).first(1)) for seed in range(8)}
    assert len(first) > 1
    twins = replace(cohort, cases=tuple(replace(case, patient=f"p{n // 2}") for n, case in enumerate(cohort.cases)))
    (a, b) = twins.dealt(3, 0, 0).first(2)
    assert a.patient == b.patient  # two labels are of one patient where that is enough


def test_a_class_of_no_weight__leaves_a_loss_that_is_a_number() -> None:
    logits, labels = torch.randn(1, 3, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64)
    loss = build_loss(SETTINGS, torch.tensor([0.0, 1.0, 1.0]))(logits, labels)
    assert torch.isfinite(loss)
    for wrong in ((0.0, 0.0), None, 2, ()):
        with pytest.raises(RequestError, match="class_weights"):
            replace(SETTINGS, class_weights=wrong)  # type: ignore[arg-type]


def test_values__of_one_rater_alone_are_classes_too(tmp_path: Path) -> None:
    import nibabel

    folder = write_cohort(tmp_path / "cohort", train=2, val=0, test=1)
    image = nibabel.load(folder / "labels" / "v0.nii.gz")
    other = np.asarray(image.dataobj).copy()
    other[other == 2] = 9
    nibabel.save(nibabel.Nifti1Image(other, image.affine, image.header), folder / "labels" / "other.nii.gz")
    rows = ["image,label,label_2,label_3,split"]
    rows += [f"images/v{n}.nii.gz,labels/v{n}.nii.gz,{'labels/other.nii.gz,labels/v0.nii.gz' if n == 0 else ','},{side}"
             for n, side in enumerate(("train", "train", "test"))]  # fmt: skip
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    settings = replace(SETTINGS, raters="draw", steps=8)
    result = finetune(Cohort.load(folder / "table.csv"), settings, tmp_path / "out")
    assert result.structures == ["structure_1", "structure_2", "structure_9"]


def test_a_listed_minus_one__is_uncertain_and_no_class(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort")
    names = {"background": 0, "uncertain": -1, "a": 1, "b": 2}
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    assert Cohort.load(folder).structures == {1: "a", 2: "b"}
    (folder / "dataset.json").write_text(json.dumps({"labels": {**names, "strange": -3}}))
    with pytest.raises(RequestError, match="value -3; structures are 1 or more"):
        Cohort.load(folder)


def test_normalisation__of_any_source_of_a_joint_run_is_accepted(cohort: Cohort, tmp_path: Path) -> None:
    weights = pretrained(intensity={"normalize": {"window": [0, 255]}})
    views = {"chest": {"normalize": {"window": [0, 255]}}, "mr": {"normalize": "zscore"}}
    joint = replace(weights, manifest={**weights.manifest, "views": views})
    assert finetune(cohort, SETTINGS, tmp_path / "joint", weights=joint).cases
    with pytest.raises(RequestError, match=r"pretrained with normalize .*window.* or zscore, the settings say minmax"):
        finetune(cohort, replace(SETTINGS, normalize="minmax"), tmp_path / "other", weights=joint)
