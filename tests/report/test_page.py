from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.phantoms import ORGAN_NAMES, draw_phantom
from medssl.report import report
from medssl.report.collect import Leftovers, collect
from medssl.report.elements import duration, plain, text
from medssl.report.headline import Comparison, Estimate
from medssl.report.page import _probes, _result
from medssl.report.page_curves import _chart
from medssl.report.page_pictures import _one_group, _paired_cases, hidden_error

TITLES = (
    "Result",
    "What ran",
    "Loss and monitors",
    "Reconstructions",
    "Segmentation",
    "Probes and controls",
    "Data",
    "Before you use this",
)


class Outline(HTMLParser):
    """Headings, attributes and the balance of tags."""

    VOID = frozenset({"meta", "link", "img", "br", "source", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def read(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_demo(root: Path) -> Path:
    """Write what a small demo leaves behind."""
    run = root / "pretrain"
    facts = {"status": "finished", "seed": 3, "hardware": {"cpu": "EPYC", "cores": 2, "hostname": "ward7-pc"}}
    private = {"out": "/home/jane.doe/runs", "user": "jane.doe", "argv": ["medssl", "/data/DOE_JANE"]}
    items = {"used": 36, "patients": 35, "failed": {"constant": 1}}
    write_json(run / "run.json", {**facts, **private, "items": items, "git": "a1b2c3"})
    write_json(run / "weights" / "index.json", {"default": "encoder"})
    manifest = {"encoder": {"name": "segresnet3d", "args": {"init_filters": 8}}, "objective": "mae_cnn"}
    write_json(run / "weights" / "last" / "encoder.json", manifest)
    lines = [{"step": k, "loss": 1 / k, "lr": 1e-3, "monitor/feature_std": 0.1} for k in range(1, 90)]
    lines[40]["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    phantoms = [draw_phantom(seed, size=(20, 18, 16)) for seed in range(2)]
    image = np.stack([phantom.image for phantom in phantoms])
    label = np.stack([phantom.labels for phantom in phantoms])
    spacing = np.array([phantom.spacing_mm for phantom in phantoms])
    mask = np.zeros(image.shape, bool)
    mask[:, :10] = True
    (run / "figures").mkdir()
    np.savez(
        run / "figures" / "reconstruction.npz", input=image, masked=image * ~mask, output=image * 0.9, mask=mask, spacing_mm=spacing
    )
    for arm, dice in (("scratch", 0.6), ("mae", 0.8)):
        cell = root / "finetune" / "cells" / f"{arm}_n5_s0"
        cases = [
            {
                "id": f"DOE_JANE_{i}",
                "patient": f"MRN{i}",
                "dice": dict.fromkeys(ORGAN_NAMES, dice + 0.01 * i),
                "hd95_mm": dict.fromkeys(ORGAN_NAMES, 4.0 - i),
            }
            for i in range(3)
        ]
        cases[0]["hd95_mm"]["liver"] = None
        curve = [{"step": s, "loss": 1.0 / s, "val_dice": {"liver": 0.5}} for s in range(1, 9)]
        content = {"arm": arm, "labels": 5, "seed": 0, "structures": list(ORGAN_NAMES), "cases": cases, "curve": curve}
        write_json(cell / "results.json", {**content, "settings": {"network": "segresnet", "steps": 400}})
        (cell / "figures").mkdir()
        arrays = {"image": image, "label": label, "prediction": label, "spacing_mm": spacing}
        np.savez(cell / "figures" / "segmentation.npz", **arrays, dice=np.full(2, dice), structures=np.array(ORGAN_NAMES))
    probe = {"probe": "ridge", "metric": "balanced_accuracy", "low": 0.5, "high": 0.9, "n_images": 15, "n_patients": 14}
    rows = [{"name": "encoder", "value": 0.75, **probe}, {"name": "random_init", "value": 0.55, **probe}]
    write_json(root / "evaluate" / "evaluate.json", {"target": "small_kidney", "rows": rows})
    summary = {"n_files_seen": 103, "n_files_used": 100, "n_series": 60, "reasons": {"truncated": 2, "not_image": 1}}
    write_json(root / "archive" / "summary.json", summary)
    write_json(root / "archive" / "private" / "summary.json", {**summary, "n_files_seen": 99999})
    write_json(root / "demo.json", {"timings": {"pretrain": 75.0}})
    return root


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(demo, tmp_path_factory.mktemp("page") / "report.html")


def test_report__has_every_section_and_valid_nesting(page: Path) -> None:
    outline = read(page)
    assert tuple(outline.titles) == TITLES
    anchors = {value[1:] for tag, name, value in outline.attributes if tag == "a" and name == "href"}
    assert anchors == {value for tag, name, value in outline.attributes if tag == "section" and name == "id"}
    assert "Pretraining helped: +20.0 Dice points at 5 labels" in "".join(outline.words)


def test_report__refers_to_nothing_outside_itself(page: Path) -> None:
    content = page.read_text()
    assert not re.search(r"https?:|//[a-z]|<script|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", content))
    for _, name, value in read(page).attributes:
        if name in ("src", "srcset", "href"):
            assert value.startswith(("data:", "#"))
    assert "default-src 'none'" in content


def test_report__pictures_decode_and_have_words_for_them(page: Path) -> None:
    from matplotlib.image import imread

    outline = read(page)
    sources = [value for tag, name, value in outline.attributes if name in ("src", "srcset") and value.startswith("data:image")]
    assert len([a for a in outline.attributes if a[0] == "img" and a[1] == "alt" and a[2]]) >= 6
    assert len(sources) >= 9
    for source in sources:
        picture = imread(io.BytesIO(base64.b64decode(source.partition("base64,")[2])), format="png")
        assert picture.ndim == 3 and picture.shape[0] > 100 and picture[..., :3].std() > 0


def test_report__says_what_ran_and_what_was_left_out(page: Path) -> None:
    words = " ".join("".join(read(page).words).split())
    for expected in (
        "segresnet3d (init_filters 8)",
        "1 min 15 s",
        "files seen103",
        "left out: truncated2",
        "failed: constant1",
        "random_init control",
        "1 of 89 logged losses were not finite",
        "(1 without)",
        "Research only",
    ):
        assert expected in words, expected
    assert "99999" not in words


def test_report__names_no_person_host_or_path(page: Path, demo: Path) -> None:
    content = page.read_text().lower()
    for secret in ("doe", "jane", "mrn0", "ward7", "/home", "/data", str(demo).lower()):
        assert secret not in re.sub(r"base64,[a-z0-9+/=]+", "", content), secret
    assert os.stat(page).st_mode & 0o777 == 0o600


def test_report__without_images_holds_charts_alone(demo: Path, tmp_path: Path) -> None:
    path = report(demo, tmp_path / "shared.html", with_images=False)
    outline = read(path)
    assert tuple(outline.titles) == TITLES
    alts = [value for tag, name, value in outline.attributes if tag == "img" and name == "alt"]
    assert alts and all("against step" in alt or "Label curve" in alt for alt in alts)
    assert "".join(outline.words).count("without images of patients") == 2
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_report__empty_folder_says_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outline = read(report(tmp_path / "run", tmp_path / "deep" / "report.html"))
    assert tuple(outline.titles) == TITLES
    words = "".join(outline.words)
    for missing in ("run.json", "metrics.jsonl", "reconstruction.npz", "segmentation.npz", "evaluate.json", "fine-tuning result"):
        assert re.search(rf"No \S*{re.escape(missing)}", words), missing


def test_report__hostile_strings_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    run = tmp_path / "run"
    write_json(run / "run.json", {"status": evil, "versions": {evil: evil}, "git": f"{evil} https://evil.example/x"})
    write_json(run / "evaluate.json", {"target": evil, "rows": [{"name": evil, "metric": evil, "value": 1.0}], "notes": [evil]})
    write_json(run / "demo.json", {"table": [{evil: evil}], "timings": {evil: 1.0}, "data": {evil: evil}})
    metrics = {"step": 1, "loss": 1.0, f"monitor/{evil}$": 2.0, "probe/\\frac{$": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    cell = {"arm": evil, "labels": evil, "structures": [evil], "cases": [{"id": evil, "dice": [0.5], "hd95_mm": [1.0]}]}
    write_json(run / "results.json", {**cell, "settings": {"network": evil, "steps": evil}})
    (run / "figures").mkdir()
    volume = np.ones((1, 4, 4, 4))
    label = volume.astype(np.uint8)
    np.savez(run / "figures" / "segmentation.npz", image=volume, label=label, prediction=label, structures=np.array([evil]))
    path = report(run, tmp_path / "report.html")
    tags = {tag for tag, _, _ in read(path).attributes}
    assert "script" not in tags and not re.search(r"<script|<img src=x", path.read_text())
    assert not any(name.startswith("on") for _, name, _ in read(path).attributes)
    assert "evil.example" not in path.read_text()


def test_report__broken_files_are_named_and_the_rest_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    write_json(run / "run.json", {"status": "interrupted", "seed": 7})
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    (run / "evaluate.json").write_text("{not json")
    (run / "demo.json").write_text("[1, 2]")
    (run / "results.json").write_text('{"cases": 3')
    (run / "summary.json").write_text('{"rows": [1, {"labels": 5, "arm": "scratch", "dice": 0.5}]}')
    (run / "figures").mkdir()
    (run / "figures" / "reconstruction.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(run / "figures" / "segmentation.npz", image=np.zeros((1, 2, 2, 2)), label=np.zeros((1, 3, 3, 3)))
    words = "".join(read(report(run, tmp_path / "report.html")).words)
    for fault in (
        "evaluate.json: not valid JSON (line 1",
        "demo.json: holds a list",
        "results.json: not valid JSON",
        "summary.json: rows are expected",
        "metrics.jsonl: 1 of 3 lines are not JSON objects (the last line is cut short)",
        "reconstruction.npz: cannot be read as arrays",
        "segmentation.npz: has no array prediction",
        "status: interrupted",
    ):
        assert fault in words, fault
    assert "1 of 2 logged losses were not finite" in words
    assert "evaluate.json" in caplog.text


def test_report__no_pickle_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    arrays = {name: np.array([{"a": 1}], dtype=object) for name in ("input", "output", "mask")}
    np.savez(tmp_path / "figures" / "reconstruction.npz", **arrays)
    words = "".join(read(report(tmp_path, tmp_path / "report.html")).words)
    assert "cannot be read as arrays (ValueError)" in words


def test_chart__lines_of_other_monitors_leave_no_gap() -> None:
    metrics = [{"step": 1, "loss": 2.0}, {"step": 1, "feature_std": 0.1}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    (line,) = _chart("loss", metrics).lines
    assert line.x.tolist() == [1, 2, 3] and np.isnan(line.y[1]) and line.y[2] == 1
    (line,) = _chart("feature_std", metrics).lines
    assert line.x.tolist() == [1]


def test_report__only_nan_losses_and_odd_volumes_do_not_crash(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"loss": Infinity}\n{}\n')
    (tmp_path / "figures").mkdir()
    volume = np.full((2, 5, 4, 1), np.nan, np.float32)
    np.savez(
        tmp_path / "figures" / "reconstruction.npz",
        input=volume,
        output=volume,
        mask=np.zeros(volume.shape),
        spacing_mm=np.zeros((2, 3)),
    )
    outline = read(report(tmp_path, tmp_path / "report.html"))
    words = "".join(outline.words)
    assert "Volume 2: 0 % hidden." in words and "3 of 3 logged losses were not finite" in words
    assert tuple(outline.titles) == TITLES


def test_report__arms_of_another_seed_are_not_mixed_in(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(demo / "finetune", copy / "finetune")
    shutil.copytree(copy / "finetune" / "cells" / "mae_n5_s0", copy / "finetune" / "cells" / "mae_n5_s1")
    results = copy / "finetune" / "cells" / "mae_n5_s1" / "results.json"
    results.write_text(results.read_text().replace('"seed": 0', '"seed": 1'))
    found = collect(copy)
    assert len(found.segmentations) == 3
    arms = _one_group(found.segmentations)
    assert [(part.arm, part.group) for part in arms] == [("scratch", ("5", "0")), ("mae", ("5", "0"))]
    cases = _paired_cases(arms)
    assert [dice for _, _, dice in cases] == [pytest.approx({"scratch": 0.6, "mae": 0.8})] * 2
    assert all(list(cut.maps) == ["label", "scratch", "mae"] for cuts, _, _ in cases for cut in cuts.values())


def test_report__totals_that_do_not_add_up_are_pointed_out(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"n_files_seen": 10, "n_files_used": 7, "reasons": {"truncated": 2}})
    assert "do not add up" in "".join(read(report(tmp_path, tmp_path / "report.html")).words)
    write_json(tmp_path / "summary.json", {"n_files_seen": 10, "n_files_used": 8, "reasons": {"truncated": 2}})
    assert "do not add up" not in "".join(read(report(tmp_path, tmp_path / "report.html")).words)


def test_report__wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a folder"):
        report(tmp_path / "nowhere", tmp_path / "report.html")
    with pytest.raises(RequestError, match="name the HTML file"):
        report(tmp_path, tmp_path)


def test_text__takes_paths_and_links_out() -> None:
    assert text("a < b & 'c'") == "a &lt; b &amp; &#x27;c&#x27;"
    assert text("could not read /home/jane/run 1/2 of ~/x") == "could not read (path) 1/2 of (path)"
    assert text(r"C:\Users\jane and \\server\share") == "(path) and (path)"
    assert text("see https://hospital.example/p/1, then") == "see (link) then"
    assert text("voxels/s and n / a") == "voxels/s and n / a"


def test_plain__writes_values_as_people_do() -> None:
    assert plain(2.5) == "2.5" and plain(-0.00012) == "−0.00012" and plain(None) == "–" and plain(True) == "yes"
    assert plain([48, 48, 32]) == "48 × 48 × 32"
    assert plain({"name": "vit3d", "args": {"depth": 4}}) == "vit3d (depth 4)"
    assert plain({"cpu": "EPYC", "hostname": "x", "gpu": None}) == "cpu EPYC"
    assert duration(4.06) == "4.1 s" and duration(219) == "3 min 39 s" and duration(7200) == "2.0 h" and duration("x") == "–"


def test_hidden_error__is_one_for_the_mean_and_zero_for_the_truth() -> None:
    image = np.random.default_rng(0).random((6, 6, 6))
    hidden = np.zeros(image.shape, bool)
    hidden[:3] = True
    assert hidden_error(image, hidden, image) == 0
    assert hidden_error(image, hidden, np.full_like(image, image[:3].mean())) == pytest.approx(1)
    assert hidden_error(image, np.zeros_like(hidden), image) is None
    assert hidden_error(np.ones_like(image), hidden, image) is None


@pytest.mark.parametrize("known", [True, False])
def test_intervals__say_what_was_drawn(known: bool) -> None:
    row = {
        "name": "weights",
        "metric": "accuracy",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "by": "by patient" if known else "by image",
    }
    page = _probes(Leftovers(Path("x"), evaluations=[row]))
    assert ("Intervals by patient." in page) == known and ("by image, as not all patients are known." in page) != known
    mixed = _probes(Leftovers(Path("x"), evaluations=[row, {**row, "by": "by patient", "n_patients": 9}]))
    assert ("Intervals by patient." in mixed) == known and ("by image in the rows without a number of patients" in mixed) != known
    lines = [Comparison("unetr", "5", "ours", *[Estimate(0.5, 0.4, 0.6)] * 3, by_case=by_case) for by_case in (False, not known)]
    said = _result(Leftovers(Path("x")), lines)
    assert ("drawn by patient." in said) == known and ("drawn by case, as not all patients are known." in said) != known
