from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medssl.domains import ct, statistics
from medssl.domains.ct import CT
from medssl.domains.mri import MRI
from medssl.errors import WeightsError
from medssl.export import monai_bundle
from medssl.export.write import export_weights
from medssl.types import Box, DrawKey
from medssl.views.pipeline import Crop, VolumeViews
from tests.export.conftest import make_segresnet, make_swin, make_vit, save_run

# MONAI 1.6 tries a GPU codec when it builds its default readers, and says on stderr and by a warning that there is none
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")

BLOCKED = """
import socket, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "medssl":
            raise ModuleNotFoundError("medssl is not installed here", name=name)
def no_network(*args, **kwargs):
    raise OSError("this test has no network")
sys.meta_path.insert(0, Blocked())
socket.socket.connect = no_network
"""


def write_image(path: Path, array: np.ndarray) -> Path:
    """Write an oblique image whose axes are permuted and flipped against RAS, with three different voxel edges."""
    tilt = np.deg2rad(10)
    rotation = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.array([[0, 1.1, 0], [-1.5, 0, 0], [0, 0, -2.2]])  # file axes: posterior, right, inferior
    affine[:3, 3] = (-20, 30, 40)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def mr_image(seed: int = 0, air: bool = True) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shape = (30, 41, 22)
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    head = (x**2).sum(axis=0) < 0.8
    tissue = generator.gamma(8, 60, size=shape) + 300
    noise = generator.rayleigh(10, size=shape)
    return (np.where(head, tissue, noise) if air else tissue + 500).astype(np.int16)


def ct_image() -> np.ndarray:
    inside = mr_image(1) > 200
    return np.where(inside, np.random.default_rng(2).normal(40, 150, inside.shape), -1000).astype(np.int16)


def parsed(folder: Path, name: str):
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    return parser.get_parsed_content(name)


def views_of(domain, path: Path, views: VolumeViews, start_voxels: tuple[int, int, int]) -> torch.Tensor:
    """Read and normalise with medssl: one view at a place of the resampled grid."""
    sample = domain.read([path], series_id="0" * 32)
    spacing = views.view_spacing_mm(sample.spacing_mm)
    start = tuple(n * s for n, s in zip(start_voxels, spacing, strict=True))
    valid = np.ones(sample.image.shape[1:], bool) if sample.valid is None else sample.valid
    crop = Crop(
        image=sample.image, valid=valid, spacing_mm=sample.spacing_mm, origin_mm=(0, 0, 0),
        box=Box(start, views.box_size_mm(sample.spacing_mm)), stats=sample.meta.stats, key=DrawKey(0, 0, 0), id=0,
    )  # fmt: skip
    return views.apply([crop], [[views.draw(crop.key, 0)]], "cpu")[views.name][0, 0]


CASES = [
    ("mri", {"normalize": "zscore"}, (2.0, 1.0, 1.5)),
    ("mri", {"normalize": "percentile"}, (2.0, 1.0, 1.5)),
    ("mri", {"normalize": "percentile"}, None),
    ("mri no air", {"normalize": "zscore"}, None),
    ("mri float", {"normalize": "zscore"}, (1.5, 1.5, 1.5)),
    ("ct", {"normalize": {"window": [-160, 240]}}, (1.0, 1.0, 3.0)),
    ("ct", {"normalize": "window", "window": [-160, 240]}, None),
    ("ct", {"normalize": "zscore"}, (2.0, 2.0, 2.0)),
    ("ct", {"normalize": "none"}, (2.0, 2.0, 2.0)),
]


@pytest.mark.parametrize(("kind", "intensity", "spacing"), CASES)
def test_preprocessing__equals_domain_and_views(kind, intensity, spacing, tmp_path):
    array = ct_image() if kind == "ct" else mr_image(air="no air" not in kind)
    array = array.astype(np.float32) * 0.37 if "float" in kind else array
    file = write_image(tmp_path / "a.nii.gz", array)
    domain = CT() if kind == "ct" else MRI()
    run = save_run(
        make_segresnet(), tmp_path / "run", domains=[domain.name], intensity=intensity, spacing_mm=spacing, image_size=[8, 8, 8]
    )
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    found = parsed(tmp_path / "bundle", "preprocessing")({"image": str(file)})["image"]

    normalize = intensity["normalize"] if "window" not in intensity else {"window": intensity["window"]}
    views = VolumeViews(size=(8, 8, 8), spacing_mm=spacing, normalize=normalize)
    for start in ((2, 3, 1), (7, 9, 4)):
        expected = views_of(domain, file, views, start)
        part = found[(slice(None), *(slice(n, n + 8) for n in start))]
        scale = 1000.0 if normalize == "none" else 1.0
        assert expected.std() > 0.05 * scale
        np.testing.assert_allclose(np.asarray(part), expected.numpy(), atol=3e-5 * scale)
    assert all(n % 4 == 0 for n in found.shape[1:])


def test_preprocessing__constants_are_those_of_the_domains():
    assert monai_bundle.AIR_SHARE == statistics.AIR_SHARE
    assert monai_bundle.BODY_HU == ct.BODY_HU


def test_preprocessing__pads_small_images_to_one_window_with_the_darkest_value(tmp_path):
    file = write_image(tmp_path / "a.nii.gz", mr_image())
    run = save_run(make_vit(image_size=(64, 32, 48), num_layers=1), tmp_path / "run", spacing_mm=None)
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    found = np.asarray(parsed(tmp_path / "bundle", "preprocessing")({"image": str(file)})["image"])
    stats = MRI().read([file], series_id="0" * 32).meta.stats
    assert found.shape == (1, 64, 32, 48)
    np.testing.assert_allclose(found[0, 41:], (stats["p00_5"] - stats["mean"]) / stats["std"], atol=1e-5)
    np.testing.assert_allclose(found[0, :, :, 22:], found[0, 63, 0, 0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI 1.6 reminds of every bundle that it runs expressions
@pytest.mark.parametrize("make", [make_vit, make_segresnet, make_swin])
def test_bundle__network_has_stock_keys_and_the_encoders_features(make, tmp_path):
    from monai.bundle import load

    encoder = make().eval()
    size = (64, 96, 32) if make is make_swin else (32, 48, 16)
    run = save_run(encoder, tmp_path / "run", image_size=list(size))
    report = export_weights(run, "monai-bundle", tmp_path / "bundle")
    assert report.max_feature_difference <= 1e-12 and report.missing == ()
    state = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    assert tuple(sorted(state)) == report.matched
    result = type(encoder.net)(**stock_arguments(encoder)).load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert all(key.startswith(("up_", "conv_final", "encoder", "decoder", "out.")) for key in result.missing_keys)

    network = load("bundle", bundle_dir=tmp_path, source="github", workflow_type="inference", device="cpu").eval()
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = encoder.forward_features(x)
        expected = output.tokens.transpose(1, 2).reshape(2, 48, 2, 3, 1) if make is make_vit else output.pyramid[-1]
        torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=0)


def stock_arguments(encoder) -> dict:
    args = encoder.config()["args"]
    if encoder.name == "vit3d":
        names = {"image_size": "img_size"}
        return {names.get(key, key): value for key, value in args.items()}
    if encoder.name == "swin3d":
        return {"out_channels": 1, **{key: value for key, value in args.items() if key != "drop_path"}}
    return {"spatial_dims": 3, **args}


def test_bundle__files(vit_run, tmp_path):
    report = export_weights(vit_run, "monai-bundle", tmp_path / "my_bundle")
    folder = tmp_path / "my_bundle"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(folder)) for path in report.files} == {
        "LICENSE", "configs/metadata.json", "configs/inference.json", "configs/manifest.json", "models/model.pt",
        "docs/README.md", "docs/data_license.txt", "docs/metadata_schema.json",
    }  # fmt: skip
    inference = json.loads((folder / "configs" / "inference.json").read_text())
    wanted = (
        "bundle_root device network_def inferer output_dir preprocessing dataset dataloader evaluator checkpointloader datalist"
    )
    assert set(wanted.split()) <= inference.keys()
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["name"] == "my_bundle" and metadata["version"] in metadata["changelog"]
    assert set(metadata["required_packages_version"]) == {"nibabel", "einops", "pytorch-ignite", "fire"}  # what `run` imports
    assert metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] == [2, 3, 1]
    assert metadata["network_data_format"]["outputs"]["pred"]["format"] == "latent"
    everything = " ".join(path.read_text() for path in report.files if path.suffix != ".pt")
    assert "medssl." not in json.dumps(inference) and str(tmp_path) not in everything
    assert "Apache-2.0" in (folder / "LICENSE").read_text() and "0f1e2d3c" in (folder / "docs" / "data_license.txt").read_text()
    assert "Not for diagnostic use" in (folder / "docs" / "README.md").read_text()
    for word in ("anonym", "de-identified", "compliant", "stays in the run folder"):
        assert word not in everything.lower()


def test_bundle__licence_not_stated(tmp_path):
    run = save_run(make_segresnet(), tmp_path / "run", licence="unknown")
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    assert "not stated" in (tmp_path / "bundle" / "LICENSE").read_text()


def test_schema__rejects_what_the_specification_forbids(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    run = save_run(make_segresnet(), tmp_path / "run")
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    schema = json.loads((tmp_path / "bundle" / "docs" / "metadata_schema.json").read_text())
    jsonschema.validate(metadata, schema)
    for key in ("monai_version", "network_data_format", "changelog", "copyright"):
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate({k: v for k, v in metadata.items() if k != key}, schema)
    metadata["network_data_format"]["inputs"]["image"]["num_channels"] = "one"
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'integer'"):
        jsonschema.validate(metadata, schema)


def test_bundle__keeps_the_image_spacing_when_the_manifest_only_summarises_it(tmp_path):
    run = save_run(make_segresnet(), tmp_path / "run", spacing_source="median of the items", image_size=[8, 8, 8])
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    file = write_image(tmp_path / "a.nii.gz", mr_image())
    found = parsed(tmp_path / "bundle", "preprocessing")({"image": str(file)})["image"]
    assert found.shape == (1, 44, 32, 24)  # 41, 30, 22 voxels padded to whole patches
    assert "keeps its own voxel size" in (tmp_path / "bundle" / "docs" / "README.md").read_text()


def test_bundle__refuses_two_domains_unless_a_window_serves_both(tmp_path, entries):
    both = {"domains": ["ct", "mri"]}
    run = save_run(make_segresnet(), tmp_path / "run", **both)
    before = entries()
    with pytest.raises(WeightsError, match="the domains ct, mri, normalised by the statistics of different foregrounds"):
        export_weights(run, "monai-bundle", tmp_path / "bundle")
    assert entries() == before
    windowed = save_run(make_segresnet(), tmp_path / "windowed", intensity={"normalize": {"window": [0, 9]}}, **both)
    export_weights(windowed, "monai-bundle", tmp_path / "bundle")


def test_bundle__refuses_a_normalisation_it_cannot_write(tmp_path, entries):
    run = save_run(make_segresnet(), tmp_path / "run", intensity={"normalize": "histogram"})
    before = entries()
    with pytest.raises(WeightsError, match="'histogram'; a bundle can write zscore, percentile, window and none"):
        export_weights(run, "monai-bundle", tmp_path / "bundle")
    assert entries() == before


def run_isolated(code: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder elsewhere, where medssl cannot be imported and nothing can be reached."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", BLOCKED + code, *arguments]
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)


ALL_THREE = """
bundle, images, out = sys.argv[1:]
try:
    import medssl
except ModuleNotFoundError:
    print("no medssl")
from monai.bundle import run, verify_metadata, verify_net_in_out
meta, config = bundle + "/configs/metadata.json", bundle + "/configs/inference.json"
verify_metadata(meta_file=meta, filepath=bundle + "/docs/metadata_schema.json")
print("metadata ok")
verify_net_in_out(net_id="network_def", meta_file=meta, config_file=config, device="cpu")
print("network ok")
run(config_file=config, bundle_root=bundle, dataset_dir=images, output_dir=out)
print("ran", "medssl" in sys.modules)
"""


def check_features(encoder, file: Path, bundle: Path, out: Path, spacing: tuple[float, ...]) -> None:
    """Compare the NIfTI of features with medssl's own encoder on the same image."""
    image = parsed(bundle, "preprocessing")({"image": str(file)})["image"]
    inferer = parsed(bundle, "inferer")
    encoder = encoder.eval()

    def feature_map(x):
        output = encoder.forward_features(x)
        return output.tokens.transpose(1, 2).reshape(len(x), -1, *output.grid)

    with torch.no_grad():
        expected = inferer(torch.as_tensor(np.asarray(image))[None], feature_map)[0]
    written = nib.load(out / "a_features.nii.gz")
    np.testing.assert_allclose(np.moveaxis(written.get_fdata(), -1, 0), expected.numpy(), atol=1e-5)
    assert expected.std() > 0.05
    stride = np.array(encoder.patch_size)
    np.testing.assert_allclose(nib.affines.voxel_sizes(written.affine), stride * spacing, rtol=1e-5)
    # the outer corner of the first feature is the outer corner of the image's first voxel
    source = nib.as_closest_canonical(nib.load(file))
    np.testing.assert_allclose(
        nib.affines.apply_affine(written.affine, [-0.5] * 3), nib.affines.apply_affine(source.affine, [-0.5] * 3), atol=1e-3
    )


@pytest.mark.slow
def test_bundle__verifies_and_runs_where_medssl_is_not(tmp_path):
    encoder = make_vit(image_size=(32, 32, 16), num_layers=2)
    run = save_run(encoder, tmp_path / "run")
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    (tmp_path / "images").mkdir()
    file = write_image(tmp_path / "images" / "a.nii.gz", mr_image())
    paths = [str(tmp_path / name) for name in ("bundle", "images", "out")]
    done = run_isolated(ALL_THREE, tmp_path, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line in ("no medssl", "metadata ok", "network ok", "ran False")] == [
        "no medssl", "metadata ok", "network ok", "ran False",
    ]  # fmt: skip
    check_features(encoder, file, tmp_path / "bundle", tmp_path / "out", (2.0, 1.0, 1.5))


@pytest.mark.slow
def test_bundle__of_a_segresnet_runs_where_medssl_is_not(tmp_path):
    encoder = make_segresnet()
    run = save_run(
        encoder, tmp_path / "run", image_size=[16, 24, 8], spacing_mm=[1.5, 1.5, 1.5], intensity={"normalize": "percentile"}
    )
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    (tmp_path / "images").mkdir()
    file = write_image(tmp_path / "images" / "a.nii.gz", mr_image())
    done = run_isolated(ALL_THREE, tmp_path, *[str(tmp_path / name) for name in ("bundle", "images", "out")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ran False" in done.stdout
    check_features(encoder, file, tmp_path / "bundle", tmp_path / "out", (1.5, 1.5, 1.5))


@pytest.mark.slow
def test_bundle__a_broken_one_is_noticed(tmp_path):
    run = save_run(make_segresnet(), tmp_path / "run", image_size=[8, 8, 8])
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    file = tmp_path / "bundle" / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] += 1
    file.write_text(json.dumps(metadata))
    done = run_isolated(ALL_THREE, tmp_path, *[str(tmp_path / name) for name in ("bundle", "images", "out")])
    assert done.returncode != 0 and "output channel number `32` doesn't match: `33`" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fire") is None, reason="python -m monai.bundle needs the package fire")
def test_bundle__command_line(tmp_path):
    run = save_run(make_vit(image_size=(32, 32, 16), num_layers=2), tmp_path / "run")
    export_weights(run, "monai-bundle", tmp_path / "bundle")
    code = "import runpy\nsys.argv[0] = 'monai.bundle'\nrunpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)\n"
    meta, config = (str(tmp_path / "bundle" / "configs" / name) for name in ("metadata.json", "inference.json"))
    schema = str(tmp_path / "bundle" / "docs" / "metadata_schema.json")
    first = run_isolated(code, tmp_path, "verify_metadata", "--meta_file", meta, "--filepath", schema)
    assert first.returncode == 0, first.stderr[-3000:]
    arguments = ("--net_id", "network_def", "--meta_file", meta, "--config_file", config)
    second = run_isolated(code, tmp_path, "verify_net_in_out", *arguments)
    assert second.returncode == 0, second.stderr[-3000:]
