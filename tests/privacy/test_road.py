"""DESIGN section 3, Privacy: the 18 kinds of identifiers go in at one end of the whole road, and nothing comes out at the other.

Files full of identifiers (`planted`) are indexed, listed, cached, trained on, matched, evaluated, exported and reported by processes of
their own (`child`) that cannot reach the network (`guard/sitecustomize.py`), with errors of every sort provoked on the way. Then all
they printed and left behind is searched.
"""

from __future__ import annotations

import hashlib
import inspect
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
from medssl.cli.data import index as index_command
from medssl.recipe import recipe_folder
from tests.privacy import planted
from tests.privacy.child import MARK

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = recipe_folder() / "smoke"
TERRIBLE = f"cannot handle {planted.ALL}"
"""The message of the exceptions that are provoked inside medssl."""


HOST, USER = "ris-harrowgate-07", "tamsinholt"
"""What the machine and whoever works at it are called: neither is anybody's business who gets weights or a report."""


MODIFIED = 1566049357
"""When all sources were changed last."""


@dataclass
class Step:
    """One command: its words, the exit status it must have, and what is broken inside medssl meanwhile (see `child`).

    `typed`: whether a message may say again what was typed, a path or the value of an option.
    """

    argv: list[str]
    status: int = 0
    set: dict[str, Any] = field(default_factory=dict)
    kill: tuple[str, str, int] | None = None
    typed: bool = False


def step(*argv: object, status: int = 0, kill: tuple[str, str, int] | None = None, typed: bool = False, **places: Any) -> Step:
    return Step([str(word) for word in argv], status, places.get("set", {}), kill, typed)


def wrong(*argv: object) -> Step:
    """Return a command that is refused, and may say again what was typed."""
    return step(*argv, status=2, typed=True)


class House:
    """A folder for everything the children read and write, and all they said.

    data/ holds the sources, cines/ those of clips, out/ what medssl writes, cwd/, tmp/ and home/USER what libraries may leave.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[tuple[str, bytes]] = []
        for name in ("data", "out", "cwd", "tmp", f"home/{USER}"):
            (root / name).mkdir(parents=True)
        self.sources = root / "data" / "Quillfeather_Zebediah"
        self.cines = root / "cines"
        self.data, self.out, self.attempts = root / "data", root / "out", root / "attempts.log"

    def run(self, steps: Sequence[Step], timeout: float = 300) -> None:
        """Run the steps in one process and check the exit status of each."""
        job = self.root / f"job{len(self.said)}.json"
        keys = ("argv", "set", "kill")
        job.write_text(json.dumps([{key: getattr(one, key) for key in keys if getattr(one, key)} for one in steps]))
        done = self._start([sys.executable, "-m", "tests.privacy.child", str(job)], timeout)
        statuses = [int(line) for line in Path(f"{job}.status").read_text().split()]
        for stream in (done.stdout, done.stderr):
            start, *parts = stream.split(MARK.encode())
            self._heard("start", start)
            for one, part in zip(steps, parts, strict=True):
                self._heard(" ".join(one.argv[:2]), part, one)
        failed = [
            f"{' '.join(one.argv)}: status {status}, not {one.status}: {part[-1500:].decode('utf-8', 'replace')}"
            for one, status, part in zip(steps, statuses, parts)
            if status != one.status
        ]
        assert not failed, "\n".join(failed)

    def run_alone(self, one: Step, timeout: float = 300) -> None:
        """Run one step as a user does."""
        done = self._start([sys.executable, "-m", "medssl", *one.argv], timeout)
        assert done.returncode == one.status, (one.argv, done.stderr[-3000:])
        for stream in (done.stdout, done.stderr):
            self._heard(" ".join(one.argv[:2]), stream, one)

    def _heard(self, what: str, text: bytes, one: Step | None = None) -> None:
        if one is not None and one.typed:
            typed = {*one.argv, *(Path(word).name for word in one.argv)} - {""}
            for word in sorted(typed, key=len, reverse=True):
                text = text.replace(word.encode(), b"(typed)")
        self.said.append((what, text))

    def _start(self, command: list[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        env = {
            "PATH": os.environ["PATH"], "HOME": str(self.root / "home" / USER), "USER": USER, "LOGNAME": USER,
            "MEDSSL_TEST_HOST": HOST, "HOSTNAME": HOST, "TMPDIR": str(self.root / "tmp"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{Path(__file__).parent / 'guard'}{os.pathsep}{REPOSITORY}", "MEDSSL_TEST_ATTEMPTS": str(self.attempts),
            "PYTHONWARNINGS": "always",  "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        return subprocess.run(command, env=env, cwd=self.root / "cwd", capture_output=True, timeout=timeout)

    def searcher(self) -> planted.Searcher:
        """Return a searcher that also knows the sources' paths and what identifies their bytes."""
        from medssl.archive.scanning.scan import file_digest, short_hash

        extra = {HOST: "host", USER: "user", str(MODIFIED): "time of change of a source"}
        for path in (path for root in (self.sources, self.cines) for path in root.rglob("*") if path.is_file()):
            content = path.read_bytes()
            extra["/".join(path.parts[-2:])] = "path"
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
        skip = [
            self.data,
            self.cines,
            *self.root.glob("job*.json"),
            self.root / "home",
            self.root / "tmp" / f"torchinductor_{USER}",
        ]
        return found + searcher.search(self.root, skip=skip) + searcher.search(self.root / "home" / USER)


def as_old_as_the_sources(root: Path) -> list[Path]:
    """Return what took over the time of change of a source."""
    return [path for path in root.rglob("*") if "private" not in path.parts and int(path.lstat().st_mtime) == MODIFIED]


def open_to_others(root: Path) -> list[str]:
    """Return what lies in a private folder and can be read by others, and private folders that can be entered by others."""
    found = []
    for path in root.rglob("*"):
        if "private" in path.relative_to(root).parts and stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink():
            found.append(f"{path.relative_to(root)} has mode {stat.S_IMODE(path.stat().st_mode):04o}")
    return found


def sources(house: House, n: int = 6) -> None:
    planted.write_archive(house.data, n)
    lines = (house.data / "split.csv").read_text().splitlines()
    tables = {
        "empty_box.csv": "image,class,xmin,ymin,xmax,ymax\nQuillfeather_Zebediah_1.nii.gz,Thistlewaite,1,1,1,5\n",
        "no_header.csv": "\n".join(lines[1:]),
        "other_words.csv": "file,split\nQuillfeather.nii.gz,Zebediah Quillfeather\n",
        "two_splits.csv": "file,split\nQuillfeather.nii.gz,train\nQuillfeather.nii.gz,test\n",
        "two_sides.csv": "file,split,patient\nQuillfeather_1.nii.gz,train,MRN83641957\nQuillfeather_2.nii.gz,test,MRN83641957\n",
        "list.txt": "/elsewhere/Quillfeather/MRN83641957.dcm\n",
        "by_study.csv": f"study_uid,finding\n{planted.UID_ROOT}.1.2,1\n{planted.UID_ROOT}.404.2,0\n",
        "by_path.csv": "path,finding\nQuillfeather_Zebediah_1.nii.gz,1\nZebediah/MRN83641957.dcm,0\nThistlewaite.nii,1\n",
        "by_date.csv": "mrn,date,finding\nMRN83641957,17.08.2019,1\nMRN83641957,Quillfeather,1\n904-71-3358,2019-08-17,0\n",
        "names.csv": "accession,finding\nACCN201955217,Quillfeather^Zebediah\n",
        "dates.csv": "accession,finding\nACCN201955217,1957-03-12\n",
        "no_key.csv": "ACCN201955217,Quillfeather\nACCN201955217,Zebediah\n",
        "twice.csv": "accession,Quillfeather,Quillfeather\nACCN201955217,1,1\n",
        "request.csv": f"kind,value\nstudy_uid,{planted.UID_ROOT}.1.2\naccession,ACCN-404-Quillfeather\npatient,MRN83641957\n",
        "bad_request.csv": "kind,value\nZebediah,MRN83641957\n",
        "merge.csv": "patient,same_as\nMRN83641957,904-71-3358\nMRN83641957_1,Quillfeather\n",
        "bad_merge.csv": "MRN83641957,904-71-3358\n",
        "Quillfeather.yaml": "kind: pretrain\nepochs: MRN83641957\n",
    }
    for name, text in tables.items():
        (house.data / name).write_text(text)
    for path in (path for path in house.sources.rglob("*") if not path.is_symlink()):
        os.utime(path, (MODIFIED, MODIFIED))  # images are often written on the day of the study


PIXELS = ["--pixels"] if "pixels" in inspect.signature(index_command).parameters else []
"""Voxels are read at the scan as soon as `medssl index` can: hashes and what is burned in must stay inside as well."""
SECRET = "Zebediah_Quillfeather"
"""A word in the wrong place on the command line."""


def index_road(house: House, name: str = "archive") -> list[Step]:
    """Return `index` and all that is done with an index, with every fault of a table that the commands look for."""
    data, archive, other = house.data, house.out / name, house.out / "other"
    splits = ["--splits", data / "split.csv", "--modality", "MR"]
    person = data / house.sources.name / "MRN83641957" / "1957-03-12"
    attach, apart = ["labels", "attach"], ["--where", "n_files > 1", "--against-where", "n_files = 1"]
    to = ["--archive", archive, "--out", house.out / "labels.csv"]
    steps = [step("index", data, *splits, *PIXELS, "--out", archive, "--site", "north")]
    steps += [
        step("index", data, "--splits", data / name, "--out", house.out / "never", status=2)
        for name in ("no_header.csv", "other_words.csv", "two_splits.csv", "two_sides.csv")
    ]
    steps += [
        step("index", data, "--list", data / "list.txt", "--out", house.out / "never", status=2),
        step("index", data, "--out", house.out / "broken", status=1, set={"medssl.archive.index:sweep": {"raise": TERRIBLE}}),
        step("index", person / "20190817", "--out", other),
    ]
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
    steps += [
        step("archive", "ls", archive, "--limit", "500", "--rejected"),
        step("archive", "ls", archive, "--json"),
        step("archive", "split", archive, "--merge", data / "merge.csv", "--by", "modality,site"),
        step("archive", "split", archive, "--merge", data / "bad_merge.csv", status=2),
        step("archive", "leakage", archive, "--against", other),
        step("archive", "leakage", archive, "--against", archive, *apart, "--json"),
        step(*attach, data / "by_path.csv", *to, "--by", "path", "--json"),
        step(*attach, data / "by_date.csv", *to, "--by", "mrn_date"),
        step(*attach, data / "by_study.csv", *to, "--by", "study_uid"),
    ]
    steps += [
        step(*attach, data / name, *to, "--by", "accession", status=2)
        for name in ("names.csv", "dates.csv", "no_key.csv", "twice.csv")
    ]
    steps += [
        step("archive", "release", archive, "--k", "5", "--out", house.out / "release"),
        step("card", "build", archive, "--name", "north", "--k", "5", "--files", data, "--out", house.out / "card.yaml"),
        step("card", "check", house.out / "card.yaml", "--archive", archive, "--files", person, status=1),
        step("card", "check", "smir_hippocampus", "--archive", archive, status=2),
        step("card", "render", house.out / "card.yaml", "--to", "markdown", "--out", house.out / "card.md"),
        step("card", "render", house.out / "card.yaml", "--to", "croissant", "--out", house.out / "card.json"),
        step("report", archive, "--out", house.out / "archive.html"),
        step("report", archive, "--out", house.out / "pictures.html", "--with-images"),
        step("archive", "withdraw", other, data / "bad_request.csv", status=2),
        step("archive", "withdraw", other, data / "request.csv", "--runs", house.out),
    ]
    return steps


def wrong_words(house: House) -> list[Step]:
    """Return commands with a name where none belongs: they may say it again, and nothing else of what they looked at."""
    archive, data, out = house.out / "archive", house.data, house.out
    nowhere = data / "Quillfeather_nowhere"
    return [
        wrong("index", nowhere, "--out", out / "never"),
        wrong("index", data, "--splits", nowhere / "MRN83641957.csv", "--out", out / "never"),
        wrong("index", data, "--modality", SECRET, "--out", out / "never"),
        wrong("index", data, "--prune", SECRET, "--out", out / "never"),
        wrong("archive", "ls", nowhere),
        wrong("archive", "ls", archive, "--where", SECRET),
        wrong("archive", "split", archive, "--fractions", f"{SECRET}=1"),
        wrong("archive", "split", archive, "--by", SECRET),
        wrong("archive", "leakage", archive, "--against", nowhere),
        wrong("archive", "withdraw", archive, nowhere / "19570312.csv"),
        wrong("labels", "attach", data / "by_path.csv", "--archive", archive, "--by", SECRET, "--out", out / "x.csv"),
        wrong(
            "labels",
            "attach",
            data / "by_path.csv",
            "--archive",
            archive,
            "--by",
            "path",
            "--columns",
            SECRET,
            "--out",
            out / "x.csv",
        ),
        wrong("card", "check", nowhere / "Zebediah.yaml"),
        wrong("card", "build", archive, "--name", SECRET, "--out", out / "x.yaml"),
        wrong("cache", data / "Quillfeather.yaml"),
        wrong("pretrain", nowhere / "Quillfeather.yaml"),
        wrong("export", nowhere, "--to", "unetr", "--out", out / "x"),
        wrong("report", nowhere, "--out", out / "x.html"),
    ]


def training_road(house: House) -> list[Step]:
    """Return what is done with a recipe, as short as it gets."""
    run, recipe = house.out / "run", SMOKE / "mae_cnn_segresnet3d_mri.yaml"
    views = ["views.size=[16, 16, 8]", f"data.index={house.out / 'archive'}"]
    fails = {"medssl.domains.mri:read_volume": {"raise": TERRIBLE}}
    breaks = {"medssl.sampling.source:ImageSource.fetch": {"raise": TERRIBLE}}
    return [
        step("cache", recipe, *views, f"data.store={house.out / 'none'}", status=2, set=fails),
        step("pretrain", recipe, *views, f"out={run}", "train.steps=2", "train.tensorboard=true", "train.batch=2"),
        step("pretrain", recipe, *views, f"out={house.out / 'ill'}", "train.steps=2", status=1, set=breaks),
        step("runs", "ls", house.out),
        step("runs", "ls", house.out, "--json"),
        step("export", run, "--to", "safetensors", "--out", house.out / "export"),
    ]


def matching_road(house: House) -> list[Step]:
    """Return what is done with a matcher: trained, embeddings written, points matched between files, and alice on matched pairs."""
    archive, matcher, recipe = house.out / "archive", house.out / "matcher", SMOKE / "anatomical_embedding_segresnet3d_mri.yaml"
    short = [f"data.index={archive}", "views.size=[16, 16, 8]", "train.steps=2", "train.monitor_items=0"]
    person = house.sources / "MRN83641957" / "1957-03-12"
    files = ["match", person / "Quillfeather_Zebediah_0.nii.gz", person / "Quillfeather_Zebediah_1.nii.gz", "--domain", "mri"]
    broken = next((person / "Zebediah_odd" / "rle_19570312").iterdir())
    fails = {"medssl.matching.network:MatcherNetwork.embed": {"raise": TERRIBLE}}
    matched = f"{{pairs: matched, min_score: 0, matcher: {{name: embedding, weights: {matcher}}}}}"
    pairs = ["views={kind: pair, size: [16, 16, 8], spacing_mm: 4.0, mask: {ratio: 0.5, cell: 8}}", f"data.sampler={matched}"]
    short_alice = [word for word in short if not word.startswith("views")]
    return [
        step("pretrain", recipe, *short, f"out={matcher}"),
        step("pretrain", SMOKE / "alice_segresnet3d_mri.yaml", *short_alice, *pairs, f"out={house.out / 'none'}", status=2),
        step("embed", recipe, "--weights", matcher, *short, "--json"),
        step("embed", recipe, "--weights", matcher, *short),
        step("embed", recipe, "--weights", matcher, *short, "--step", "5", status=2),
        step("embed", recipe, "--weights", matcher, *short, f"data.store={house.out / 'failing'}", status=1, set=fails),
        step(*files, "--weights", matcher, "--grid", "12", "--out", house.out / "overlay.png"),
        step(*files, "--matcher", "body_axis", "--grid", "12", "--json"),
        step(*files, "--weights", matcher, "--grid", "12", status=1, set=fails),
        step(*files, "--point", "900,0,0", status=2),
        step("match", broken, files[2], "--domain", "mri", "--grid", "12", status=1),
        step("pretrain", SMOKE / "alice_segresnet3d_mri.yaml", *short_alice, *pairs, f"out={house.out / 'alice'}"),
        wrong("embed", recipe, "--weights", house.data / "Quillfeather_nowhere", *short),
        wrong("match", house.data / "Quillfeather_nowhere", files[2], "--domain", "mri", "--grid", "12"),
        wrong(*files, "--point", SECRET),
    ]


def clip_road(house: House) -> list[Step]:
    """Return what is done with ultrasound loops: indexed, trained on, evaluated and exported."""
    archive, run, out = house.out / "cines", house.out / "discovr", house.out
    recipe = SMOKE / "cluster_distillation_video_vit_ultrasound.yaml"
    short = [f"data.index={archive}", "train.steps=1", "train.batch=2", "train.monitor_items=2", "train.monitor_every=1"]
    breaks = {"medssl.sampling.clips:ClipSource.fetch": {"raise": TERRIBLE}}
    asked = [f"source.index={archive}", f"table={house.cines / 'split.csv'}", "k=[1]", "--weights", run]
    evaluate = ["evaluate", recipe_folder() / "evaluate" / "regression_ultrasound.yaml", *asked]
    return [
        step("index", house.cines, "--splits", house.cines / "split.csv", "--modality", "US", *PIXELS, "--out", archive),
        step("pretrain", recipe, *short, f"out={run}"),
        step("pretrain", recipe, *short, f"out={out / 'ill_clips'}", status=1, set=breaks),
        step(*evaluate, "target=volume", f"out={out / 'evaluated_clips'}"),
        step(*evaluate, "target=file", f"out={out / 'none'}", status=2),
        step("export", run, "--to", "safetensors", "--out", out / "exported_clips"),
    ]


def withdrawal(house: House) -> Step:
    """Return what comes last: what was unpacked to be read goes with it, and the embeddings of the withdrawn."""
    return step("archive", "withdraw", house.out / "archive", house.data / "request.csv", "--runs", house.out, "--json")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The road travelled once, in two processes."""
    house = House(tmp_path_factory.mktemp("house"))
    sources(house)
    house.run([*index_road(house), *wrong_words(house), *training_road(house)])
    planted.write_cines(house.cines)
    for path in (house.cines / house.sources.name).iterdir():
        os.utime(path, (MODIFIED, MODIFIED))
    house.run([*matching_road(house), *clip_road(house), withdrawal(house)], timeout=500)
    return house


def test_road__was_travelled_and_met_trouble(house: House) -> None:
    archive = Archive.open(house.out / "archive")
    assert archive.summary["n_series"] >= 20
    assert {"truncated", "unreadable", "not_image", "empty", "broken_link", "linked_folder"} <= set(archive.summary["reasons"])
    said = b"".join(text for _, text in house.said)
    for words in (
        b"could not be used",
        b"an error in medssl itself: ValueError",
        b"series of 1 patients got labels",
    ):
        assert words in said, words
    found = {path.relative_to(house.out).parts[0]: path for path in house.out.iterdir()}
    assert {"archive.html", "pictures.html", "card.md", "card.json", "labels.csv", "release", "export"} <= set(found)
    assert {"clips.npz", "regression.npz"} <= {path.name for path in house.out.rglob("*.npz")}
    assert b"data:image/png" in found["pictures.html"].read_bytes() and b"data:image/png" not in found["archive.html"].read_bytes()
    assert len(found["labels.csv"].read_text().splitlines()) > 1
    names = {path.name for path in house.out.rglob("*")}
    assert {"encoder.safetensors", "metrics.jsonl", "items.parquet", "embedding.safetensors", "overlay.png"} <= names
    assert any(path.suffix == ".b2nd" for path in house.out.glob("archive/store/*/embeddings/*/*"))
    assert any(name.startswith("events.out.tfevents") for name in names) and any(name.endswith(".b2nd") for name in names)


def test_nothing_planted__is_said_or_left_outside_private(house: House) -> None:
    leaks = house.leaks()
    assert not leaks, "\n".join(leaks)
    assert as_old_as_the_sources(house.out) == []


def test_private__holds_what_the_owner_needs_and_only_for_the_owner(house: House) -> None:
    private = house.out / "archive" / "private"
    searcher = planted.Searcher()
    layers = [data for path in private.rglob("*.parquet") for _, data in planted.unwrap(path.name, path.read_bytes())]
    hits = {what for data in layers for what in searcher.find(data)}
    assert any(what.startswith("names") for what in hits) and any(what.startswith("medical_record") for what in hits)
    assert open_to_others(house.out) == []
    for folder in ("archive", "run"):
        assert stat.S_IMODE((house.out / folder).stat().st_mode) == 0o700
    for page in ("archive.html", "pictures.html", "labels.csv"):
        assert stat.S_IMODE((house.out / page).stat().st_mode) == 0o600, page


def test_names_of_persons__are_not_even_in_private(house: House) -> None:
    """Paths and ids are there for the owner's joins; PatientName serves nothing. What was unpacked to be read went with `withdraw`."""
    searcher = planted.Searcher()
    for path in (path for path in house.out.rglob("*") if path.is_file()):
        for layer, data in planted.unwrap(path.name, path.read_bytes()):
            persons = [what for what in searcher.find(data) if planted.PERSON.lower() in what.lower()]
            assert not persons, (path.relative_to(house.out), layer, persons)


def test_network__is_not_even_tried(house: House) -> None:
    assert not house.attempts.exists(), house.attempts.read_text()


KILLS = [
    ("open", ".tmp-", 4),  # rows are about to be written as lines
    ("os.rename", "part-", 1),  # a finished Parquet file lies beside its place
    ("os.remove", "new-private.json", 1),  # the lines are complete, and so is the Parquet file made of them
    ("os.rename", "series.parquet", 1),
    ("os.rename", "summary.json", 1),
]


def check_kills(house: House, kills: Sequence[tuple[str, str, int]]) -> None:
    argv = ["index", house.data, "--splits", house.data / "split.csv", "--modality", "MR", "--out"]
    outs = [house.out / f"killed{k}" for k in range(len(kills))]
    house.run([step(*argv, out, status=-9, kill=kill) for out, kill in zip(outs, kills)])
    assert not any((out / "summary.json").exists() for out in outs)
    strays = [path for out in outs for path in out.rglob(".tmp-*")]
    assert len(strays) >= len(kills) - 1
    assert open_to_others(house.out) == []
    leaks = house.leaks()
    assert not leaks, "\n".join(leaks)
    whole = house.out / "whole"
    house.run([step(*argv, whole), step(*argv, outs[0])])
    assert not list(outs[0].rglob(".tmp-*"))
    assert Archive.open(outs[0]).summary["reasons"] == Archive.open(whole).summary["reasons"]


def test_kill__leaves_nothing_outside_private_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    house = House(tmp_path)
    planted.write_small(house.data)
    check_kills(house, KILLS[::3])


@pytest.mark.slow
def test_kill_at_any_point__leaves_nothing_outside_private(tmp_path: Path) -> None:
    house = House(tmp_path)
    sources(house)
    check_kills(house, KILLS)


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
    classes = [
        f"source.index={archive}",
        f"table={data / 'persons.csv'}",
        "settings.steps=2",
        "settings.warmup_steps=1",
        "settings.augment={}",
    ]
    classes += ["source.views={size: [16, 16, 8], spacing_mm: 4.0, normalize: zscore}", "settings.val_every=0"]
    classes += ["encoder={name: segresnet3d, init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}"]
    of_classes = ["finetune", recipe_folder() / "finetune" / "classification_mri.yaml", *classes]
    boxes = [
        recipe_folder() / "finetune" / "detection_hippocampus.yaml",
        "cohort.card=null",
        "views={size: [32, 32, 32]}",
        "labels=2",
    ]
    boxes += ["settings.steps=2", "settings.warmup_steps=1", "settings.detector={strides: [4], width: 8}", "--weights", out / "run"]
    smears = [recipe_folder() / "finetune" / "detection_bccd.yaml", f"source.index={archive}", "source.card=null"]
    workers = {"medssl.archive.scanning.sweep:PROCESSES_ABOVE": 0, "medssl.archive.scanning.sweep:BATCH": 40}
    return [
        step("index", data / house.sources.name, "--splits", data / "split.csv", "--modality", "MR", "--out", archive),
        step("index", data / house.sources.name, "--out", archive),
        step("index", data, "--out", out / "workers", "--json", set=workers),  # what processes of their own say
        step("index", data, "--out", out / "odd", set={"medssl.archive.scanning.scan:parse_header": {"raise": TERRIBLE}}),
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
        step("finetune", *boxes, f"cohort.path={data / 'cohort'}", f"out={out / 'boxes'}", "--twin"),
        step("finetune", *boxes, f"cohort.path={data / 'grids'}", f"out={out / 'none'}", status=1),
        step(
            "finetune", *smears, f"boxes.path={data / 'empty_box.csv'}", "boxes.drop_empty=false", f"out={out / 'none'}", status=2
        ),
        step("finetune", *smears, f"boxes.path={data / 'empty_box.csv'}", f"out={out / 'none'}", status=2),
        step("finetune", tune, f"cohort.path={data}", f"out={out / 'none'}", *tuned, status=2),
        step("finetune", tune, f"cohort.path={data / 'no_header.csv'}", f"out={out / 'none'}", *tuned, status=2),
        step("finetune", tune, f"cohort.path={data / 'by_patient.json'}", f"out={out / 'none'}", *tuned, status=2),
        step(*of_classes, "target=person", f"out={out / 'classes'}"),  # the names of the classes are those of people
        step(*of_classes, "target=file", f"out={out / 'none'}", status=2),
        step(*of_classes, "target=person", "classes=[a, b]", f"out={out / 'none'}", status=2),
        step(*of_classes, "target=person", "task=regression", f"out={out / 'none'}", status=2),
        step("import", data / "no_header.csv", "--as", "vit3d", "--out", out / "none", status=2),
        step("export", out / "run", "--to", "segresnet", "--out", out / "segresnet"),
        step("export", out / "run", "--to", "monai-bundle", "--out", out / "bundle"),
        step("report", out, "--out", out / "report.html"),
        step("report", out, "--out", out / "images.html", "--with-images"),
        step("runs", "ls", out),
        step("doctor"),
        step("doctor", cnn, f"data.index={archive}", "--json"),
        *index_road(house, "again"),
        *wrong_words(house),
        wrong(
            "evaluate", evaluate, "--weights", data / "Quillfeather.safetensors", f"source.index={archive}", "table=x", "target=y"
        ),
        wrong("finetune", tune, "--weights", out / "run", f"cohort.path={data / 'Quillfeather'}"),
        wrong("doctor", data / "Quillfeather.yaml"),
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
    lines = [line.split(",")[0] for line in (house.data / "split.csv").read_text().splitlines()[1:]]
    persons = [f"{name},{('MRN83641957', 'Quillfeather^Zebediah')[k // 4 % 2]}" for k, name in enumerate(lines)]
    (house.data / "persons.csv").write_text("\n".join(["file,person", *persons]))
    (house.data / "by_patient.json").write_text(json.dumps({"Quillfeather": {"MRN83641957": "1957-03-12"}}))
    planted.write_cines(house.cines)
    first, *rest = long_road(house)
    house.run_alone(first)  # as a user types it
    house.run([*clip_road(house), *rest], timeout=900)
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
    for place in ("out", "cwd", "tmp", f"home/{USER}"):
        (tmp_path / place / ".spill").write_text("born 12.03.1957")
    assert len({line.split("/")[0] for line in house.leaks()}) == 4
    (house.out / "x.json").write_text(f'"{hashlib.sha256(b"some image").hexdigest()}"')
    assert any("digest of a file" in line for line in house.leaks())
    (house.out / "private").mkdir(mode=0o700)
    (house.out / "private" / "x").touch(mode=0o644)
    assert open_to_others(house.out) == ["private/x has mode 0644"]
