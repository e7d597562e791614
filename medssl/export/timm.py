"""A folder that timm opens by itself: `timm.create_model("local-dir:FOLDER", pretrained=True)`; the tensors have timm's names already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from medssl.encoders.stem import adapt_stem
from medssl.export import video
from medssl.export.manifest import Weights, exported_manifest
from medssl.export.slices import Adaptation, grey_or_random, slice_encoder_of
from medssl.export.verify import ExportReport, compare, source_encoder
from medssl.weights import save_part, write_atomic

NAME = "model"  # the name that timm and the Hugging Face hub look for


def write(folder: Path, weights: Weights, asked: Adaptation) -> ExportReport:
    """Write `model.safetensors`, its manifest `model.json` and timm's `config.json`; let timm open the folder and compare features.

    Args:
        folder: Existing, empty.
        weights: With any timm network as (slice) encoder, or a video ViT, of which single frames are exported.
        asked: Channels, for networks with one stem.

    Raises:
        WeightsError: Another encoder, or the reloaded features differ.
    """
    from medssl._compat import torchvision_ops

    torchvision_ops.ensure()
    import timm

    clips = weights.manifest["library"] == video.LIBRARY
    weights = weights if clips else slice_encoder_of(weights, "timm")
    source = source_encoder(weights)
    channels = asked.channels or source.in_channels
    state, notes = video.frame_state(source) if clips else (weights.state, list[str]())
    if channels != source.in_channels:
        state, more = adapt_stem(state, video.STEM if clips else stem_of(source.net), channels)
        notes = [*notes, *more]
    config = video.frame_config(source, channels) if clips else config_of(source, channels)
    call = f'timm.create_model("{config["architecture"]}", num_classes=0, **{config["model_args"]})'
    manifest = exported_manifest({**weights.manifest, "channels": channels}, to="timm", load_into=call, adaptations=notes)
    path = save_part(folder, NAME, state, manifest)
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
    size = tuple(config["pretrained_cfg"]["input_size"][1:])
    mine, theirs = grey_or_random(source.in_channels, channels, size)
    with torch.no_grad():
        final, maps = network.forward_intermediates(theirs)
        pooled = network.forward_head(final, pre_logits=True)
        output = source.forward_features(mine)
        pyramid = [level[:, :, 0] for level in output.pyramid] if clips else output.pyramid
    stock = network.state_dict()
    return ExportReport(
        files=(path, path.with_suffix(".json"), folder / "config.json"),
        matched=tuple(sorted(state)),
        missing=tuple(sorted(set(stock) - set(state))),
        unexpected=tuple(sorted(set(state) - set(stock))),
        max_feature_difference=compare([(pooled, output.pooled), *zip(maps, pyramid, strict=True)], "timm"),
        notes=(f"load into {call}", *notes),
    )


def stem_of(net: Any) -> str:
    """Return the key of the first kernel, as timm knows it."""
    stem = net.pretrained_cfg["first_conv"]
    return f"{stem if isinstance(stem, str) else stem[0]}.weight"


def config_of(source: Any, channels: int) -> dict[str, Any]:
    """Return timm's `config.json` for an `Image2D`.

    Mean 0 and standard deviation 1: images come normalised from the views, by the rule in the manifest. `first_conv` is named for three
    channels only, since timm adapts a stem from no other number, and starts it at random with no more than a warning.
    """
    cfg, args = source.net.pretrained_cfg, source.config()["args"]
    model_args = {"in_chans": channels, **args["model_args"]}
    if cfg.get("fixed_input_size", False):
        size = list(args["image_size"] or cfg["input_size"][1:])
        model_args["img_size"] = size
    else:
        size = [k * m for k, m in zip((2, 3), source.multiple)]
    return {
        "architecture": args["model"].partition(".")[0],
        "num_classes": 0,
        "num_features": source.embed_dim,
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": "medssl",
            "num_classes": 0,
            "input_size": [channels, *size],
            "fixed_input_size": bool(cfg.get("fixed_input_size", False)),
            "crop_pct": 1.0,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
            "first_conv": cfg.get("first_conv") if channels == 3 else None,
            "classifier": cfg.get("classifier"),
        },
    }
