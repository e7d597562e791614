"""The joint 2D-3D encoder as one file, and its aggregator alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from medssl.export.manifest import Weights, exported_manifest, require_library, require_whole
from medssl.export.slices import JOINT
from medssl.export.verify import ExportReport, compare, features, load_stock, random_image, require_equal, source_encoder
from medssl.weights import load_part, save_part

PREFIX = "aggregator."


def write_joint(folder: Path, weights: Weights) -> ExportReport:
    """Write slice encoder, projection and aggregator as `joint.safetensors`, which `medssl.load_encoder` opens.

    Args:
        folder: Existing, empty.
        weights: Of encoder `slice_volume`.

    Raises:
        WeightsError: Another encoder, or the reloaded volume embeddings differ.
    """
    source = joint_encoder(weights, "joint")
    path = save_part(
        folder, "joint", weights.state, exported_manifest(weights.manifest, to="joint", load_into="medssl.load_encoder")
    )
    state, manifest = load_part(path)
    require_equal(state, weights.state, path.name)
    again = source_encoder(Weights(state, manifest))
    return ExportReport(
        files=(path, path.with_suffix(".json")),
        matched=tuple(sorted(state)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare(list(zip(features(again), features(source), strict=True)), "joint"),
        notes=(f'load with medssl.load_encoder("{path.name}")',),
    )


def write_aggregator(folder: Path, weights: Weights) -> ExportReport:
    """Write the attention over slices as `aggregator.safetensors`, with the arguments of its class in the manifest.

    Args:
        folder: Existing, empty.
        weights: Of encoder `slice_volume`.

    Raises:
        WeightsError: Another encoder, or the embeddings of the reloaded aggregator differ.
    """
    from medssl.layers.deformable import SliceAggregator

    source = joint_encoder(weights, "aggregator")
    defaults = {name: parameter.default for name, parameter in inspect.signature(SliceAggregator).parameters.items()}
    args = {
        **defaults,
        "dim": weights.args["dim"],
        **weights.args["aggregator"],
    }  # whole: a later default must not change old weights
    state = {key.removeprefix(PREFIX): value for key, value in weights.state.items() if key.startswith(PREFIX)}
    facts = {"load_into": "medssl.layers.deformable.SliceAggregator", "args": args}
    path = save_part(folder, "aggregator", state, exported_manifest(weights.manifest, to="aggregator", **facts))
    reloaded, manifest = load_part(path)
    require_equal(reloaded, state, path.name)
    aggregator = SliceAggregator(**manifest["export"]["args"])
    load_stock(aggregator, reloaded)
    aggregator = aggregator.eval().double()
    tokens = random_image(5, [args["dim"]])
    valid = torch.tensor([[True, True, True, True, False]])
    z_mm = torch.tensor([[0.0, 2.0, 3.5, 9.0, 0.0]])
    with torch.no_grad():
        mine, theirs = (module(tokens, valid, z_mm) for module in (source.aggregator, aggregator))
    return ExportReport(
        files=(path, path.with_suffix(".json")),
        matched=tuple(sorted(reloaded)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare([(theirs.tokens, mine.tokens), (theirs.pooled, mine.pooled)], "aggregator"),
        notes=("load into medssl.layers.deformable.SliceAggregator, with the arguments export.args of aggregator.json",),
    )


def joint_encoder(weights: Weights, to: str) -> Any:
    """Build the joint encoder, or raise WeightsError where the weights hold less."""
    require_library(weights.manifest, JOINT, to)
    require_whole(weights.manifest, to)
    return source_encoder(weights)
