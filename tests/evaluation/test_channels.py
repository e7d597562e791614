"""Volumes of several channels: cohorts, statistics, crops, weights of one channel, predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medssl.domains.mri import MRI
from medssl.encoders.loading import load_into
from medssl.encoders.resenc3d import ResEnc3D
from medssl.encoders.swin3d import Swin3D
from medssl.errors import GeometryError, ImageError, RequestError, WeightsError
from medssl.evaluation import self_configuring
from medssl.evaluation.clinical import clinical_facts
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import Pretrained, build_network, finetune, for_channels, load, open_weights, predict, with_channels
from medssl.evaluation.label_curve import label_curve, markdown
from medssl.evaluation.pixel_controls import segmentation_controls
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import CaseReader, TrainingCrops, Volume, joined_channels, whole_channels, whole_image
from medssl.networks.segmentation import build_swin_unetr, load_pretrained
from medssl.report.clinical_page import clinical_page
from medssl.report.page import report
from medssl.weights import load_part
from tests.evaluation.channel_cohort import AFFINE, NAMES, channels_of, save, write_decathlon, write_nnunet
from tests.evaluation.test_finetune import SETTINGS as ONE_CHANNEL
from tests.evaluation.test_finetune import pretrained
from tests.evaluation.tiny_cohort import write_nifti
from tests.networks.test_segmentation import RESENC, SWIN, segresnet_part, vit_part

CPU = torch.device("cpu")
ENCODER = {"name": "segresnet3d", "args": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}}  # says no in_channels
SETTINGS = replace(ONE_CHANNEL, encoder=ENCODER, predictions=True)
FORMS = {"nnunet": write_nnunet, "decathlon": write_decathlon}


@pytest.fixture(scope="module", params=FORMS)
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(FORMS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return CaseReader("mri")(Cohort.load(write_nnunet(tmp_path_factory.mktemp("one"))).cases[0])


def channel(volume: Volume, k: int) -> Volume:
    """The volume of one channel that channel k would be by itself."""
    return replace(volume, image=volume.image[k : k + 1], stats=volume.channel_stats[k], channel_stats=())


def test_reader__gives_the_voxels_of_nibabel_and_statistics_of_each_channel(cohort: Cohort) -> None:
    assert cohort.channel_names == NAMES and cohort.channels == 2
    reader = CaseReader("mri")
    for number, case in enumerate(cohort.cases):
        volume = reader(case)
        files = [case.image, *case.further]
        images = [nibabel.as_closest_canonical(nibabel.load(file)).get_fdata() for file in files]  # type: ignore[attr-defined]
        expected = np.moveaxis(images[0], -1, 0) if len(files) == 1 else np.stack(images)
        assert volume.image.dtype == np.int16 and np.array_equal(volume.image, expected)
        label = nibabel.as_closest_canonical(nibabel.Nifti1Image(channels_of(number)[1], AFFINE)).get_fdata()
        assert np.array_equal(volume.label, label)  # type: ignore[arg-type]
        for k, (paths, part) in enumerate(case.channels):
            alone = MRI().read(paths, series_id="x", part=part)
            assert volume.channel_stats[k] == alone.meta.stats
            assert volume.stats[f"mean_{k}"] == alone.meta.stats["mean"]
        assert volume.channel_stats[0]["mean"] != volume.channel_stats[1]["mean"]
        assert np.allclose(volume.affine, alone.affine)
        assert case.image_files == files


def test_both_forms__are_the_same_volumes(tmp_path: Path) -> None:
    one, two = (CaseReader("mri")(Cohort.load(write(tmp_path / name)).cases[1]) for name, write in FORMS.items())
    assert np.array_equal(one.image, two.image) and one.channel_stats == two.channel_stats and one.spacing_mm == two.spacing_mm


def test_list_of_images__are_channels_too(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    files = [[f"imagesTr/miller_{n}_{k:04d}.nii.gz" for k in range(2)] for n in range(4)]
    entries = [{"image": images, "label": f"labelsTr/miller_{n}.nii.gz"} for n, images in enumerate(files)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": entries[:3], "test": entries[3:]}))
    cohort = Cohort.load(path)
    assert cohort.channel_names == ("0", "1") and len(cohort.cases[0].image_files) == 2
    assert np.array_equal(CaseReader("mri")(cohort.cases[0]).image[1], CaseReader("mri")(Cohort.load(tmp_path).cases[0]).image[1])
    for content, said in (
        ({"training": entries[:2], "test": [{**entries[3], "image": files[3][0]}]}, "entries have 1 and 2 channels"),
        ({"modality": {"0": "a", "1": "b", "2": "c"}, "training": entries[:3]}, "entry 1 has 2 images, modality names 3 channels"),
        ({"training": [{**entries[0], "image": files[0][:1] * 2}]}, "two channels of entry 1 are the same image file"),
        (
            {"training": [entries[0], {**entries[1], "image": [files[1][0], files[0][1]]}]},
            "entries 1 and 2 are the same image file",
        ),
        ({"training": [{**entries[0], "image": []}]}, "entry 1 has no image"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(RequestError, match=said) as caught:
            Cohort.load(path)
        assert "miller" not in str(caught.value)


def test_pictures_and_lists_of_one_modality__have_one_channel(tmp_path: Path) -> None:
    for name in ("p.png", "l.png", "v.nii.gz", "w.nii.gz"):
        (tmp_path / name).touch()
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"modality": {"0": "R", "1": "G", "2": "B"}, "training": [{"image": "p.png", "label": "l.png"}]}))
    assert Cohort.load(path).channels == 1 and Cohort.load(path).cases[0].volumes == 1
    path.write_text(json.dumps({"modality": {"0": "MRI"}, "training": [{"image": "v.nii.gz", "label": "w.nii.gz"}]}))
    assert Cohort.load(path).channels == 1 and Cohort.load(path).channel_names == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "imagesTr/miller_1_0001.nii.gz").unlink(), r"case 2 of 5 \(by name\): lacks <case>_0001\.nii\.gz"),
        (lambda f: (f / "imagesTr/miller_0_0000.nii.gz").unlink(), r"case 1 of 5 \(by name\): lacks <case>_0000\.nii\.gz"),
        (
            lambda f: save(f / "imagesTr/miller_2_0002.nii.gz", np.zeros((4, 4, 4), np.int16)),
            r"case 3 of 5 \(by name\): has <case>_0002",
        ),
    ],
)
def test_raw_folder__names_the_rule_that_a_case_breaks(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    change(tmp_path)
    with pytest.raises(RequestError, match=said + r".*a case has <case>_0000\.nii\.gz to <case>_0001\.nii\.gz") as caught:
        Cohort.load(tmp_path)
    assert "miller" not in str(caught.value)


SHIFTED = np.array(AFFINE) + np.array([[0, 0, 0, 0.3], *np.zeros((3, 4))])


@pytest.mark.parametrize(
    ("shape", "affine", "fill", "kind", "said"),
    [
        (
            (20, 18, 15),
            AFFINE,
            None,
            GeometryError,
            r"channel 1 of 2: \d+x\d+x15 voxels, channel 0 has .*x16.*resample it to channel 0",
        ),
        ((20, 18, 16), SHIFTED, None, GeometryError, r"channel 1 of 2: lies up to 0.30 mm away from channel 0; at most 0.11 mm"),
        ((20, 18, 16), AFFINE, 7, ImageError, "channel 1 of 2: all voxels are 7"),
    ],
)
def test_channels_that_do_not_go_together__are_refused(
    shape: tuple[int, int, int], affine: np.ndarray, fill: int | None, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path))
    array = channels_of(9, (20, 18, 16))[0][1][:, :, : shape[2]] if fill is None else np.full(shape, fill, np.int16)
    save(tmp_path / "imagesTr" / "miller_0_0001.nii.gz", array, affine)
    with pytest.raises(kind, match=f"^case case0001: {said}") as caught:
        finetune(cohort, SETTINGS, tmp_path / "out")
    assert "miller" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_small_shift_within_the_tolerance__is_accepted(tmp_path: Path) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path))
    save(
        tmp_path / "imagesTr" / "miller_0_0001.nii.gz",
        channels_of(0)[0][1],
        AFFINE + np.array([[0, 0, 0, 0.05], *np.zeros((3, 4))]),
    )
    assert CaseReader("mri")(cohort.cases[0]).image.shape[0] == 2


def test_files_with_another_number_of_volumes__are_refused(tmp_path: Path) -> None:
    write_decathlon(tmp_path, names=("a", "b", "c"))
    with pytest.raises(ImageError, match=r"case case0001: its file has 2 volume\(s\), the list names 3 channels \(modality\)"):
        CaseReader("mri")(Cohort.load(tmp_path).cases[0])
    write_decathlon(tmp_path, names=("a",))
    with pytest.raises(ImageError, match=r"4D image of 20x18x16x2; .*a Decathlon JSON that names these as modality"):
        CaseReader("mri")(Cohort.load(tmp_path).cases[0])


def test_voxel__is_valid_where_it_is_in_all_channels(tmp_path: Path) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path))
    second = channels_of(0)[0][1].astype(np.float32) + 0.5
    second[3, 4, 5] = np.nan
    save(tmp_path / "imagesTr" / "miller_0_0001.nii.gz", second)
    volume = CaseReader("mri")(cohort.cases[0])
    assert volume.image.dtype == np.float32 and (~volume.valid).sum() == 1
    image, padding = whole_channels(volume, "zscore", None, CPU)
    assert image[0][:, torch.from_numpy(~volume.valid)][:, 0].tolist() == pytest.approx(padding)


@pytest.mark.parametrize("normalize", ["zscore", "percentile", "none", {"window": [0, 900]}])
@pytest.mark.parametrize("spacing", [None, (1.3, 1.0, 1.6)])
def test_whole_volume__has_each_channel_as_by_itself(normalize: Any, spacing: tuple[float, ...] | None, volume: Volume) -> None:
    image, padding = whole_channels(volume, normalize, spacing, CPU)
    for k in range(2):
        alone, own = whole_image(channel(volume, k), normalize, spacing, CPU)
        assert torch.equal(image[:, k : k + 1], alone) and padding[k] == own


@pytest.mark.parametrize("normalize", ["zscore", "percentile", {"window": [0, 900]}])
@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"rotate_deg": 20, "scale": [0.8, 1.2], "flip": 0.5},
        {"gamma": [0.7, 1.5], "contrast": [0.8, 1.2], "brightness": 0.2, "bias_field": {"amplitude": 0.3}},
    ],
)
def test_crops__have_each_channel_as_by_itself(normalize: Any, augment: dict[str, Any], volume: Volume) -> None:
    maker = TrainingCrops(
        size=(24, 12, 12), spacing_mm=None, normalize=normalize, augment=augment, foreground=0.5, seed=3, device=CPU
    )  # longer than the volume along X, so that padding is seen too
    for step in range(3):
        images, labels = maker.batch([volume, volume], step)
        assert images.shape == (2, 2, 24, 12, 12)
        for k in range(2):
            alone, own = maker.batch([channel(volume, k)] * 2, step)
            assert torch.equal(images[:, k : k + 1], alone) and torch.equal(labels, own)


def test_noise__is_white_over_channels_and_the_same_for_equal_keys(volume: Volume) -> None:
    both = replace(
        volume, image=volume.image[[0, 0]], channel_stats=(volume.channel_stats[0],) * 2
    )  # so that what differs is noise
    maker = TrainingCrops(
        size=(12, 12, 12), spacing_mm=None, normalize="zscore", augment={"noise_std": 0.5}, foreground=0, seed=0, device=CPU
    )
    images, _ = maker.batch([both], 1)
    difference = images[0, 0] - images[0, 1]
    assert float(difference.std()) > 0.01 and abs(float(difference.mean())) < 0.1
    again, _ = maker.batch([volume, both], 1)
    assert torch.equal(maker.batch([volume, both], 1)[0], again)


def spread(part: Callable[..., Any], channels: int, **more: Any) -> tuple[Any, Any, Pretrained]:
    """An encoder of one channel, one of several that has its weights, and these weights."""
    encoder, state, manifest = part(**more)
    many = for_channels(Pretrained(state, manifest), Cohort("x", (), channel_names=tuple(map(str, range(channels)))))
    assert many is not None
    other = type(encoder)(**many.manifest["encoder"]["args"])
    load_into(other, many.state, {"part": "encoder", **many.manifest})
    return encoder.eval(), other.eval(), many


def resenc_part(**changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    encoder = ResEnc3D(**{**RESENC, **changes})
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith("encoder.")}
    return encoder, state, {"library": encoder.library, "key_groups": encoder.key_groups, "encoder": encoder.config()}


def swin_part(**changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    encoder = Swin3D(**{**SWIN, **changes})
    state = {k: v for k, v in encoder.net.state_dict().items() if k.startswith("swinViT.")}
    return encoder, state, {"library": encoder.library, "key_groups": encoder.key_groups, "encoder": encoder.config()}


@pytest.mark.parametrize("part", [segresnet_part, vit_part, resenc_part, swin_part])
def test_spread_stem__gives_equal_features_of_a_grey_image_in_all_channels(part: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    one, four, weights = spread(part, 4)
    image = torch.randn(1, 1, 48, 32, 16) if part is vit_part else torch.randn(1, 1, 64, 64, 32)
    with torch.no_grad():
        expected, found = (
            e.double().forward_features(x.double()) for e, x in ((one, image), (four, image.expand(-1, 4, -1, -1, -1)))
        )
    assert torch.allclose(expected.pooled, found.pooled, atol=1e-6)
    assert len(weights.adapted) == 1 and "1 input channel repeated to 4, divided by 4" in weights.adapted[0]
    assert weights.manifest["encoder"]["args"]["in_channels"] == weights.manifest["channels"] == 4
    assert for_channels(weights, Cohort("x", (), channel_names=tuple("abcd"))) is weights


def test_spread_decoder__of_a_swin_unetr_sees_the_image_as_its_stem_does() -> None:
    torch.manual_seed(0)
    encoder, state, manifest = swin_part()
    decoder = {k: v for k, v in encoder.net.state_dict().items() if not k.startswith(("swinViT.", "out."))}
    three = for_channels(Pretrained(state, manifest, decoder), Cohort("x", (), channel_names=tuple("abc")))
    assert three is not None and len(three.adapted) == 3
    networks = []
    for weights in (Pretrained(state, manifest, decoder), three):
        torch.manual_seed(1)
        network: Any = build_swin_unetr(encoder=weights.manifest["encoder"], out_channels=2)
        load_pretrained(network, weights.state, weights.manifest, decoder_state=weights.decoder_state)
        networks.append(network.eval().double())
    networks[1].out.load_state_dict(networks[0].out.state_dict())
    image = torch.randn(1, 1, 64, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(networks[0](image), networks[1](image.expand(-1, 3, -1, -1, -1)), atol=1e-5)


def test_weights_and_settings_of_other_channels__are_refused(tmp_path: Path) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path))
    _, state, manifest = segresnet_part(in_channels=3)
    with pytest.raises(
        WeightsError, match=r"take 3 input channels, the images have 2; .*images of 3 channels, or weights of 1 or 2"
    ):
        finetune(cohort, SETTINGS, tmp_path / "out", weights=Pretrained(state, {**manifest, "intensity": {"normalize": "zscore"}}))
    with pytest.raises(WeightsError, match="no input convolution of a known name"):
        for_channels(Pretrained({}, manifest), cohort)
    explicit = replace(SETTINGS, encoder={**ENCODER, "args": {**ENCODER["args"], "in_channels": 1}})  # type: ignore[dict-item]
    with pytest.raises(RequestError, match=r"its volumes have 2 channels \(T2, ADC\), encoder.in_channels is 1; leave it out"):
        finetune(cohort, explicit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, state, manifest = segresnet_part(in_channels=2)
    same = Pretrained(state, manifest)
    assert for_channels(same, cohort) is same
    one = replace(cohort, channel_names=())
    assert for_channels(same, one) is same and with_channels(explicit, one) is explicit  # as before, images are compared with them


def test_curve__from_weights_of_one_channel_learns_writes_and_says_so(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "curve"
    settings = replace(SETTINGS, steps=50, lr=1e-2, warmup_steps=5, augment={}, log_every=50)
    weights = pretrained()
    summary = label_curve(cohort, settings, out, arms={"pretrained": weights, "scratch": None}, counts=[3], seeds=[0])
    said = "convInit.conv.weight: 1 input channel repeated to 2, divided by 2"
    assert said in summary["shared"]["adapted"]["pretrained"][0] and said in markdown(summary)
    for arm, adapted in (("pretrained", 1), ("scratch", 0)):
        folder = out / "cells" / f"{arm}_n3_s0"
        result = json.loads((folder / "results.json").read_text())
        assert len(result["adapted"]) == adapted and result["channel_names"] == list(NAMES)
        assert min(result["mean"]["dice"].values()) > 0.9
        state, manifest = load_part(folder / "network.safetensors")
        assert state["convInit.conv.weight"].shape[1] == manifest["channels"] == manifest["encoder"]["args"]["in_channels"] == 2
        assert len(manifest["adapted"]) == adapted
        for case in cohort.split("test"):  # on the grid and in the axes of the file
            found = nibabel.load(folder / "predictions" / f"{case.id}.nii.gz")  # type: ignore[attr-defined]
            assert found.shape == (20, 18, 16) and np.allclose(found.affine, AFFINE)
            number = int(case.id[-1]) - 1
            assert (np.asarray(found.dataobj) == channels_of(number)[1]).mean() > 0.98
        with np.load(folder / "figures" / "segmentation.npz") as kept:
            figure = kept["image"]
        assert figure.ndim == 4 and figure.min() >= 0 and figure.max() <= 800  # the first channel alone
        assert result["training_range"]["knn_limit"] is not None
        for text in (folder / "results.json", folder / "network.json", out / "table.md"):
            assert "miller" not in text.read_text()
        names = list(csv.reader((folder / "private" / "cases.csv").read_text().splitlines()))[1][1]
        assert names.count("miller") == len(cohort.cases[0].image_files)
    page = report(out, tmp_path / "page.html").read_text()
    assert "Weights adapted to the channels of the images: " + said in page
    results = [json.loads(path.read_text()) for path in sorted(out.glob("cells/*/results.json"))]
    assert said in clinical_page(clinical_facts(results, draws=50))
    with pytest.raises(WeightsError, match="is a fine-tuned network"):
        open_weights(out / "cells" / "scratch_n3_s0" / "network.safetensors")


@pytest.mark.parametrize(
    "more", [{}, {"crop": (32, 16, 24), "flips": (0, 2)}, {"spacing_mm": (1.3, 1.0, 1.6), "crop": (32, 32, 8)}]
)
def test_prediction__of_equal_channels_is_that_of_weights_of_one_channel(more: dict[str, Any], volume: Volume) -> None:
    one = replace(SETTINGS, encoder=pretrained().manifest["encoder"], **more)
    network = build_network(one, n_classes=3, seed=0)
    load(network, pretrained())
    cohort = Cohort("x", (), channel_names=NAMES)
    weights = for_channels(pretrained(), cohort)
    assert weights is not None
    two = with_channels(replace(one, encoder=weights.manifest["encoder"]), cohort)
    both = build_network(two, n_classes=3, seed=0)
    rest = {k: v for k, v in network.state_dict().items() if k != "convInit.conv.weight"}
    both.load_state_dict({**rest, "convInit.conv.weight": weights.state["convInit.conv.weight"]})
    grey = replace(volume, image=volume.image[[0, 0]], channel_stats=(volume.channel_stats[0],) * 2)
    expected, found = predict(network, channel(volume, 0), one), predict(both, grey, two)
    assert found.shape == volume.image.shape[1:] and (found == expected).mean() > 0.999 and len(np.unique(expected)) > 1


def test_equal_seeds__give_equal_bits_and_the_twin_the_same_decoder(cohort: Cohort, tmp_path: Path) -> None:
    runs = [finetune(cohort, SETTINGS, tmp_path / name, labels=2, seed=4, weights=pretrained()) for name in "ab"]
    assert runs[0].curve == runs[1].curve
    assert runs[0].settings["encoder"]["args"]["in_channels"] == 2 and runs[0].loaded is not None
    one, two = (load_part(tmp_path / name / "network.safetensors")[0] for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_digest_and_checked_files__are_of_all_channels(tmp_path: Path) -> None:
    one = Cohort.load(write_nnunet(tmp_path / "a"))
    case = replace(one.cases[0], further=(tmp_path / "a" / "imagesTr" / "other.nii.gz",))
    other = replace(one, cases=(case, *one.cases[1:]))
    assert one.digest(b"key") != other.digest(b"key")
    assert [file.name for file in one.cases[0].image_files] == ["miller_0_0000.nii.gz", "miller_0_0001.nii.gz"]


def test_controls_of_pixels__take_several_channels(cohort: Cohort) -> None:
    results = segmentation_controls(cohort, SETTINGS, counts=[2], seeds=[0], folds=None)
    assert {result.arm for result in results} == {"raw_pixels", "intensity_statistics"}
    assert all(0 <= case.mean_dice <= 1 for result in results for case in result.cases)


def test_folds__are_dealt_of_several_channels(tmp_path: Path) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path / "c"))
    settings = replace(SETTINGS, predictions=False, figures=0)
    summary = label_curve(cohort, settings, tmp_path / "out", arms={"scratch": None}, counts=None, seeds=[0], folds=3)
    assert summary["cells"] == {"planned": 3, "done": 3} and summary["rows"][0]["n_test"] == 5


def test_one_channel__has_no_trace_of_several(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr" / "x_0000.nii.gz", channels_of(0)[0][0])
    write_nifti(tmp_path / "labelsTr" / "x.nii.gz", channels_of(0)[1])
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}}))
    cohort = Cohort.load(tmp_path)
    volume = CaseReader("mri")(cohort.cases[0])
    assert cohort.channels == 1 and volume.channel_stats == () and "mean" in volume.stats
    assert joined_channels([MRI().read(cohort.cases[0].image_files, series_id="x")] * 2, "x").image.shape[0] == 2


def test_settings__of_a_scratch_run_take_the_channels_of_the_cohort() -> None:
    found = with_channels(FinetuneSettings(encoder=ENCODER), Cohort("x", (), channel_names=tuple("abcd")))
    assert found.in_channels == 4


def test_network_that_configures_itself__takes_the_channels_of_the_cohort(tmp_path: Path) -> None:
    cohort = Cohort.load(write_nnunet(tmp_path / "c"))
    settings = self_configuring.starting_point(replace(SETTINGS, steps=1, warmup_steps=0, predictions=False, figures=0))
    summary = label_curve(
        cohort,
        settings,
        tmp_path / "out",
        arms={self_configuring.ARM: None},
        counts=[2],
        seeds=[0],
        configure=self_configuring.configure,
    )
    state, manifest = load_part(tmp_path / "out" / "cells" / f"{self_configuring.ARM}_n2_s0" / "network.safetensors")
    assert summary["cells"]["done"] == 1 and manifest["channels"] == manifest["encoder"]["args"]["in_channels"] == 2
    assert state["encoder.stem.convs.0.conv.weight"].shape[1] == 2
