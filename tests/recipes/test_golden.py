"""Golden ledger: 20 steps of every smoke recipe. A change meant to be neutral must not move it.

After a change that is meant to matter: MEDSSL_UPDATE_GOLDEN=1 python -m pytest tests/recipes/test_golden.py, and say why in the commit.
Tolerances cover other CPU kinds and thread counts, not another result.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from medssl import api, build
from medssl.errors import RecipeError
from medssl.recipe import read_yaml, shipped
from medssl.yaml_models import read_mapping

LEDGER = Path(__file__).with_name("golden.json")
SMOKE = {name: path for name, path in shipped().items() if name.startswith("smoke/") and read_yaml(path)["kind"] == "pretrain"}
USUAL = (1e-3, 2e-2)
ROUGH = {
    "smoke/anatomical_embedding_segresnet3d_mri": (1e-3, 0.15),
    "smoke/alice_segresnet3d_mri": (5e-3, 0.15),
    "smoke/alice_segresnet3d_mri_pairs": (5e-3, 0.15),
    "smoke/mae_cnn_swin3d_mri": (1e-3, math.inf),
}
"""Relative tolerances of losses and features where rounding grows: AVX2 against AVX-512, or one thread against two, move the losses by up to
0.2 % and the features by up to 8 %. The first picks its hardest negatives by rank, the next two standardise a handful of rows. The pooled
features of the last one, a single token that its loss hardly feels, are others on AMD than on Intel while the losses agree: only the losses are
compared."""
LONG = {
    "smoke/mae_cnn_resenc3d_mri",
    "smoke/mae_cnn_swin3d_mri",
    "smoke/relative_speed_video_vit_ultrasound",
    "smoke/alice_segresnet3d_mri",
    "smoke/alice_segresnet3d_mri_pairs",
}


def play(path: Path, archive: Path, out: Path) -> dict[str, list[float]]:
    """Run a recipe and return its losses and the features of a fixed image."""
    sources = read_mapping(path, RecipeError, what="recipe", absent="").get("sources")
    keys = ["data.index"] if sources is None else [f"sources.{name}.index" for name in sources]
    done = api.pretrain(path, [*(f"{key}={archive}" for key in keys), f"out={out}"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    encoder = build.load_encoder(done.path)
    part = json.loads((out / "weights" / "index.json").read_text())["default"]
    size = json.loads((out / "weights" / "last" / f"{part}.json").read_text())["image_size"]
    ramp = torch.linspace(-2, 2, math.prod(size)).reshape(1, 1, *size)
    with torch.no_grad():
        features = encoder(torch.sin(7 * ramp)).pooled[0, :8]
    return {"losses": losses, "features": features.tolist()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(SMOKE)])
def test_twenty_steps__match_the_ledger(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    archive: Path = request.getfixturevalue("cine_archive" if name.endswith("ultrasound") else "phantom_archive")
    found = play(SMOKE[name], archive, tmp_path / "run")
    ledger = json.loads(LEDGER.read_text()) if LEDGER.is_file() else {}
    if os.environ.get("MEDSSL_UPDATE_GOLDEN"):
        LEDGER.write_text(json.dumps({**ledger, name: found}, indent=1, sort_keys=True) + "\n")
        return
    assert name in ledger, "a new smoke recipe: run with MEDSSL_UPDATE_GOLDEN=1 and commit golden.json"
    assert len(found["losses"]) == 20
    of_losses, of_features = ROUGH.get(name, USUAL)
    assert found["losses"] == pytest.approx(ledger[name]["losses"], rel=of_losses)
    assert found["features"] == pytest.approx(ledger[name]["features"], rel=of_features, abs=2e-3)
