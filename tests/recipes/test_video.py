"""Runs on clips as `medssl pretrain` makes them: what does not fit, and a run that is killed within an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medssl import api
from medssl.errors import RecipeError, RequestError
from medssl.recipe import recipe_folder

QUIET = ["train.monitor_items=0", "train.tensorboard=false"]
NAMES = ("cluster_distillation", "video_mae", "relative_speed")


def recipe(name: str) -> Path:
    return recipe_folder() / "smoke" / f"{name}_video_vit_ultrasound.yaml"


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("data_wait", "seconds_per_step", "time")} for line in found]


@pytest.mark.parametrize("name", NAMES)
def test_killed_within_an_epoch__resumes_to_the_same_bits(name: str, cine_archive: Path, tmp_path: Path) -> None:
    """Six items and batches of 4; the checkpoint that is resumed is that of step 2."""
    changes = [f"data.index={cine_archive}", *QUIET, "train.steps=5", "train.checkpoint_every=2"]

    def die(done: int, _total: int, _metrics: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    api.pretrain(recipe(name), [*changes, f"out={tmp_path / 'whole'}"])
    with pytest.raises(KeyboardInterrupt):
        api.pretrain(recipe(name), [*changes, f"out={tmp_path / 'killed'}"], on_step=die)
    assert api.pretrain(tmp_path / "killed", resume=True).status == "finished"
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    folder = tmp_path / "whole" / "weights" / "last"
    parts = sorted(path.stem for path in folder.glob("*.safetensors"))
    expected = {"cluster_distillation": ["encoder", "image_teacher", "video_student"]}
    assert parts == expected.get(name, ["encoder"])
    for part in parts:
        whole, resumed = (load_file(tmp_path / run / "weights" / "last" / f"{part}.safetensors") for run in ("whole", "killed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[key]) for key, value in whole.items())
    manifest = json.loads((folder / "encoder.json").read_text())
    assert manifest["clip"]["frames"] == 8 and manifest["clip"]["fps"] in (12.5, 20)


def test_what_does_not_fit__is_refused_before_anything_is_written(cine_archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [f"data.index={cine_archive}", *QUIET, f"out={out}"]
    for changes, error, text in (
        (["views.frames=7"], RecipeError, r"patch \(2, 8, 8\) does not divide views.size \(7, 32, 32\)"),
        (
            ["views={kind: image, size: 32}"],
            RequestError,
            "cluster_distillation needs one kind of views that are clips; found none",
        ),
        (
            ["encoder={name: image2d}"],
            RecipeError,
            "cannot work on encoder image2d .it needs takes_clips.; encoders that fit: video_vit",
        ),
    ):
        with pytest.raises(error, match=text):
            api.pretrain(recipe("cluster_distillation"), [*given, *changes])
    with pytest.raises(RequestError, match=r"views bring 1; set views.count: 3 and sampler.speeds: .1, 2."):
        api.pretrain(recipe("relative_speed"), [*given, "views.count=1"])
    assert not out.exists()
