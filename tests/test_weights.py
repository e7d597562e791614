from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl.archive.operations.facts import collect_facts
from medssl.errors import StoreError, WeightsError
from medssl.report.archive_page import archive_report
from medssl.training.run_folder import RunFolder
from medssl.weights import find_part, folder_aside, load_part, save_part, tensors_hash, write_atomic, write_private
from tests.archive.small import small_archive

MANIFEST = {"encoder": {"name": "vit3d", "args": {}}, "library": "monai.ViT", "axis_order": "XYZ-RAS", "channels": 1}


def state() -> dict[str, torch.Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}


def test_round_trip__keeps_tensors_and_manifest(tmp_path: Path) -> None:
    path = save_part(tmp_path, "encoder", state(), MANIFEST)
    loaded, manifest = load_part(path)
    assert loaded.keys() == state().keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state().items())
    assert manifest["part"] == "encoder"
    assert manifest["weights_hash"] == tensors_hash(state())
    (tmp_path / "encoder.json").unlink()
    assert load_part(path)[1] == manifest  # the file carries its manifest


def test_bytes__are_the_same_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from medssl.weights import save_part; from tests.test_weights import MANIFEST, state; "
        "[save_part(sys.argv[1] + f'/{k}', 'encoder', state(), MANIFEST) for k in range(20)]"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)
    ours = save_part(tmp_path / "ours", "encoder", state(), MANIFEST).read_bytes()
    assert {(tmp_path / str(k) / "encoder.safetensors").read_bytes() for k in range(20)} == {ours}
    start = 8 + int.from_bytes(ours[:8], "little")
    assert start % 8 == 0 and list(json.loads(ours[8:start])["__metadata__"]) == ["format", "medssl"]


def test_hash__depends_on_values_and_names_not_on_order() -> None:
    base = tensors_hash(state())
    assert tensors_hash(dict(reversed(state().items()))) == base
    changed = state()
    changed["b.weight"][0, 0] = 9
    assert tensors_hash(changed) != base
    assert tensors_hash({k + "x": v for k, v in state().items()}) != base


def test_run_folder__is_found_through_its_index(tmp_path: Path) -> None:
    save_part(tmp_path / "weights" / "last", "encoder", state(), MANIFEST)
    (tmp_path / "weights" / "index.json").write_text(json.dumps({"default": "encoder"}))
    assert find_part(tmp_path) == find_part(tmp_path / "weights") == tmp_path / "weights" / "last" / "encoder.safetensors"
    with pytest.raises(WeightsError, match=r"has no last/decoder.safetensors; it has last/encoder.safetensors"):
        find_part(tmp_path, "decoder")
    with pytest.raises(WeightsError, match="no weights at"):
        find_part(tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"this folder holds encoder\.safetensors: give one of these"):
        find_part(tmp_path / "weights" / "last")  # as an export leaves them


def test_pickles__are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({}, path)
    with pytest.raises(WeightsError, match="medssl opens no pickles"):
        load_part(path)


def test_file_cut_short__is_refused(tmp_path: Path) -> None:
    path = save_part(tmp_path, "encoder", state(), MANIFEST)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="cut short or not safetensors"):
        load_part(path)


def test_changed_tensors__do_not_match_the_manifest(tmp_path: Path) -> None:
    path = save_part(tmp_path, "encoder", state(), MANIFEST)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="does not match the hash"):
        load_part(path)


def test_manifest__must_be_complete_and_not_from_the_future(tmp_path: Path) -> None:
    path = save_part(tmp_path, "encoder", state(), MANIFEST)
    side = path.with_suffix(".json")
    content = json.loads(side.read_text())
    side.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(WeightsError, match="update medssl"):
        load_part(path)
    side.write_text(json.dumps({k: v for k, v in content.items() if k != "channels"}))
    with pytest.raises(WeightsError, match="lacks channels"):
        load_part(path)


def test_disk_full__leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.json"
    write_atomic(target, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match=r"the disk is full while writing file\.json"):
        write_atomic(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert target.read_bytes() == b"old"


def test_file_size_limit__is_reported_as_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from medssl.weights import write_atomic\n"
        "try:\n    write_atomic(pathlib.Path(sys.argv[1]) / 'w.bin', b'x' * 5000)\n"
        "except Exception as err:\n    print(type(err).__name__, err)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "StoreError the disk is full while writing w.bin" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_private_file__is_private_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights that are taken away afterwards leave a moment, and a kill in it leaves a file for everybody."""
    seen, replace = [], os.replace

    def looked(aside: Path, path: Path) -> None:
        seen.append(aside.stat().st_mode & 0o777)
        replace(aside, path)

    monkeypatch.setattr("medssl.weights.os.replace", looked)
    umask = os.umask(0o022)
    try:
        write_private(tmp_path / "new" / "key", b"x")
        (tmp_path / "new" / f".page.html.{os.getpid()}.tmp").write_text("left by a killed process, for everybody to read")
        archive_report(collect_facts(small_archive(tmp_path / "index", 1)), tmp_path / "new" / "page.html")
        assert (seen[0], seen[-1]) == (0o600, 0o600)
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700 and (
            tmp_path / "new" / "page.html"
        ).stat().st_mode & 0o777 == 0o600
        write_atomic(tmp_path / "shared", b"x")
        assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644
        RunFolder(tmp_path / "run").create("", {})
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run", *(tmp_path / "run").iterdir()) if path.is_dir()} == {
            0o700
        }
    finally:
        os.umask(umask)


def test_folder_aside__takes_its_name_whole_or_leaves_nothing(tmp_path: Path) -> None:
    with folder_aside(tmp_path / "out") as aside:
        (aside / "a").write_text("kept")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "kept"
    with pytest.raises(StoreError, match="the disk is full while writing b"), folder_aside(tmp_path / "other") as aside:
        raise StoreError("the disk is full while writing b")
    with pytest.raises(KeyError), folder_aside(tmp_path / "other") as aside:
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_safetensors__say_whose_tensors_they_are(tmp_path: Path) -> None:
    """transformers 4 opens only files that do."""
    from safetensors import safe_open

    with safe_open(save_part(tmp_path, "encoder", state(), MANIFEST), "pt") as file:
        assert file.metadata()["format"] == "pt"
