"""What label files left unknown is said where results are read: which structures, which voxels, and what became of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from medssl.evaluation.finetune import finetune
from medssl.evaluation.label_facts import label_sentences
from medssl.report.collect import Leftovers
from medssl.report.headline import Comparison, Estimate
from medssl.report.page import _result
from tests.evaluation.test_finetune import SETTINGS
from tests.evaluation.test_label_forms import table, write_image
from tests.synthetic import write_nifti


def write_labels(folder: Path, cases: dict[str, dict[str, object]], structures: dict[str, str] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps({"cases": cases} | ({"structures": structures} if structures else {})))


def test_unlabelled_structures__are_named_and_whole_labels_are_not_called_partial(tmp_path: Path) -> None:
    liver = {"counts": {}, "flags": [], "labelled": [1]}
    both = {"counts": {"uncertain_voxels": 7}, "flags": [], "labelled": [1, 2]}
    write_labels(tmp_path / "cells" / "a", {"case0001": liver, "case0002": both}, {"1": "liver", "2": "tumour"})
    write_labels(tmp_path / "cells" / "b", {"case0001": liver, "case0003": liver}, {"1": "liver", "2": "tumour"})
    partial, unsure = label_sentences(tmp_path)
    assert partial.startswith("2 cases have not every structure labelled (without tumour: 2): ")
    assert "one with background in the loss" in partial and "no score of it" in partial
    assert unsure == "1 case has 7 uncertain voxels: out of loss and scores"
    write_labels(tmp_path / "whole", {"case0001": both}, {"1": "liver", "2": "tumour"})
    assert [sentence for sentence in label_sentences(tmp_path / "whole") if "not every" in sentence] == []
    write_labels(tmp_path / "old", {"case0001": liver})  # before structures were written
    assert label_sentences(tmp_path / "old")[0].startswith("1 case has not every structure labelled: ")


def test_files_that_cannot_be_read__cost_their_sentences_alone(tmp_path: Path) -> None:
    write_labels(tmp_path / "cells" / "a", {"case0001": {"counts": {"gaps": 2}, "flags": [], "labelled": None}})
    for name, content in (("b", "{"), ("c", "[]"), ("d", '{"cases": 3}')):
        (tmp_path / "cells" / name).mkdir()
        (tmp_path / "cells" / name / "labels.json").write_text(content)
    assert label_sentences(tmp_path) == ["1 case has 2 slices without a contour between two with one"]


def test_run__writes_structures_and_uncertain_voxels(tmp_path: Path) -> None:
    lines = []
    for n, labelled in enumerate(("one", "", "")):
        label, affine = write_image(tmp_path / f"image{n}", n)
        stored = label.astype(np.int16)
        stored[0] = -1 if n == 1 else stored[0]
        write_nifti(tmp_path / f"{n}.nii.gz", stored, affine)
        lines.append(f"image{n},{n}.nii.gz,{'train' if n < 2 else 'test'},{labelled}")
    finetune(table(tmp_path, lines, header="image,label,split,labelled"), SETTINGS, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert content["structures"] == {"1": "one", "2": "two"} and sorted(content["cases"]) == ["case0001", "case0002"]
    assert content["cases"]["case0002"] == {"counts": {"uncertain_voxels": 18 * 16}, "flags": [], "labelled": None}
    said = label_sentences(tmp_path / "out")
    assert said[0].startswith("1 case has not every structure labelled (without two: 1)") and "uncertain voxels" in said[1]


def test_page_of_a_run__says_what_its_curves_say() -> None:
    summary = {"rows": [], "label_facts": ["2 cases have <unknown"]}
    lines = [Comparison("unet", "2", "ours", *[Estimate(0.5, 0.4, 0.6)] * 3)]
    page = _result(Leftovers(Path("x"), curves=[summary, summary]), lines)
    assert page.count("2 cases have &lt;unknown") == 1
    assert "label maps" not in _result(Leftovers(Path("x")), lines)
