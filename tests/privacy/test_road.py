"""DESIGN section 3, Privacy: the 18 kinds of identifiers go in at one end of the whole road, and nothing comes out at the other.

Files full of identifiers (`planted`) are indexed, listed, cached, trained on, evaluated, exported and reported by processes of their
own (`child`) that cannot reach the network (`guard/sitecustomize.py`), with errors of every sort provoked on the way. Then all they
printed and left behind is searched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medssl.archive.table import Archive
from medssl.recipe import recipe_folder
from tests.privacy import planted

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = recipe_folder() / "smoke"
TERRIBLE = f"cannot handle {planted.ALL}"
"""The message of the exceptions that are provoked inside medssl."""


@dataclass
class Step:
    """One command: its words, the exit status it must have, and what is broken inside medssl meanwhile (see `child`)."""

    argv: list[str]
    status: int = 0
    set: dict[str, Any] = field(default_factory=dict)
    kill: tuple[str, str, int] | None = None


def step(*argv: object, status: int = 0, kill: tuple[str, str, int] | None = None, **places: Any) -> Step:
    return Step([str(word) for word in argv], status, places.get("set", {}), kill)


class House:
    """A folder for everything the children read and write, and all they said.

    data/ holds the sources, out/ what medssl writes, cwd/, tmp/ and home/ what libraries may leave.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[tuple[str, bytes]] = []
        for name in ("data", "out", "cwd", "tmp", "home"):
            (root / name).mkdir()
        self.sources = root / "data" / "Quillfeather_Zebediah"
        self.data, self.out, self.attempts = root / "data", root / "out", root / "attempts.log"

    def run(self, steps: Sequence[Step], timeout: float = 110) -> None:
        """Run the steps in one process and check the exit status of each."""
        job = self.root / f"job{len(self.said)}.json"
        keys = ("argv", "set", "kill")
        job.write_text(json.dumps([{key: getattr(one, key) for key in keys if getattr(one, key)} for one in steps]))
        self._start([sys.executable, "-m", "tests.privacy.child", str(job)], timeout)
        statuses = [int(line) for line in Path(f"{job}.status").read_text().split()]
        said = self.said[-1][1].decode("utf-8", "replace")
        assert statuses == [one.status for one in steps], [
            (one.argv, status, said[-3000:]) for one, status in zip(steps, statuses) if status != one.status
        ]

    def run_alone(self, one: Step, timeout: float = 110) -> None:
        """Run one step as a user does."""
        done = self._start([sys.executable, "-m", "medssl", *one.argv], timeout)
        assert done.returncode == one.status, (one.argv, done.stderr[-3000:])

    def _start(self, command: list[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        env = {
            "PATH": os.environ["PATH"], "HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{Path(__file__).parent / 'guard'}{os.pathsep}{REPOSITORY}", "MEDSSL_TEST_ATTEMPTS": str(self.attempts),
            "PYTHONWARNINGS": "always",  "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        done = subprocess.run(command, env=env, cwd=self.root / "cwd", capture_output=True, timeout=timeout)
        self.said.append((f"{command[2:]} stdout", done.stdout))
        self.said.append((f"{command[2:]} stderr", done.stderr))
        return done

    def searcher(self) -> planted.Searcher:
        """Return a searcher that also knows the sources' paths and what identifies their bytes."""
        from medssl.archive.scan import file_digest, short_hash

        extra = {}
        for path in (path for path in self.sources.rglob("*") if path.is_file()):
            content = path.read_bytes()
            extra[str(path.relative_to(self.data))] = "path"
            extra[str(short_hash(str(path)))] = "hash of a path without a key"
            if content:
                for digest in (hashlib.md5, hashlib.sha1, hashlib.sha256):
                    extra[digest(content).hexdigest()] = "digest of a file"
                extra[file_digest(path) or "no digest"] = "digest of a file"
        return planted.Searcher(extra)

    def leaks(self) -> list[str]:
        """Return what of the planted left `private/` or was said."""
        searcher = self.searcher()
        found = [
            f"{name} says {line[:300]!r}: {what}"
            for name, text in self.said
            for line in text.splitlines()
            for what in searcher.find(line)
        ]
        skip = [self.data, *self.root.glob("job*.json")]
        return found + searcher.search(self.root, skip=skip)


def open_to_others(root: Path) -> list[str]:
    """Return what lies in a private folder and can be read by others, and private folders that can be entered by others."""
    found = []
    for path in root.rglob("*"):
        if "private" in path.relative_to(root).parts and stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink():
            found.append(f"{path.relative_to(root)} has mode {stat.S_IMODE(path.stat().st_mode):04o}")
    return found


def sources(house: House, n: int = 6) -> None:
    planted.write_archive(house.data, n)
    tables = house.data
    lines = (tables / "split.csv").read_text().splitlines()
    (tables / "no_header.csv").write_text("\n".join(lines[1:]))
    (tables / "other_words.csv").write_text("file,split\nQuillfeather.nii.gz,Zebediah Quillfeather\n")
    (tables / "two_splits.csv").write_text("file,split\nQuillfeather.nii.gz,train\nQuillfeather.nii.gz,test\n")
    (tables / "two_sides.csv").write_text(
        "file,split,patient\nQuillfeather_1.nii.gz,train,MRN83641957\nQuillfeather_2.nii.gz,test,MRN83641957\n"
    )
    (tables / "list.txt").write_text("/elsewhere/Quillfeather/MRN83641957.dcm\n")


def road(house: House) -> list[Step]:
    """Return the commands of the whole road; every one that must fail says something about a file or a table."""
    archive, data, run, recipe = house.out / "archive", house.data, house.out / "run", SMOKE / "mae_cnn_segresnet3d_mri.yaml"
    splits = ["--splits", data / "split.csv", "--modality", "MR"]
    steps = [step("index", data, *splits, "--out", archive, "--site", "north")]
    steps += [
        step("index", data, "--splits", data / name, "--out", house.out / "never", status=2)
        for name in ("no_header.csv", "other_words.csv", "two_splits.csv", "two_sides.csv")
    ]
    steps += [step("index", data, "--list", data / "list.txt", "--out", house.out / "never", status=2)]
    steps += [
        step("archive", "ls", archive, "--where", where, status=2)
        for where in (
            "series_id::INTEGER > 3",
            "no_such_column = 1",
            f"series_id IN (SELECT path FROM read_parquet('{archive}/private/files.parquet'))",
            "error(patient_id)",
            "modality = 'MR' GROUP BY",
        )
    ]
    steps += [step("archive", "ls", archive, "--limit", "500"), step("archive", "ls", archive, "--json")]
    views = ["views.size=[16, 16, 8]", f"data.index={archive}"]
    steps += [
        step("index", data, "--out", house.out / "broken", status=1, set={"medssl.archive.index:sweep": {"raise": TERRIBLE}}),
        step("index", data, "--out", house.out / "odd", set={"medssl.archive.scan:parse_header": {"raise": TERRIBLE}}),
        step(
            "cache",
            recipe,
            *views,
            f"data.store={house.out / 'none'}",
            status=2,
            set={"medssl.domains.mri:read_volume": {"raise": TERRIBLE}},
        ),
        step("cache", recipe, *views),
        step("pretrain", recipe, *views, f"out={run}", "train.steps=2", "train.tensorboard=true", "train.batch=2"),
        step(
            "pretrain",
            recipe,
            *views,
            f"out={house.out / 'ill'}",
            "train.steps=2",
            status=1,
            set={"medssl.sampling.source:ImageSource.fetch": {"raise": TERRIBLE}},
        ),
        step("runs", "ls", house.out),
        step("runs", "ls", house.out, "--json"),
        step("export", run, "--to", "safetensors", "--out", house.out / "export"),
        step("report", run, "--out", house.out / "report.html"),
    ]
    return steps


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The road travelled once in one process, and once more by the scan's worker processes."""
    house = House(tmp_path_factory.mktemp("house"))
    sources(house)
    workers = {"medssl.archive.sweep:PROCESSES_ABOVE": 0, "medssl.archive.sweep:BATCH": 40}
    house.run([step("index", house.data, "--out", house.out / "workers", "--json", set=workers), *road(house)])
    return house


def test_road__was_travelled_and_met_trouble(house: House) -> None:
    archive = Archive.open(house.out / "archive")
    assert archive.summary["n_series_usable"] >= 10
    assert {"truncated", "unreadable", "not_image", "empty", "broken_link", "linked_folder"} <= set(archive.summary["reasons"])
    workers = Archive.open(house.out / "workers").summary
    assert workers["n_files_seen"] == archive.summary["n_files_seen"] and workers["n_files_used"] > 20
    said = b"".join(text for _, text in house.said)
    assert b"could not be used" in said and b"an error in medssl itself: ValueError" in said
    names = {path.name for path in house.out.rglob("*")}
    assert {"report.html", "encoder.safetensors", "metrics.jsonl", "items.parquet"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names) and any(name.endswith(".b2nd") for name in names)


def test_nothing_planted__is_said_or_left_outside_private(house: House) -> None:
    leaks = house.leaks()
    assert not leaks, "\n".join(leaks)


def test_private__holds_what_the_owner_needs_and_only_for_the_owner(house: House) -> None:
    private = house.out / "archive" / "private"
    searcher = planted.Searcher()
    layers = [data for path in private.rglob("*.parquet") for _, data in planted.unwrap(path.name, path.read_bytes())]
    hits = {what for data in layers for what in searcher.find(data)}
    assert any(what.startswith("names") for what in hits) and any(what.startswith("medical_record") for what in hits)
    assert open_to_others(house.out) == []
    for folder in ("archive", "run"):
        assert stat.S_IMODE((house.out / folder).stat().st_mode) == 0o700


def test_network__is_not_even_tried(house: House) -> None:
    assert not house.attempts.exists(), house.attempts.read_text()


KILLS = [
    ("open", ".tmp-", 4),  # rows are about to be written as lines
    ("os.rename", "part-", 1),  # a finished Parquet file lies beside its place
    ("os.remove", "new-private.json", 1),  # the lines are complete, and so is the Parquet file made of them
    ("os.rename", "series.parquet", 1),
    ("os.rename", "summary.json", 1),
]


def test_kill__leaves_nothing_outside_private_and_the_next_run_cleans_up(house: House) -> None:
    argv = ["index", house.data, "--splits", house.data / "split.csv", "--modality", "MR", "--out"]
    outs = [house.out / f"killed{k}" for k in range(len(KILLS))]
    house.run([step(*argv, out, status=-9, kill=kill) for out, kill in zip(outs, KILLS)])
    assert not any((out / "summary.json").exists() for out in outs)
    strays = [path for out in outs for path in out.rglob(".tmp-*")]
    assert len(strays) >= len(KILLS) - 1
    assert open_to_others(house.out) == []
    leaks = house.leaks()
    assert not leaks, "\n".join(leaks)
    house.run([step(*argv, outs[0])])
    assert not list(outs[0].rglob(".tmp-*"))
    assert Archive.open(outs[0]).summary["reasons"] == Archive.open(house.out / "archive").summary["reasons"]


def test_spill__never_leaves_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB's own default is a folder `.tmp` where the user stands."""
    import duckdb

    from medssl.archive._parquet import connect

    monkeypatch.chdir(tmp_path)
    heavy = "SELECT i, repeat(i::VARCHAR, 20) AS text FROM range(600000) t(i) ORDER BY hash(i)"
    for spill in (None, tmp_path / "private"):
        connection = connect(spill)
        connection.execute("SET memory_limit = '40MB'")
        connection.execute("SET threads = 1")
        try:
            connection.execute(f"CREATE TABLE big AS {heavy}")
        except duckdb.OutOfMemoryException:
            assert spill is None
        assert {path.name for path in tmp_path.iterdir()} <= {"private"}, spill
        connection.close()


def long_road(house: House) -> list[Step]:
    """Return the rest of the road: probes, fine-tuning, both kinds of report, and tables and cohorts with faults."""
    archive, data, out = house.out / "archive", house.data, house.out
    cnn, vit = SMOKE / "mae_cnn_segresnet3d_mri.yaml", SMOKE / "mae_vit3d_mri.yaml"
    evaluate, tune = recipe_folder() / "evaluate" / "regression_mri.yaml", recipe_folder() / "demo" / "finetune.yaml"
    probe = [
        f"probes.volume.table={data / 'split.csv'}",
        "probes.volume.target=volume",
        "probes.volume.where=split in ('val', 'test')",
    ]
    asked = [f"source.index={archive}", "k=[3]", "--weights", out / "run"]
    tuned = ["settings.steps=2", "settings.warmup_steps=1", "settings.val_every=0", "settings.crop=[32, 32, 32]"]
    tuned += ["settings.spacing_mm=[4, 4, 4]", "labels=2", "--weights", out / "run"]
    return [
        step("index", data / house.sources.name, "--splits", data / "split.csv", "--modality", "MR", "--out", archive),
        step("index", data / house.sources.name, "--out", archive),
        step("cache", cnn, f"data.index={archive}"),
        step("pretrain", cnn, f"data.index={archive}", f"out={out / 'run'}", "train.steps=4", "probes.volume.every=2", *probe),
        step("pretrain", out / "run", status=2),
        step("pretrain", out / "run", "--resume"),
        step("pretrain", vit, f"data.index={archive}", f"out={out / 'vit'}", "train.steps=2", "train.tensorboard=true"),
        step("evaluate", evaluate, f"table={data / 'split.csv'}", "target=volume", f"out={out / 'evaluate'}", *asked),
        step("evaluate", evaluate, f"table={data / 'no_header.csv'}", "target=volume", f"out={out / 'none'}", *asked, status=2),
        step("evaluate", evaluate, f"table={data / 'split.csv'}", "target=patient", f"out={out / 'none'}", *asked, status=2),
        step("finetune", tune, f"cohort.path={data / 'cohort'}", f"out={out / 'finetune'}", *tuned, "--twin"),
        step("finetune", tune, f"cohort.path={data / 'grids'}", f"out={out / 'grids'}", *tuned, status=1),
        step("finetune", tune, f"cohort.path={data}", f"out={out / 'none'}", *tuned, status=2),
        step("finetune", tune, f"cohort.path={data / 'no_header.csv'}", f"out={out / 'none'}", *tuned, status=2),
        step("finetune", tune, f"cohort.path={data / 'by_patient.json'}", f"out={out / 'none'}", *tuned, status=2),
        step("export", out / "run", "--to", "segresnet", "--out", out / "segresnet"),
        step("export", out / "run", "--to", "monai-bundle", "--out", out / "bundle"),
        step("report", out, "--out", out / "report.html"),
        step("report", out, "--out", out / "images.html", "--with-images"),
        step("runs", "ls", out),
    ]


@pytest.mark.slow
def test_whole_road__says_and_leaves_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    sources(house, n=12)
    planted.write_cohort(house.data, "cohort", 8)  # two test cases
    grids = planted.write_cohort(house.data, "grids", 8)
    for path in (grids / "labels").iterdir():  # label maps on another grid than their images
        shutil.copy(house.data / "cohort" / "images" / path.name, path)
        path.write_bytes(planted.zipped(planted.nifti_bytes(7), path.name))
    (house.data / "by_patient.json").write_text(json.dumps({"Quillfeather": {"MRN83641957": "1957-03-12"}}))
    first, *rest = long_road(house)
    house.run_alone(first)  # as a user types it
    house.run(rest, timeout=400)
    house.run_alone(step("archive", "ls", house.out / "archive", "--where", "series_id::INTEGER > 3", status=2))
    cnn = SMOKE / "mae_cnn_segresnet3d_mri.yaml"
    kills = [
        ("os.rename", ".b2nd", 2),
        ("os.rename", "items.parquet", 1),
        ("os.rename", "run.json", 2),
        ("os.rename", "checkpoint", 1),
    ]
    steps = []
    for k, kill in enumerate(kills):
        places = [f"data.index={house.out / 'archive'}", f"data.store={house.out / f'store{k}'}", f"out={house.out / f'cut{k}'}"]
        steps.append(step("pretrain", cnn, *places, "train.steps=2", status=-9, kill=kill))
    house.run(steps)
    leaks = house.leaks()
    assert not leaks, "\n".join(leaks)
    assert open_to_others(house.out) == []
    assert not house.attempts.exists(), house.attempts.read_text()


def test_leaks__are_seen_wherever_they_are(tmp_path: Path) -> None:
    """The checks above can fail: on what is said, on what lies about, on rights, on a hash without a key, on a call home."""
    house = House(tmp_path)
    house.sources.mkdir()
    (house.sources / "0001.dcm").write_bytes(b"some image")
    house.run_alone(step("index", house.data / "Zebediah", "--out", house.out / "none", status=2))  # quotes the path that was typed
    assert any("says" in line and "Zebediah" in line for line in house.leaks())
    house.said.clear()
    assert house.leaks() == []
    for place in ("out", "cwd", "tmp", "home"):
        (tmp_path / place / ".spill").write_text("born 12.03.1957")
    assert len({line.split("/")[0] for line in house.leaks()}) == 4
    (house.out / "x.json").write_text(f'"{hashlib.sha256(b"some image").hexdigest()}"')
    assert any("digest of a file" in line for line in house.leaks())
    (house.out / "private").mkdir(mode=0o700)
    (house.out / "private" / "x").touch(mode=0o644)
    assert open_to_others(house.out) == ["private/x has mode 0644"]
