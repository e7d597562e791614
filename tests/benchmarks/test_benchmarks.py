"""Every benchmark runs at toy size and writes its JSON; what it measures is for quiet machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import (
    burned_in,
    common,
    crops,
    data_wait,
    gpu_step,
    header_scan,
    index_scale,
    mae_step,
    patches,
    read_series,
    startup,
    store_size,
)
from medssl.archive.scanning import sweep
from medssl.recipe import read_yaml
from tests.archive.pixels.test_burned_in import tissue

TINY_VIT = ["--hidden", "48", "--layers", "2", "--heads", "2"]
GPU_STEP = [
    *TINY_VIT,
    *["--device", "cpu", "--size", "32", "--patch", "8", "--decoder", "48", "--decoder-layers", "1", "--decoder-heads", "2"],
    *["--batches", "2", "--inner", "1", "--matmul", "64", "--loop-steps", "4", "--workers", "2", "--volumes", "2"],
    *["--shape", "48", "48", "40", "--precision", "bf16", "--peak-tflops", "1"],
]

Main = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(autouse=True)
def _threads_stay() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def play(main: Main, arguments: list[str], out: Path, repeats: int = 2) -> dict[str, Any]:
    """Run a benchmark, check what all of them promise, and return its JSON."""
    returned = main([*arguments, "--repeats", str(repeats), "--out", str(out)])
    (path,) = out.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    assert content == json.loads(json.dumps(returned))
    assert path.stem == content["benchmark"]
    assert content["hardware"]["cpu"] and content["hardware"]["cores"] >= 1
    assert content["versions"]["medssl"]
    assert content["rows"]
    return content


def by(rows: list[dict[str, Any]], column: str) -> dict[str, dict[str, Any]]:
    return {row[column]: row for row in rows}


def test_interleave__times_every_call_once_a_turn_and_rotates_the_order() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    seconds = common.interleave(calls, repeats=3, warmup=0)
    assert order == list("abcbcacab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave__does_not_count_the_warm_up() -> None:
    order: list[str] = []
    seconds = common.interleave({"a": lambda: order.append("a")}, repeats=2, warmup=3)
    assert len(order) == 5
    assert len(seconds["a"]) == 2


def test_times_faster__is_the_median_of_ratios_within_turns() -> None:
    seconds = {"ours": [1.0, 2.0, 10.0], "peer": [2.0, 6.0, 10.0]}
    assert common.times_faster(seconds, "ours", "peer") == 2.0


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(0.8, True, True), (0.79, True, False), (0.8, False, True), (0.81, False, False), (None, True, None)],
)
def test_check__compares_with_its_limit(value: float | None, at_least: bool, met: bool | None) -> None:
    assert common.Check("x", value, 0.8, at_least).met is met


def test_markdown__leaves_missing_cells_empty() -> None:
    assert common.markdown([{"a": 1, "b": 0.5}, {"a": "x"}]) == "| a | b |\n| --- | --- |\n| 1 | 0.5 |\n| x |  |"


def test_crops__reads_equal_boxes(tmp_path: Path) -> None:
    content = play(crops.main, ["--shape", "70", "66", "50", "--crop", "24", "--crops", "2"], tmp_path)
    rows = by(content["rows"], "reader")
    assert rows["medssl read_box"]["ours_is_times_faster"] == 1
    assert rows["medssl read_box"]["mb_on_disk"] == pytest.approx(rows["bare Blosc2, held open"]["mb_on_disk"], rel=0.05)
    assert [check["target"] for check in content["checks"]] == [">= 0.8"]


@pytest.mark.slow
def test_patches__agree_with_bare_blosc2(tmp_path: Path) -> None:
    content = play(patches.main, ["--volumes", "2", "--shape", "48", "40", "32", "--crop", "16"], tmp_path)
    rows = by(content["rows"], "pipeline")
    assert set(rows) == {patches.OURS, patches.BARE, patches.MONAI}
    # MONAI's cache is float32, ours int16 and compressed
    assert rows[patches.MONAI]["mb_on_disk"] > 3 * rows[patches.OURS]["mb_on_disk"]


@pytest.mark.slow
def test_read_series__readers_agree(tmp_path: Path) -> None:
    content = play(read_series.main, ["--shape", "40", "32", "6"], tmp_path)
    assert len(content["rows"]) == 4
    assert all(row["median_ms"] > 0 for row in content["rows"])


@pytest.mark.data
def test_store_size__is_lossless_on_the_small_ct(shared_data: Path, tmp_path: Path) -> None:
    content = play(store_size.main, ["--data", str(shared_data), "--sets", "ct_mr_totalseg_examples"], tmp_path)
    (row,) = content["rows"]
    assert row["bit_equal"] is True
    assert row["equals_simpleitk"] is True
    assert row["share_of_raw"] <= 0.5


@pytest.mark.data
@pytest.mark.slow
def test_store_size__stores_both_blocks_of_the_tilted_series(shared_data: Path, tmp_path: Path) -> None:
    content = play(store_size.main, ["--data", str(shared_data), "--sets", "ct_ge_gantry_tilt"], tmp_path)
    assert [(row["outcome"], row["slices"], row["bit_equal"]) for row in content["rows"]] == [("stored", 14, True)] * 2


def test_store_size__absent_sets_are_reported(tmp_path: Path) -> None:
    content = play(store_size.main, ["--data", str(tmp_path / "none")], tmp_path / "out")
    assert {row["outcome"] for row in content["rows"]} == {"not there"}


def test_mae_step__pairs_both_forms(tmp_path: Path) -> None:
    arguments = [*TINY_VIT, "--crop", "32", "--patches", "16", "8", "--decoder-dim", "32", "--decoder-depth", "1"]
    content = play(mae_step.main, arguments, tmp_path)
    assert [row["tokens"] for row in content["rows"]] == [8, 8, 64, 64]
    assert {row["hidden_share"] for row in content["rows"]} == {0.75}
    assert content["checks"] == []  # targets hold for 216 and 1,728 tokens


def test_all_token_form__scores_hidden_voxels_only() -> None:
    from medssl.data_sources import random_views
    from medssl.encoders.vit3d import ViT3D
    from medssl.layers.tokens import flatten_tokens, patchify
    from medssl.types import StepContext
    from medssl.views.pipeline import VolumeViews

    torch.manual_seed(0)
    size = (16, 24, 8)
    views = random_views(VolumeViews(size=size, mask={"ratio": 0.5, "cell": 8}), 2, 1, torch.device("cpu"))
    model = mae_step.AllTokens(ViT3D(image_size=size, patch_size=8, hidden_size=12, num_layers=1, num_heads=2))
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    rows = patchify(views["volume"][:, 0], (8, 8, 8))
    hidden = flatten_tokens(views["volume_mask"][:, 0][:, None])[..., 0]
    assert model(views, StepContext())["loss"].item() == pytest.approx(rows[hidden].abs().mean().item(), rel=1e-5)


@pytest.mark.slow
def test_data_wait__measures_every_step(tmp_path: Path) -> None:
    recipes = ["smoke/mae_vit3d_mri", "smoke/video_mae_video_vit_ultrasound", "demo/pretrain"]
    content = play(data_wait.main, ["--patients", "4", "--size", "28", "24", "20", "--recipes", *recipes], tmp_path)
    rows = by(content["rows"], "recipe")
    assert [rows[name]["steps"] for name in recipes] == [2, 2, 2]
    assert all(0 <= row["wait_share"] < 1 for row in rows.values())


def test_data_wait__covers_every_smoke_recipe_and_the_demo() -> None:
    assert "demo/pretrain" in data_wait.chosen()
    assert {"smoke/mae_vit3d_mri", "smoke/video_mae_video_vit_ultrasound", "echo_discovr"} <= set(data_wait.chosen())
    assert {read_yaml(path)["kind"] for path in data_wait.chosen().values()} == {"pretrain"}
    assert {data_wait.domain_of(path) for path in data_wait.chosen().values()} == {"mri", "ultrasound"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_startup__reports_import_and_peak_memory(tmp_path: Path) -> None:
    content = play(startup.main, ["--shape", "48", "48", "20", "--memory-runs", "1"], tmp_path)
    rows = by(content["rows"], "what")
    assert rows["import medssl, s"]["value"] < 1.0
    assert 0.05 < rows["medssl cache, nifti, peak GB"]["value"] < 1.5
    assert 0.05 < rows["medssl cache, dicom, peak GB"]["value"] < 1.5


@pytest.mark.slow
def test_header_scan__times_ours_beside_pydicom(tmp_path: Path) -> None:
    content = play(header_scan.main, ["--files", "40"], tmp_path)
    assert set(by(content["rows"], "what")) == {header_scan.PYDICOM, header_scan.OURS, header_scan.ONE, header_scan.TWO}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_index_scale__counts_what_it_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = index_scale.fresh

    def here(function: str, *args: object) -> dict[str, Any]:
        """Start a process of its own once only: each takes a second."""
        if function == "scan_rate" and args[1] == 5:
            return fresh(function, *args)
        return {
            "seconds": 1.0,
            "processor_s": 1.0,
            "peak_mb": 1.0,
            "worker_mb": 1.0,
            **getattr(index_scale, function)(*map(str, args)),
        }

    for name in ("scan_batch", "PROCESSES_ABOVE"):  # `scan_rate` replaces them
        monkeypatch.setattr(sweep, name, getattr(sweep, name))
    monkeypatch.setattr(index_scale, "fresh", here)
    rows = play(index_scale.main, ["files", "--sizes", "100", "300"], tmp_path / "files", repeats=1)["rows"]
    assert [(row["files"], row["scanned"]) for row in rows] == [
        (100, 100),
        (300, 300),
        (300, 300),
        (300, 100),
        (300, 3),
        (300, 3),
        (300, 300),
        (300, 300),
    ]
    assert 10 < rows[-1]["worker_mb"] < rows[-1]["peak_mb"]
    rows = play(index_scale.main, ["grouper", "--sizes", "300", "600"], tmp_path / "grouper")["rows"]
    assert [(row["files"], row["series"]) for row in rows] == [(300, 3), (600, 6)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_index_scale__workers_are_measured_and_not_who_started_them() -> None:
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * (len(held) >> 12)
    with index_scale.watched_workers(0.02) as workers:
        subprocess.run([sys.executable, "-c", "held = b'x' * (40 << 20); import time; time.sleep(0.3)"], check=True)
    assert 40 < max(workers.values()) < 100 < 200 < index_scale.peak_mb("self")


def test_burned_in__fits_one_half_and_measures_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", "c", "d", "436a6348"]
    made = [burned_in.Picture("X-ray", name, name, k < 2, tissue((120, 160), seed=k)) for k, name in enumerate(names)]
    monkeypatch.setattr(burned_in, "_all", lambda data: iter(made))
    monkeypatch.setattr(burned_in, "SIZES", (8, 16))
    found = burned_in.main(["--fit"])
    assert (found["images"], list(found["WEIGHTS"])) == (2, list(burned_in.FEATURES)) and found["text"] > 0
    rows = by(play(burned_in.main, [], tmp_path)["rows"], "images")
    assert (rows["X-ray, 16 px"]["with text"], rows["X-ray, 16 px"]["without"], rows["X-ray, 16 px"]["recall"]) == (2, 2, 1.0)
    assert burned_in.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_logistic__finds_the_weights_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 2)) * [1.0, 3.0]
    y = (rng.random(len(x)) < 1 / (1 + np.exp(-(1.5 * x[:, 0] - 0.5 * x[:, 1])))).astype(float)
    weights, bias = burned_in.logistic(x, y, 1e-6)
    assert weights == pytest.approx([1.5, -0.5], abs=0.06) and abs(bias) < 0.06


def test_gpu_step__runs_on_a_cpu(tmp_path: Path) -> None:
    content = play(gpu_step.main, GPU_STEP, tmp_path)
    rows = by(content["rows"], "what")
    assert set(rows) == {gpu_step.OURS, gpu_step.STOCK, gpu_step.TUNED, gpu_step.MATMUL, "the real loop, reading ahead"}
    assert 0 <= rows["the real loop, reading ahead"]["data_wait"] < 1
    ours = rows[gpu_step.OURS]
    assert ours["tflops"] == pytest.approx(ours["share_of_peak"], rel=1e-3)  # of a peak of 1
    assert ours["share_of_measured_matrix_rate"] > 0


def test_step_flops__agree_with_torchs_counter() -> None:
    """torch counts each product of the real forward and backward pass; biases, norms and the loss are no products."""
    from torch.utils.flop_counter import FlopCounterMode

    from medssl.data_sources import random_views
    from medssl.types import StepContext
    from medssl.views.pipeline import VolumeViews

    sizes = gpu_step.Sizes(size=32, patch=8, hidden=48, layers=3, heads=2, decoder=36, decoder_layers=2, decoder_heads=2)
    views = random_views(VolumeViews(size=32, mask={"ratio": 0.75, "cell": 8}), 1, 1, torch.device("cpu"))
    objective = gpu_step.make_mae(sizes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(views, StepContext())["loss"].backward()
    assert gpu_step.step_flops(sizes) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_monai_peer__has_our_widths_and_hides_as_much() -> None:
    sizes = gpu_step.Sizes(size=32, patch=8, hidden=48, layers=2, heads=2, decoder=48, decoder_layers=1, decoder_heads=2)
    with common.without_monai_warnings():
        net: Any = gpu_step.make_monai(sizes, tuned=True)
    assert all(block.attn.use_flash_attention for block in (*net.blocks[:-1], *net.decoder_blocks[:-1]))
    assert net.blocks[0].mlp.linear1.out_features == net.decoder_blocks[0].mlp.linear1.out_features == 4 * 48
    _, mask = net(torch.zeros(1, 1, 32, 32, 32))
    assert int((1 - mask).sum()) == sizes.visible
