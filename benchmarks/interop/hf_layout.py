"""A ViT exported `--to hf`, opened by transformers' own classes where medssl is not.

    .venv/bin/python -m benchmarks.interop.hf_layout prepare --folder /tmp/hf            # where medssl is
    python3.11 -m venv HF; HF/bin/pip install -c constraints-cpu.txt torch transformers safetensors
    HF/bin/python benchmarks/interop/hf_layout.py check --folder /tmp/hf --out hf.json

`prepare` exports a small ViT and one with layer scale (DINOv2-like), both of random weights, with an image and our features of it. `check`
calls `AutoModel.from_pretrained(FOLDER)` offline and compares; no tensor may be missing, unexpected or newly started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", {}, (64, 96)),
    "dinov2": ("vit_small_patch14_dinov2", {"patch_size": 16}, (64, 64)),  # its position table must be square
}


def prepare(folder: Path) -> None:
    """Export two encoders and leave an image with our features of it."""
    import torch

    from benchmarks.interop import leave_facts
    from medssl.encoders.image2d import Image2D
    from medssl.export.write import export_weights
    from medssl.weights import save_part

    leave_facts(folder)
    for name, (model, more, size) in MODELS.items():
        torch.manual_seed(0)
        encoder = Image2D(model=model, image_size=size, model_args={"depth": 3, "embed_dim": 96, "num_heads": 3, **more}).eval()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        run = folder / "runs" / name
        save_part(run / "weights" / "last", "encoder", encoder.net.state_dict(), encoder.part("encoder").manifest)
        (run / "weights" / "index.json").write_text(json.dumps({"default": "encoder"}))
        export_weights(run, "hf", folder / "exports" / name)
        image = torch.randn(2, 1, *size)
        with torch.no_grad():
            output = encoder.forward_features(image)
        torch.save({"image": image, "tokens": output.tokens, "pooled": output.pooled}, folder / f"{name}.pt")


def check(folder: Path) -> dict[str, Any]:
    """Open both with `AutoModel` and compare the last hidden state."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel

    rows = []
    for name in MODELS:
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        more = {"add_pooling_layer": False} if name == "vit" else {}
        network, said = AutoModel.from_pretrained(str(folder / "exports" / name), output_loading_info=True, **more)
        with torch.no_grad():
            found = network.eval()(expected["image"]).last_hidden_state
        mine = torch.cat([expected["pooled"][:, None], expected["tokens"]], dim=1)
        rows.append({
            "model": type(network).__name__,
            **{key: sorted(map(str, said[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
            "max_difference": float((found - mine).abs().max()),
            "spread": float(mine.std()),
        })  # fmt: skip
        print(rows[-1])
    met = all(
        row["max_difference"] <= TOLERANCE and not (row["missing_keys"] or row["unexpected_keys"] or row["mismatched_keys"])
        for row in rows
    )
    packages = ("transformers", "torch", "safetensors", "huggingface_hub")
    return {
        "benchmark": "interop_hf_layout",
        "made_by": json.loads((folder / "made_by.json").read_text()),
        "versions": {name: version(name) for name in packages},
        "rows": rows,
        "tolerance": TOLERANCE,
        "met": met,
    }


def main(argv: list[str] | None = None) -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "check"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="check: JSON file to write")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.step == "prepare":
        prepare(given.folder.resolve())
        return
    found = check(given.folder.resolve())
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    if not found["met"]:
        sys.exit("transformers opens it otherwise than we wrote it")


if __name__ == "__main__":
    main()
