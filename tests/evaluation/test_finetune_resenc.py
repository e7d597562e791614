"""Fine-tuning nnU-Net's residual-encoder U-Net from a run folder of its encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from medssl.encoders.resenc3d import ResEnc3D
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import finetune, open_weights
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.weights import load_part
from tests.evaluation.tiny_cohort import write_cohort
from tests.export.conftest import save_run


def test_resenc_unet__is_fine_tuned_from_a_run_with_its_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ResEnc3D(features_per_stage=(8, 12), n_blocks_per_stage=(1, 1), strides=(1, 2))
    run = save_run(encoder, tmp_path / "run", intensity={"normalize": "zscore"})
    settings = FinetuneSettings(
        network="resenc_unet",
        crop=(16, 16, 16),
        spacing_mm=(2.0, 1.0, 1.5),
        steps=2,
        warmup_steps=1,
        log_every=1,
        transfer="encoder_decoder",
    )
    weights = open_weights(run, transfer="encoder_decoder")
    cohort = Cohort.load(write_cohort(tmp_path / "cohort", train=1, val=0, test=1))
    # a stem of 4 tensors, blocks of 8, a shortcut of 3 that changes the width; one step of the decoder of 2 and 4
    result = finetune(cohort, settings, tmp_path / "out", weights=weights)
    assert result.loaded == {"matched": 29, "missing": 0, "unexpected": 0, "resized": 0, "fresh": 2}
    state, manifest = load_part(tmp_path / "out" / "network.safetensors")
    assert manifest["library"] == encoder.library and manifest["network"] == "resenc_unet"
    assert state["decoder.seg_layers.0.weight"].shape == (3, 8, 1, 1, 1)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["cases"]) == 1
