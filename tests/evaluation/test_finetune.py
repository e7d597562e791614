from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.errors import GeometryError, ImageError, RequestError, TrainingStopped, WeightsError
from medssl.evaluation import finetune as finetune_module
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import Pretrained, build_network, finetune, load, open_weights, predict, start_encoder
from medssl.evaluation.learning_rates import parameter_groups, set_learning_rates
from medssl.evaluation.segmentation_results import FinetuneResult
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.segmentation_training import build_loss, case_order, class_frequencies, encoder_scales
from medssl.evaluation.volumes import CaseReader, TrainingCrops
from medssl.networks.segmentation import encoder_parameters
from medssl.weights import load_part, save_part
from tests.evaluation.tiny_cohort import TINY_ENCODER, tiny_volume, write_cohort, write_nifti

SETTINGS = FinetuneSettings(
    encoder=TINY_ENCODER,
    crop=(16, 16, 16),
    steps=3,
    batch=2,
    lr=3e-3,
    warmup_steps=1,
    log_every=1,
    augment={"rotate_deg": 10, "noise_std": 0.1},
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_cohort(tmp_path_factory.mktemp("cohort")))


def pretrained(seed: int = 5, intensity: Any = None, **facts: Any) -> Pretrained:
    torch.manual_seed(seed)
    encoder = SegResNet3D(**TINY_ENCODER["args"])
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith(("convInit.", "down_layers."))}
    manifest = {
        "library": encoder.library,
        "key_groups": encoder.key_groups,
        "encoder": encoder.config(),
        "weights_hash": f"hash{seed}",
        "axis_order": "XYZ-RAS",
        "channels": 1,
        "intensity": intensity or {"normalize": "zscore"},
        **facts,
    }
    return Pretrained(state, manifest)


def test_twin__shares_decoder_head_and_nothing_of_the_encoder() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    scratch = build_network(SETTINGS, n_classes=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched
    torch.manual_seed(7)
    twin = build_network(SETTINGS, n_classes=3, seed=1)
    load(twin, pretrained())
    inside = encoder_parameters(twin)
    weights = [name for name in inside if "conv" in name and name.endswith("weight")]
    for name, value in twin.named_parameters():
        if name not in inside:
            assert torch.equal(value, scratch.get_parameter(name)), name
    assert len(weights) > 3
    assert not any(torch.equal(twin.get_parameter(name), scratch.get_parameter(name)) for name in weights)
    other = build_network(SETTINGS, n_classes=3, seed=2)
    assert not torch.equal(other.get_parameter("convInit.conv.weight"), scratch.get_parameter("convInit.conv.weight"))


def test_twin__sees_the_same_batches(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[np.ndarray]] = []
    original = TrainingCrops.batch

    def spy(self: Any, volumes: Any, step: int) -> Any:
        images, labels = original(self, volumes, step)
        seen[-1].append(images.numpy().copy())
        seen[-1].append(labels.numpy().copy())
        return images, labels

    monkeypatch.setattr(TrainingCrops, "batch", spy)
    results = []
    for weights in (None, pretrained()):
        seen.append([])
        results.append(finetune(cohort, SETTINGS, tmp_path / str(len(seen)), seed=3, weights=weights))
    assert len(seen[0]) == 2 * SETTINGS.steps
    assert all(np.array_equal(a, b) for a, b in zip(*seen))
    assert not np.array_equal(seen[0][0], seen[0][2])  # another step, another batch
    assert [result.arm for result in results] == ["scratch", "pretrained"]
    assert results[0].curve[0]["loss"] != results[1].curve[0]["loss"]
    assert results[0].loaded is None
    assert results[1].loaded is not None
    assert results[1].loaded["missing"] == results[1].loaded["unexpected"] == 0


def test_equal_seeds__give_equal_bits(cohort: Cohort, tmp_path: Path) -> None:
    first = finetune(cohort, SETTINGS, tmp_path / "a", labels=2, seed=4)
    second = finetune(cohort, replace(SETTINGS, val_every=1), tmp_path / "b", labels=2, seed=4)
    assert [line["loss"] for line in first.curve] == [line["loss"] for line in second.curve]
    one, two = (load_part(tmp_path / name / "network.safetensors")[0] for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)  # scoring validation cases changes nothing
    assert set(second.curve[0]["val_dice"]) == {"structure_1", "structure_2"}
    third = finetune(cohort, SETTINGS, tmp_path / "c", labels=2, seed=5)
    assert third.curve[0]["loss"] != first.curve[0]["loss"]


@pytest.mark.slow
def test_two_phantoms__are_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    write_cohort(folder, train=2, val=0, test=2)
    for kind in ("images", "labels"):  # the test cases are copies of the training cases
        for source, target in ((0, 2), (1, 3)):
            (folder / kind / f"v{target}.nii.gz").write_bytes((folder / kind / f"v{source}.nii.gz").read_bytes())
    settings = replace(SETTINGS, steps=50, batch=1, lr=1e-2, warmup_steps=5, augment={}, log_every=10)
    result = finetune(Cohort.load(folder), settings, tmp_path / "out", seed=0)
    assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    assert min(result.mean("dice").values()) > 0.85
    assert max(result.mean("hd95_mm").values()) < 4


def test_folder__holds_what_the_report_and_the_loader_read(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = replace(SETTINGS, predictions=True, figures=2)
    result = finetune(cohort, settings, out, labels=1, seed=0, weights=pretrained(), arm="ours")
    content = json.loads((out / "results.json").read_text())
    assert FinetuneResult.from_json(content).to_json() == content
    assert (content["arm"], content["labels"], content["n_test"]) == ("ours", 1, 2)
    assert content["mean"]["dice"] == result.mean("dice")
    assert content["choice"].startswith("last")
    assert "v4" not in (out / "results.json").read_text()  # no file name of a case
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    state, manifest = load_part(out / "network.safetensors")
    assert manifest["pretrained"] == "hash5"
    network = build_network(settings, n_classes=manifest["out_channels"], seed=11)
    network.load_state_dict(state)
    with np.load(out / "figures" / "segmentation.npz") as arrays:
        assert arrays["image"].shape == arrays["label"].shape == arrays["prediction"].shape == (2, 20, 18, 16)
        np.testing.assert_array_equal(arrays["label"][0], tiny_volume(4)[1])
        np.testing.assert_array_equal(arrays["spacing_mm"], [[1, 1, 2]] * 2)
        assert list(arrays["structures"]) == ["structure_1", "structure_2"]
    volume = CaseReader("mri")(cohort.split("test")[0])
    import nibabel

    written = nibabel.load(out / "predictions" / f"{cohort.split('test')[0].id}.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), predict(network, volume, settings))
    np.testing.assert_allclose(written.affine, volume.affine)
    first = content["cases"][0]
    assert first["reference_ml"]["structure_1"] == pytest.approx(6**3 * 0.002)  # a box of 6 voxels, 1 x 1 x 2 mm each
    assert first["volume_ml"]["structure_2"] == pytest.approx(float((np.asarray(written.dataobj) == 2).sum()) * 0.002)
    assert first["outside"] == [] and content["training_range"]["knn_limit"] is None  # one training case says nothing of distances
    assert content["training_range"]["spacing_mm"] == [[1, 1, 2], [1, 1, 2]]
    with np.load(out / "figures" / "worst.npz") as arrays:
        scores = {case.id: case.mean_dice for case in result.cases}
        assert list(arrays["case"]) == sorted(scores, key=lambda name: scores[name]) and arrays["0_axial_label"].shape == (20, 18)
    names = out / "private" / "cases.csv"
    assert names.stat().st_mode & 0o777 == 0o600
    assert f"{cohort.split('test')[0].id},v4.nii.gz,v4" in names.read_text()


def test_test_labels__are_scored_after_the_last_step_and_choose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = finetune_module.score_case
    monkeypatch.setattr(finetune_module, "score_case", lambda *args: (order.append("score"), original(*args))[1])
    results, networks = [], []
    for name in ("one", "other"):
        folder = write_cohort(tmp_path / name)
        if name == "other":
            for n in (4, 5):  # its test cases
                write_nifti(folder / "labels" / f"v{n}.nii.gz", np.array([0, 2, 1], np.uint8)[tiny_volume(n + 10)[1]])
        settings = replace(SETTINGS, val_every=1, patience=2, class_weights="balanced")
        said = lambda step, steps, values: order.append(f"step {step}/{steps}")  # noqa: E731
        results.append(finetune(Cohort.load(folder), settings, tmp_path / f"out {name}", on_step=said))
        networks.append(load_part(tmp_path / f"out {name}" / "network.safetensors", "network")[0])
        assert order.index("score") > max(n for n, what in enumerate(order) if what.startswith("step"))
        order.clear()
    assert results[0].curve == results[1].curve and results[0].choice == results[1].choice
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])
    assert [case.dice for case in results[0].cases] != [case.dice for case in results[1].cases]


def test_faults_of_test_labels__are_said_together_before_the_first_step(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "a", "2": "b"}}))
    unknown = tiny_volume(4)[1]
    unknown[unknown == 2] = 7
    write_nifti(folder / "labels" / "v4.nii.gz", unknown)
    cohort = Cohort.load(folder)
    with pytest.raises(ImageError, match=r"^case case0005: its label map holds the value 7, which stands for no structure"):
        finetune(cohort, SETTINGS, tmp_path / "out", on_step=lambda *_: pytest.fail("trained"))
    write_nifti(folder / "labels" / "v3.nii.gz", tiny_volume(3)[1][:, :, :-1])
    (folder / "images" / "v5.nii.gz").write_bytes(b"no image")
    with pytest.raises(
        ImageError, match=r"^3 of 3 cases cannot be used: case case0004: .*; case case0005: .*; case case0006: "
    ) as caught:
        finetune(cohort, SETTINGS, tmp_path / "out", on_step=lambda *_: pytest.fail("trained"))
    assert not any(f"v{n}" in str(caught.value) for n in (3, 4, 5))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listed", "labels", "message"),
    [
        (
            {"a": 1, "b": 2, "c": 3},
            {},
            "class c has no voxel in the 3 training cases; give more labels, correct the labels, or leave the class",
        ),
        ({"a": 1, "b": 2}, {0: 0, 1: 0, 2: 0}, "class a, b has no voxel in the 3 training cases"),
        (None, {2: 1}, "class structure_2 has no voxel in the 1 training cases"),
        ({"a": 1, "b": 2}, {4: 0, 5: 0}, "none of the 2 test cases has a voxel of a structure"),
    ],
    ids=["class in no map", "empty", "few labels", "empty test"],
)
def test_structures_that_cannot_be_learnt_or_scored__are_refused(
    tmp_path: Path, listed: dict[str, int] | None, labels: dict[int, int], message: str
) -> None:
    folder = write_cohort(tmp_path / "cohort")
    if listed:
        (folder / "dataset.json").write_text(json.dumps({"labels": listed}))
    for n, highest in labels.items():
        label = tiny_volume(n)[1]
        write_nifti(folder / "labels" / f"v{n}.nii.gz", np.where(label > highest, 0, label).astype(np.uint8))
    cohort = Cohort.load(folder)
    few = 1 if listed is None else None  # case v2 has rank 1
    with pytest.raises(RequestError, match=message):
        finetune(cohort, SETTINGS, tmp_path / "out", labels=few, on_step=lambda *_: pytest.fail("trained"))
    assert not (tmp_path / "out").exists()
    if few:
        finetune(cohort, SETTINGS, tmp_path / "all")


def test_case_of_another_kind__is_flagged_outside_the_training_range(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", train=4, test=2)
    image, label = tiny_volume(6)
    write_nifti(folder / "images" / "v6.nii.gz", np.roll(image, 5, axis=0)[::-1] * -1, (1.0, 1.0, 5.0))
    write_nifti(folder / "labels" / "v6.nii.gz", label, (1.0, 1.0, 5.0))
    result = finetune(Cohort.load(folder), SETTINGS, tmp_path / "run", seed=0, weights=pretrained())
    like, unlike = (case.outside or [] for case in result.cases)
    assert "spacing" not in [flag["by"] for flag in like]
    assert unlike[0] == {"by": "spacing", "reason": "voxel size 5 mm along axis 3, in training 2 mm"}
    assert "knn" in [flag["by"] for flag in unlike] and result.training_range["n"] == result.training_range["n_patients"] == 4


def groups_of(settings: FinetuneSettings, *, pretrained: bool) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    network = build_network(settings, n_classes=3, seed=0)
    factors = encoder_scales(network, start_encoder(settings, None, 0), settings, pretrained=pretrained)
    return network, parameter_groups(network, factors, 0.1)


def test_learning_rates__warm_up_freeze_and_decay() -> None:
    settings = replace(SETTINGS, steps=100, lr=1.0, warmup_steps=10, freeze_steps=20, encoder_lr_scale=0.1)

    def rates(pretrained: bool) -> list[tuple[float, float]]:
        optimizer = torch.optim.SGD(groups_of(settings, pretrained=pretrained)[1], lr=settings.lr)
        found = []
        for step in range(100):
            found.append(set_learning_rates(optimizer, step, settings, pretrained=pretrained))
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(found[-1][0] if group["encoder"] else found[-1][1])
        return found

    scratch = rates(False)
    assert scratch[0] == (0.1, 0.1)
    assert scratch[9] == scratch[10] == (1.0, 1.0)
    assert scratch[55][1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert all(encoder == rest for encoder, rest in scratch)
    ours = rates(True)
    assert all(encoder == 0 for encoder, _ in ours[:20])
    assert ours[19][1] == 1.0
    assert ours[20] == pytest.approx((0.01, 0.1))  # the second warm-up
    assert ours[30] == pytest.approx((0.1, 1.0))
    assert ours[99][1] < 1e-2


def test_frozen_encoder__keeps_its_weights_while_gradients_flow(cohort: Cohort, tmp_path: Path) -> None:
    weights = pretrained()
    settings = replace(SETTINGS, steps=3, freeze_steps=2, warmup_steps=0)
    finetune(cohort, replace(settings, encoder_lr_scale=0.0), tmp_path / "frozen", weights=weights)
    state, _ = load_part(tmp_path / "frozen" / "network.safetensors")
    assert all(torch.equal(state[key], value) for key, value in weights.state.items())
    finetune(cohort, settings, tmp_path / "free", weights=weights)
    state, _ = load_part(tmp_path / "free" / "network.safetensors")
    assert not any(torch.equal(state[key], v) for key, v in weights.state.items() if key.endswith("conv.weight"))


def test_parameter_groups__decay_no_norm_and_no_bias() -> None:
    network, groups = groups_of(SETTINGS, pretrained=True)
    total = sum(p.numel() for group in groups for p in group["params"])
    assert total == sum(p.numel() for p in network.parameters())
    inside = encoder_parameters(network)
    of_encoder = {id(p) for group in groups if group["encoder"] for p in group["params"]}
    assert of_encoder == {id(p) for name, p in network.named_parameters() if name in inside}
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unetr__is_fine_tuned_too(cohort: Cohort, tmp_path: Path, precision: str) -> None:
    args = {"image_size": [16, 16, 16], "patch_size": 16, "hidden_size": 24, "num_heads": 2}
    settings = replace(
        SETTINGS,
        network="unetr",
        network_args={"feature_size": 4},
        encoder={"name": "vit3d", "args": args},
        crop=(32, 16, 16),
        steps=2,
        precision=precision,
    )
    result = finetune(cohort, settings, tmp_path, labels=1)
    assert len(result.curve) == 2
    assert all(math.isfinite(line["loss"]) for line in result.curve)
    assert len(result.cases) == 2


def test_loss__equals_a_plain_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, 3), torch.randint(0, 3, (2, 1, 4, 5, 3))
    p = logits.softmax(dim=1)
    terms = []
    for k in (1, 2):
        t = (labels[:, 0] == k).float()
        terms.append(1 - (2 * (p[:, k] * t).sum() + 1e-5) / (p[:, k].sum() + t.sum() + 1e-5))
    chosen = p.gather(1, labels)[:, 0]
    expected = 0.5 * sum(terms) / 2 + 2.0 * (-chosen.log()).mean()
    loss = build_loss(replace(SETTINGS, dice_weight=0.5, ce_weight=2.0))(logits, labels)
    torch.testing.assert_close(loss, expected)


def test_class_frequencies__are_means_over_volumes(cohort: Cohort) -> None:
    reader = CaseReader("mri")
    volumes = [reader(case) for case in cohort.first(2)]
    labels = [tiny_volume(int(case.patient[1:]))[1] for case in cohort.first(2)]
    expected = [np.mean([np.mean(label == k) for label in labels]) for k in range(4)]
    assert class_frequencies(volumes, [0, 1, 2, 3]) == pytest.approx(expected)
    assert expected[3] == 0


def test_case_order__shows_each_case_equally_often() -> None:
    order = case_order(5, seed=3)
    taken = [next(order) for _ in range(20)]
    assert [sorted(taken[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert taken[:5] != taken[5:10] or taken[5:10] != taken[10:15]


def test_predict__is_the_same_with_one_window_and_covers_other_spacing(cohort: Cohort) -> None:
    network = build_network(SETTINGS, n_classes=3, seed=0)
    volume = CaseReader("mri")(cohort.cases[0])
    label = predict(network, volume, replace(SETTINGS, crop=(32, 32, 32)))
    assert label.shape == (20, 18, 16)
    assert label.dtype == np.int16
    assert predict(network, volume, replace(SETTINGS, spacing_mm=(2.0, 2.0, 2.0))).shape == (20, 18, 16)


def test_open_weights__takes_the_decoder_when_asked(tmp_path: Path) -> None:
    encoder = SegResNet3D(**TINY_ENCODER["args"])
    full = encoder.net.state_dict()
    manifest = dict(pretrained().manifest)
    save_part(tmp_path / "weights" / "last", "encoder", pretrained().state, manifest)
    (tmp_path / "weights" / "index.json").write_text('{"default": "encoder"}')
    with pytest.raises(WeightsError, match=r"transfer encoder_decoder: .*set transfer: encoder"):
        open_weights(tmp_path, transfer="encoder_decoder")
    decoder = {k: v for k, v in full.items() if k.startswith(("up_samples.", "up_layers."))}
    save_part(tmp_path / "weights" / "last", "decoder", decoder, manifest)
    both = open_weights(tmp_path, transfer="encoder_decoder")
    assert both.decoder_state is not None
    assert set(both.decoder_state) == set(decoder)
    report = load(build_network(SETTINGS, n_classes=3, seed=0), both)
    assert report.matched == len(both.state) + len(decoder)
    assert open_weights(tmp_path).decoder_state is None


def test_settings__report_all_faults_and_unknown_keys() -> None:
    with pytest.raises(RequestError, match=r"transfer: 'all'; encoder or encoder_decoder; .*precision: 'fp16'"):
        FinetuneSettings(transfer="all", precision="fp16")
    with pytest.raises(RequestError, match=r'unknown key stpes \(did you mean "steps"\?\)'):
        FinetuneSettings.from_dict({"stpes": 3})
    assert FinetuneSettings.from_dict({"crop": [16, 16, 16]}).crop == (16, 16, 16)


def test_wrong_requests__say_what_to_do(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no encoder is named"):
        finetune(cohort, replace(SETTINGS, encoder=None), tmp_path)
    vit = {"name": "vit3d", "args": {}}
    with pytest.raises(WeightsError, match="weights are of encoder segresnet3d, the settings name vit3d"):
        finetune(cohort, replace(SETTINGS, encoder=vit), tmp_path, weights=pretrained())
    with pytest.raises(RequestError, match=r"pretrained with normalize percentile.*set normalize: percentile"):
        finetune(cohort, SETTINGS, tmp_path, weights=pretrained(intensity={"normalize": "percentile"}))
    of_2_mm = {"spacing_mm": [2.0, 2.0, 2.0], "spacing_source": "views"}
    with pytest.raises(
        RequestError, match=r"pretrained at 2 x 2 x 2 mm.*have a median of 1 x 1 x 2 mm: set spacing_mm: \[2.0, 2.0, 2.0\]"
    ):
        finetune(cohort, SETTINGS, tmp_path, weights=pretrained(**of_2_mm))
    with pytest.raises(RequestError, match=r"pretrained at 2 x 2 x 2 mm, the settings ask for 1 x 1 x 1 mm"):
        finetune(cohort, replace(SETTINGS, spacing_mm=(1.0, 1.0, 1.0)), tmp_path, weights=pretrained(**of_2_mm))
    with pytest.raises(RequestError, match=r"axis order ZYX-SAR, segresnet3d gets XYZ-RAS here.*force: true"):
        finetune(cohort, SETTINGS, tmp_path, weights=pretrained(axis_order="ZYX-SAR"))
    alone = Cohort("x", tuple(case for case in cohort.cases if case.split == "train"))
    with pytest.raises(
        RequestError,
        match="no labelled test cases; mark some as test in its table, or have every patient tested once with folds: 5",
    ):
        finetune(alone, SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_images_than_those_of_the_pretraining__are_taken_where_forced_and_the_result_says_so(
    cohort: Cohort, tmp_path: Path
) -> None:
    other = pretrained(
        intensity={"normalize": "percentile"}, axis_order="ZYX-SAR", spacing_mm=[2.0, 2.0, 2.0], spacing_source="views"
    )
    settings = replace(SETTINGS, steps=2, val_every=0, force=True)
    result = finetune(cohort, settings, tmp_path / "forced", labels=1, weights=other)
    written = json.loads((tmp_path / "forced" / "results.json").read_text())["forced"]
    assert written == result.forced and [said.split(":")[-1] for said in written] == [
        " save or convert them in XYZ-RAS",
        " percentile",
        " [2.0, 2.0, 2.0]",
    ]
    near = pretrained(spacing_mm=[1.05, 0.95, 2.1], spacing_source="views")  # scanners that are set to the same
    assert finetune(cohort, replace(settings, force=False), tmp_path / "near", labels=1, weights=near).forced == []
    summary = pretrained(spacing_mm=[2.0, 2.0, 2.0], spacing_source="median of the items")  # a summary is no rule
    assert finetune(cohort, replace(settings, force=False), tmp_path / "own", labels=1, weights=summary).forced == []


def test_nan_loss__stops_with_advice(cohort: Cohort, tmp_path: Path) -> None:
    weights = pretrained()
    broken = {key: torch.full_like(value, float("nan")) for key, value in weights.state.items()}
    with pytest.raises(TrainingStopped, match=r"the loss is nan at step 0.*lower lr"):
        finetune(cohort, SETTINGS, tmp_path, weights=Pretrained(broken, weights.manifest))
    assert not (tmp_path / "results.json").exists()


def test_label_on_another_grid__is_refused_by_case_id(tmp_path: Path) -> None:
    write_cohort(tmp_path, train=1, val=0, test=1)
    _, label = tiny_volume(0)
    write_nifti(tmp_path / "labels" / "v0.nii.gz", label, (1.0, 1.0, 3.0))
    cohort = Cohort.load(tmp_path)
    with pytest.raises(GeometryError, match=f"case {cohort.cases[0].id}: label map") as caught:
        CaseReader("mri")(cohort.cases[0])
    assert "v0" not in str(caught.value)
    write_nifti(tmp_path / "labels" / "v0.nii.gz", label[1:])
    with pytest.raises(GeometryError, match="19x18x16 voxels on an image of 20x18x16"):
        CaseReader("mri")(cohort.cases[0])


def test_background_only_labels__are_refused(tmp_path: Path) -> None:
    write_cohort(tmp_path, train=1, val=0, test=1)
    write_nifti(tmp_path / "labels" / "v0.nii.gz", np.zeros((20, 18, 16), np.uint8))
    with pytest.raises(RequestError, match="hold background only"):
        finetune(Cohort.load(tmp_path), SETTINGS, tmp_path / "out")
