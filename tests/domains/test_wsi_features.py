"""Feature files, heatmaps and the state of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.domains.slides.features import (
    PATCH_ENCODERS,
    Bags,
    FeatureWriter,
    PatchEncoder,
    attributes,
    check_encoder,
    encode_slide,
    published,
    read_features,
    write_features,
)
from medssl.domains.slides.grid import TileGrid, make_grid
from medssl.domains.slides.heatmap import make_heatmap, paint, save_heatmap, scale_scores, top_tiles
from medssl.domains.slides.job import SlideJob, _host
from medssl.domains.slides.slide import open_slide
from medssl.domains.slides.tiles import Tiles
from medssl.domains.slides.tissue import TissueMask, TissueParams
from medssl.errors import ImageError, RequestError, StoreError
from tests import synthetic_slides as slides

pytest.importorskip("openslide", reason="extra wsi")
h5py = pytest.importorskip("h5py", reason="extra wsi")

ID = "ef" * 16
ROOT = Path(__file__).resolve().parents[2]


def means(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean(dim=(2, 3))


MEANS = PatchEncoder("means", means, dim=3, tile_px=128, mpp=0.5, weights="none", transform="mean colour")


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides.write_pyramid(tmp_path_factory.mktemp("wsi") / "pyramid.tif")


@pytest.fixture
def tiles(pyramid: Path) -> Tiles:
    slide = open_slide(pyramid, slide_id=ID)
    return Tiles(slide, make_grid(slide, mpp=0.5, tile_px=128))


# --- writing -----------------------------------------------------------------------------------------------------------------


def test_encode__features_of_every_tile_and_all_attributes(tiles: Tiles, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.h5"
    facts = encode_slide(tiles, MEANS, path, slide_id=ID, batch=7, dtype="float32")
    assert facts == {"tiles": 48, "bad_tiles": 0, "single_level": False, "bytes": path.stat().st_size}
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(file["coords"], tiles.grid.coords)
        assert file["coords"].dtype == np.int64
        expected = np.stack([tile.image.reshape(3, -1).mean(axis=1) for tile in tiles])
        np.testing.assert_allclose(file["features"], expected, rtol=1e-5)
        attrs = dict(file.attrs)
        # What TRIDENT's readers ask of `coords`.
        assert file["coords"].attrs["patch_size_level0"] == 256.0 and file["coords"].attrs["name"] == ID
    assert (attrs["mpp0"], attrs["target_mpp"], attrs["patch_size"], attrs["overlap"]) == (pytest.approx(0.25), 0.5, 128, 0)
    assert (attrs["level0_width"], attrs["level0_height"], attrs["encoder"], attrs["slide_id"]) == (2048, 1536, "means", ID)
    assert json.loads(attrs["tissue"]) == {"used": "none"}
    assert "pyramid" not in json.dumps({name: str(value) for name, value in attrs.items()})
    assert list(path.parent.iterdir()) == [path]
    found = read_features(path)
    assert (found.origin, found.patch_size, found.patch_size_level0, found.target_mpp) == ("medssl", 128, 256.0, 0.5)


def test_same_slide_twice__same_bytes(tiles: Tiles, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        encode_slide(tiles, MEANS, tmp_path / name, slide_id=ID, batch=len(name))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_no_tiles__a_file_with_no_rows(tiles: Tiles, tmp_path: Path) -> None:
    from dataclasses import replace

    empty = Tiles(tiles.slide, replace(tiles.grid, coords=tiles.grid.coords[:0], tissue=tiles.grid.tissue[:0]))
    encode_slide(empty, MEANS, tmp_path / "a.h5", slide_id=ID)
    found = read_features(tmp_path / "a.h5")
    assert found.features.shape == (0, 3) and found.coords.shape == (0, 2) and found.features.dtype == np.float16


def test_failure_inside__leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", np.ones((2, 3)), np.zeros((2, 2)), {})
    before = path.read_bytes()
    with pytest.raises(KeyError), FeatureWriter(path, 3, {}) as writer:  # noqa: PT012
        writer.append(np.ones((1, 3)), np.zeros((1, 2)))
        raise KeyError
    with pytest.raises(RequestError, match="not finite in float16"), FeatureWriter(path, 3, {}, dtype="float16") as writer:
        writer.append(np.full((1, 3), 1e6), np.zeros((1, 2)))
    with pytest.raises(RequestError, match=r"\(B, 3\) and \(B, 2\) are needed"), FeatureWriter(path, 3, {}) as writer:
        writer.append(np.ones((1, 4)), np.zeros((1, 2)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_too_many_bad_tiles__no_feature_file(tmp_path: Path) -> None:
    path = slides.damage(slides.write_pyramid(tmp_path / "slide.tif", factors=(1.0,)), page=0, tiles=[4, 5])
    slide = open_slide(path, slide_id=ID)
    with pytest.raises(ImageError, match="of 48 tiles cannot be decoded"):
        encode_slide(Tiles(slide, make_grid(slide, mpp=0.25)), MEANS, tmp_path / "a.h5", slide_id=ID, force=True)
    assert list(tmp_path.glob("a.h5*")) == []


KILLED = """
import sys, time
from pathlib import Path
import torch
from medssl.domains.slides.features import PatchEncoder, encode_slide
from medssl.domains.slides.grid import make_grid
from medssl.domains.slides.job import SlideJob
from medssl.domains.slides.slide import open_slide
from medssl.domains.slides.tiles import Tiles

source, out, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
slide = open_slide(source)
tiles = Tiles(slide, make_grid(slide, mpp=0.5, tile_px=128))

def encode(images):
    print("batch", flush=True)
    time.sleep(pause)
    return images.float().mean(dim=(2, 3))

encoder = PatchEncoder("means", encode, 3, 128, 0.5)
state = SlideJob(out).run("a", ["a.h5"], lambda: encode_slide(tiles, encoder, out / "a.h5", slide_id="a", batch=8))
print(state["status"], len(state["attempts"]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_mid_slide__no_partial_file_and_the_next_run_is_equal(pyramid: Path, tiles: Tiles, tmp_path: Path) -> None:
    """Card, experiment 5."""
    out = tmp_path / "job"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(pyramid), str(out)]
    with subprocess.Popen([*command, "30"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "a.h5").exists() and (out / "a.h5.part").exists()
    assert json.loads((out / "state" / "a.json").read_text())["status"] == "running"
    assert list((out / "locks").iterdir())
    again = subprocess.run([*command, "0"], stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert again.stdout.splitlines()[-1] == "completed 2"
    assert sorted(path.name for path in out.iterdir()) == ["a.h5", "locks", "state"] and not list((out / "locks").iterdir())
    encode_slide(tiles, MEANS, tmp_path / "whole.h5", slide_id=ID)
    assert read_features(out / "a.h5").coords.tobytes() == read_features(tmp_path / "whole.h5").coords.tobytes()
    np.testing.assert_array_equal(read_features(out / "a.h5").features, read_features(tmp_path / "whole.h5").features)


# --- other people's files ----------------------------------------------------------------------------------------------------


def other_file(path: Path, features: np.ndarray, **attrs: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = np.arange(10, dtype=np.int32).reshape(5, 2)
        for name, value in attrs.items():
            file["coords"].attrs[name] = value
    return path


def test_trident_file__is_read(tmp_path: Path) -> None:
    attrs = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "overlap": 16}
    path = other_file(tmp_path / "a.h5", np.ones((1, 5, 4), np.float32), name="slide-1", savetodir="/x", **attrs)
    found = read_features(path)
    assert (found.origin, found.patch_size, found.patch_size_level0, found.overlap) == ("trident", 256, 512.0, 16)
    assert (found.target_magnification, found.target_mpp, found.slide_id) == (20.0, None, "slide-1")
    assert found.features.shape == (5, 4) and found.coords.dtype == np.int64


def test_clam_file__is_read(tmp_path: Path) -> None:
    path = other_file(tmp_path / "a.h5", np.ones((5, 4)), patch_size=256, patch_level=1, downsample=(4.0, 4.0), custom_downsample=2)
    found = read_features(path)
    assert (found.origin, found.patch_size, found.patch_size_level0) == ("clam", 256, 2048.0)
    path = other_file(tmp_path / "b.h5", np.ones((5, 4)), patch_size=256, patch_level=0, custom_downsample=1)
    assert read_features(path).patch_size_level0 == 256.0
    path = other_file(tmp_path / "c.h5", np.ones((5, 4)), patch_size=256, patch_level=1)
    assert read_features(path).patch_size_level0 is None  # the file does not say how coarse level 1 is


def test_unfinished_or_odd_file__is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"\x89HDF")
    other_file(tmp_path / "b.h5", np.ones((4, 4)))
    for name, match in (("a.h5", "a finished HDF5 file"), ("b.h5", "4 features for 5 coordinates"), ("c.h5", "FileNotFoundError")):
        with pytest.raises(StoreError, match=match):
            read_features(tmp_path / name)


def test_encoder__other_scale_or_tile_is_refused_unless_forced(tiles: Tiles) -> None:
    check_encoder(MEANS, tiles.grid)
    encoder = published("uni_v1", means)
    assert (encoder.dim, encoder.tile_px, encoder.mpp) == (1024, 256, 0.5)
    with pytest.raises(RequestError, match=r"uni_v1 takes tiles of 256 px at 0.5 um/px; the grid has 128 px at 0.5"):
        check_encoder(encoder, tiles.grid)
    check_encoder(encoder, tiles.grid, force=True)
    with pytest.raises(RequestError, match="known: uni_v1"):
        published("uni", means)
    assert len(PATCH_ENCODERS) == 25


def test_bags__draw_pad_and_mask(tmp_path: Path) -> None:
    many = write_features(tmp_path / "a.h5", np.arange(40.0).reshape(20, 2), np.arange(40).reshape(20, 2), {})
    none = write_features(tmp_path / "b.h5", np.zeros((0, 2)), np.zeros((0, 2)), {})
    bags = Bags([many, none, None], [1, 0, 1], tokens=8)
    first = bags[0]
    assert first["valid"].all() and first["label"] == 1
    np.testing.assert_array_equal(first["features"], first["coords"])  # rows stay together
    assert len(np.unique(first["coords"][:, 0])) == 8
    np.testing.assert_array_equal(bags[0]["features"], first["features"])
    bags.set_epoch(1)
    assert not np.array_equal(bags[0]["features"], first["features"])
    for index in (1, 2):
        assert bags[index]["features"].shape == (8, 2) and not bags[index]["valid"].any()
    wide = Bags([many], tokens=30)[0]
    assert wide["valid"].sum() == 20 and (wide["features"][20:] == 0).all()
    from torch.utils.data import default_collate

    assert default_collate([bags[k] for k in range(3)])["features"].shape == (3, 8, 2)


# --- heatmaps ----------------------------------------------------------------------------------------------------------------


def test_heatmap_of_x__is_a_gradient_that_lies_on_the_slide(tiles: Tiles, tmp_path: Path) -> None:
    """Card, experiment 7."""
    scores = tiles.grid.coords[:, 0].astype(float)
    heatmap = make_heatmap(tiles.slide, tiles.grid, scores, vis_mpp=2.0)
    assert heatmap.values.shape == heatmap.picture.shape[:2] == (192, 256)
    assert np.isfinite(heatmap.values).all()
    row = heatmap.values[100]
    assert (np.diff(row) >= 0).all() and row[0] < 0.1 and row[-1] > 0.9
    assert (heatmap.values == heatmap.values[:1]).all()
    # Tiles of 256 level-0 pixels are 32 map pixels: the score changes there and nowhere else.
    assert (np.flatnonzero(np.diff(row)) + 1).tolist() == list(range(32, 256, 32))
    # Red grows and blue falls from left to right, over the slide's own picture.
    background = tiles.slide.overview(2.0).astype(int)
    change = heatmap.picture.astype(int) - background
    assert change[:, -32:, 0].mean() > change[:, :32, 0].mean() and change[:, -32:, 2].mean() < change[:, :32, 2].mean()
    files = save_heatmap(heatmap, tiles.grid, scores, tmp_path)
    with Image.open(files[0]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), heatmap.picture)
    with np.load(files[1]) as arrays:
        np.testing.assert_array_equal(arrays["scores"], scores)
        np.testing.assert_array_equal(arrays["values"], heatmap.values)
    top = json.loads(files[2].read_text())["features"]
    assert len(top) == 10 and top[0]["geometry"]["coordinates"][0][0][0] == scores.max()
    assert top[0]["geometry"]["coordinates"][0][2] == [scores.max() + 256, 256]


def test_heatmap__blank_outside_tissue(tiles: Tiles) -> None:
    mask = np.zeros((48, 64), dtype=bool)
    mask[:, :32] = True
    tissue = TissueMask(mask, (32.0, 32.0), TissueParams(), "user")
    heatmap = make_heatmap(tiles.slide, tiles.grid, np.ones(len(tiles)), vis_mpp=2.0, tissue=tissue)
    assert np.isfinite(heatmap.values[:, :128]).all() and np.isnan(heatmap.values[:, 128:]).all()
    np.testing.assert_array_equal(heatmap.picture[:, 128:], tiles.slide.overview(2.0)[:, 128:])


def test_paint__overlaps_are_averaged_as_in_a_plain_loop() -> None:
    grid = TileGrid(np.array([[0, 0], [20, 0], [7, 33]]), np.ones(3, np.float32), 40, 20, 1.0, (1.0, 1.0), (80, 80))
    scores = np.array([0.2, 0.8, 0.5])
    found = paint(grid, scores, (20, 20), (4.0, 4.0))
    for i in range(20):
        for j in range(20):
            y, x = (i + 0.5) * 4, (j + 0.5) * 4
            here = [s for (a, b), s in zip(grid.coords, scores) if a <= x < a + 40 and b <= y < b + 40]
            assert found[i, j] == pytest.approx(np.mean(here), nan_ok=True) if here else np.isnan(found[i, j])


def test_scale_scores() -> None:
    assert scale_scores(np.array([5.0, 1.0, 3.0, 3.0])).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert scale_scores(np.array([-2.0, 0.0, 1.0]), "signed").tolist() == [0.0, 0.5, 0.75]
    assert scale_scores(np.array([[0.0, 1.0], [1.0, 0.0]]), branch=1).tolist() == [1.0, 0.0]
    soft = scale_scores(np.arange(200.0), "softmax")
    assert soft[-1] == 1.0 and soft.min() >= 0 and (np.diff(soft) >= 0).all()
    assert len(scale_scores(np.zeros(0))) == 0
    for scores, match in (
        (np.zeros((3, 2)), "2 branches"),
        (np.array([np.nan]), "finite: False"),
        (np.array([2.0]), "known: rank"),
    ):
        with pytest.raises(RequestError, match=match):
            scale_scores(scores, "raw")
    assert top_tiles(TileGrid(np.zeros((0, 2)), np.zeros(0), 8, 0, 1.0, (1, 1), (9, 9)), np.zeros(0))["features"] == []


# --- state of a run ----------------------------------------------------------------------------------------------------------


def work_of(job: SlideJob, name: str, content: bytes = b"abc") -> Any:
    def work() -> dict[str, Any]:
        (job.folder / name).write_bytes(content)
        return {"tiles": 3, "single_level": True, "bad_tiles": 1}

    return work


def test_job__finished_work_is_not_done_again(tmp_path: Path) -> None:
    job = SlideJob(tmp_path)
    assert job.state("a")["status"] == "not_started"
    state = job.run("a", ["a.h5"], work_of(job, "a.h5"))
    assert (state["status"], state["outputs"], len(state["attempts"])) == ("completed", {"a.h5": 3}, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert SlideJob(tmp_path).run("a", ["a.h5"], lambda: pytest.fail("done twice")) == state
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "a.h5").unlink()
    assert len(job.run("a", ["a.h5"], work_of(job, "a.h5"))["attempts"]) == 2


def test_job__errors_are_recorded_and_tried_again(tmp_path: Path) -> None:
    job = SlideJob(tmp_path)

    def fail(reason: str) -> Any:
        def work() -> dict[str, Any]:
            raise ImageError(reason, "a sentence")

        return work

    assert job.run("a", ["a.h5"], fail("unreadable"))["reason"] == "unreadable"
    assert job.run("b", ["b.h5"], fail("empty_tissue"))["status"] == "skipped"
    assert job.run("a", ["a.h5"], work_of(job, "a.h5"))["status"] == "completed"
    assert [attempt["status"] for attempt in job.state("a")["attempts"]] == ["error", "completed"]
    manifest = job.write_manifest({"mpp": 0.5})
    assert manifest["by_status"] == {"completed": 1, "skipped": 1} and manifest["by_reason"] == {"empty_tissue": 1}
    assert (manifest["single_level"], manifest["bad_tiles"], manifest["bytes"]) == (1, 1, 3)
    assert "2 slides: 1 completed, 1 skipped" in job.summary() and "1 slides have no pyramid" in job.summary()
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"] == {"mpp": 0.5}


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("lock", "status"),
    [
        ({"pid": os.getpid(), "host": _host(), "time": time.time()}, "running"),
        ({"pid": 1, "host": "elsewhere", "time": time.time()}, "running"),
        ({"pid": 1, "host": "elsewhere", "time": time.time() - 25 * 3600}, "completed"),
        ({"pid": dead_pid(), "host": _host(), "time": time.time()}, "completed"),
        ({}, "running"),  # just being written
    ],
)
def test_locks__stale_ones_are_removed(tmp_path: Path, lock: dict[str, Any], status: str) -> None:
    job = SlideJob(tmp_path)
    (tmp_path / "locks" / "a.lock").write_text(json.dumps(lock))
    assert job.run("a", ["a.h5"], work_of(job, "a.h5"))["status"] == status
    assert (tmp_path / "a.h5").exists() == (status == "completed")


def test_lock__says_nothing_of_the_host_name(tmp_path: Path) -> None:
    """Two processes under two names of one machine are one host; without a boot id each is its own, and a new one each time."""
    asked = "from medssl.domains.slides import job; print(job._host())"
    for known in (True, False):
        missing = "" if known else "; job.BOOT_ID = job.Path('/nowhere')"
        call = asked.replace("; print", f"{missing}; print")
        named = "import os, platform, socket; platform.node = socket.gethostname = lambda: 'hospital'; " + call
        values = [subprocess.check_output([sys.executable, "-c", text], text=True).strip() for text in (call, named)]
        assert all(len(value) == 16 for value in values) and (values[0] == values[1]) == known
    job = SlideJob(tmp_path)
    with job._lock("a", []) as taken:
        assert taken
        lock = (tmp_path / "locks" / "a.lock").read_text()
    guesses = (platform.node(), socket.gethostname(), platform.node().partition(".")[0])
    for digest in (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.blake2b, lambda text: hashlib.blake2b(text, digest_size=8)):
        assert not any(digest(name.encode()).hexdigest()[:12] in lock for name in guesses)


def test_lock__is_stale_once_the_output_exists(tmp_path: Path) -> None:
    job = SlideJob(tmp_path)
    (tmp_path / "locks" / "a.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "time": time.time()}))
    (tmp_path / "a.h5").write_bytes(b"abc")
    assert job.run("a", ["a.h5"], work_of(job, "a.h5"))["status"] == "completed"


def test_attributes__hold_no_path(tiles: Tiles) -> None:
    assert str(tiles.slide.path.parent) not in json.dumps(attributes(tiles.slide, tiles.grid, slide_id=ID))
