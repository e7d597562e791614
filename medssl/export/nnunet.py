"""The adaptation-plan checkpoint from which nnU-Net (`nnUNetv2_preprocess_like_nnssl`) fine-tunes a pretrained ResEnc U-Net.

nnU-Net reads images as SimpleITK delivers them, Z first, and turns none: every kernel and every list of strides and sizes is reversed here,
once. It does not look at the orientation either, so what it trains on must be stored with axes to R, A and S, as pretraining saw it.
The pickle holds tensors, numbers, strings, lists and dictionaries alone, which `torch.load(weights_only=True)` takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.encoders.resenc3d import (
    LIBRARY,
    STEM_CONVOLUTION,
    ResEnc3D,
    build_network,
    complete,
    reverse_args,
    reverse_axes,
    with_aliases,
    without_aliases,
)
from medssl.encoders.stem import adapt_stem
from medssl.errors import WeightsError
from medssl.export.manifest import Weights, exported_manifest, is_unknown, normalization_of, require_library, spacing_of
from medssl.export.slices import Adaptation, grey_or_random
from medssl.export.verify import ExportReport, compare, load_stock, require_equal, source_encoder
from medssl.weights import write_atomic

FILE = "checkpoint_final.pth"  # the name that nnU-Net looks for
ENCODER, STEM = "encoder.stages", "encoder.stem"
IN_PROJECTION = ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0")
AXIS_ORDER = "ZYX-SAR"
PLAIN = (bool, int, float, str, type(None))
CITATIONS = [
    {
        "type": "Architecture",
        "name": "ResEnc U-Net",
        "apa_citations": [
            "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F. (2024). nnU-Net Revisited: A Call "
            "for Rigorous Validation in 3D Medical Image Segmentation. MICCAI 2024."
        ],
    },
    {"type": "Framework", "name": "medssl", "apa_citations": []},
]


def write(folder: Path, weights: Weights, asked: Adaptation) -> ExportReport:
    """Write `checkpoint_final.pth`, `adaptation_plan.json`, `config.json` and the manifest `nnunet.json`; reload and compare features.

    The comparison builds the network from the plan in the file, loads encoder and stem as nnU-Net does (strictly, after taking the keys of
    the plan away), and shows it the image with reversed axes.

    Args:
        folder: Existing, empty.
        weights: Of encoder `resenc3d`.
        asked: Input channels.

    Raises:
        WeightsError: Another encoder, or the reloaded features differ.
    """
    require_library(weights.manifest, LIBRARY, "nnunet")
    source = source_encoder(weights)
    channels = asked.channels or source.in_channels
    state, changes = adapt_stem({**weights.state, **weights.decoder}, STEM_CONVOLUTION, channels)
    args = reverse_args({**weights.args, "in_channels": channels})
    turned = reverse_axes(state)
    plan = adaptation_plan(weights.manifest, args)
    checkpoint = {
        "network_weights": with_aliases(turned),
        "nnssl_adaptation_plan": plan,
        "citations": CITATIONS,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {},
        "trainer_name": "medssl",
    }
    require_plain(checkpoint)
    torch.save(checkpoint, folder / FILE)
    facts = {"load_into": LIBRARY, "decoder": bool(weights.decoder), "adaptations": changes}
    manifest = exported_manifest(turned_manifest(weights.manifest, args), to="nnunet", **facts)
    texts = {"nnunet.json": manifest, "adaptation_plan.json": plan, "config.json": {"library_name": "medssl"}}
    for name, content in texts.items():
        write_atomic(folder / name, json.dumps(content, indent=2, sort_keys=True).encode())

    found = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    given = found["network_weights"]
    require_equal(without_aliases(given), turned, FILE)
    network = network_of_plan(found["nnssl_adaptation_plan"])
    for part in (found["nnssl_adaptation_plan"]["key_to_encoder"], found["nnssl_adaptation_plan"]["key_to_stem"]):
        inside = {key.removeprefix(f"{part}."): value for key, value in given.items() if key.startswith(f"{part}.")}
        load_stock(network.get_submodule(part), without_aliases(inside))
    if weights.decoder:
        load_stock(network.decoder, {k.removeprefix("decoder."): v for k, v in turned.items() if k.startswith("decoder.")})
    mine, theirs = grey_or_random(
        source.in_channels, channels, tuple(n * p for n, p in zip((2, 3, 1), source.patch_size, strict=True))
    )
    network = network.eval().double()
    with torch.no_grad():
        output, maps = source.forward_features(mine), network.encode(_turn(theirs))
        pairs = [(_turn(level), ours) for level, ours in zip(maps, output.pyramid, strict=True)]
        if weights.decoder:
            pairs.append((_turn(network(_turn(theirs))), source.forward_decoder(output.pyramid)))
    last = [f"decoder.seg_layers.{step}.{leaf}" for step in range(len(network.decoder.stages)) for leaf in ("weight", "bias")]
    stock = {*with_aliases(network.state_dict()), *last}
    return ExportReport(
        files=(folder / FILE, *(folder / name for name in texts)),
        matched=tuple(sorted(given)),
        missing=tuple(sorted(stock - given.keys())),
        unexpected=tuple(sorted(given.keys() - stock)),
        max_feature_difference=compare(pairs, "nnunet"),
        notes=(*changes, *_notes(weights, plan, channels)),
    )


def turned_manifest(manifest: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of the encoder for images with reversed axes: every triple is reversed, and `axis_order` says so."""
    turned = {key: manifest[key][::-1] for key in ("spacing_mm", "image_size", "patch_size") if manifest.get(key)}
    encoder = {"name": manifest["encoder"]["name"], "args": dict(args)}
    return {**manifest, **turned, "encoder": encoder, "channels": args["in_channels"], "axis_order": AXIS_ORDER}


def adaptation_plan(manifest: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return `nnssl_adaptation_plan`, in nnU-Net's axis order.

    Args:
        manifest: Manifest of the encoder, in ours.
        args: Arguments of the encoder for images with reversed axes.
    """
    spacing = spacing_of(manifest)
    style = "noresample" if spacing is None else "onemmiso" if set(spacing) == {1.0} else "median"
    measured = manifest.get("spacing_mm")
    patch = patch_of(manifest, args)
    configuration = {
        "data_identifier": f"medssl_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": [_scheme(manifest)] * args["in_channels"],
        "use_mask_for_norm": [False] * args["in_channels"],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "spacing": None if spacing is None else [float(s) for s in reversed(spacing)],
        "patch_size": patch,
    }
    return {
        "architecture_plans": architecture_plans(args),
        "pretrain_plan": {
            "dataset_name": "medssl",
            "plans_name": "medsslPlans",
            "original_median_spacing_after_transp": None if measured is None else [float(s) for s in reversed(measured)],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": "medssl",
            "configurations": {style: configuration},
        },
        "pretrain_num_input_channels": args["in_channels"],
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": ENCODER,
        "key_to_stem": STEM,
        "keys_to_in_proj": list(IN_PROJECTION),
        "key_to_lpe": None,  # nnU-Net asks for it without a default
    }


def patch_of(manifest: Mapping[str, Any], args: Mapping[str, Any]) -> list[int]:
    """Return the crop of the pretraining, Z first; where it is not known five cells of the coarsest scale, 160 voxels for preset L."""
    size = manifest.get("image_size")
    return [int(n) for n in reversed(size)] if size else [5 * n for n in ResEnc3D.divisor(args)]


def architecture_plans(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return how nnU-Net builds the network: by name for preset L, else by the class and its arguments."""
    if {**args, "in_channels": 1} == complete({}):
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    kwargs = {
        "n_stages": len(args["features_per_stage"]),
        "features_per_stage": list(args["features_per_stage"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": args["kernel_sizes"],
        "strides": args["strides"],
        "n_blocks_per_stage": list(args["n_blocks_per_stage"]),
        "n_conv_per_stage_decoder": list(args["n_conv_per_stage_decoder"]),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "arch_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": kwargs,
        "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def args_of_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `ResEnc3D` for Z-first images that an adaptation plan describes; inverse of `architecture_plans`.

    Raises:
        WeightsError: Another architecture, or one whose norms, activations or biases are not those of the presets.
    """
    architecture = plan["architecture_plans"]
    name = str(architecture["arch_class_name"])
    channels = int(plan["pretrain_num_input_channels"])
    if name == "ResEncL":
        return complete({"in_channels": channels})
    if not name.endswith("ResidualEncoderUNet"):
        raise WeightsError(
            f"the adaptation plan is of architecture {name}; accepted: ResEncL and ResidualEncoderUNet; PlainConvUNet and Primus have "
            "no encoder here"
        )
    kwargs = dict(architecture.get("arch_kwargs") or {})
    kinds = {"conv_op": "Conv3d", "norm_op": "InstanceNorm3d", "nonlin": "LeakyReLU"}
    faults = [
        f"{key} {kwargs.get(key)}" for key, kind in kinds.items() if str(kwargs.get(key)).rstrip("'>").rpartition(".")[2] != kind
    ]
    faults += [
        f"{key} {kwargs[key]}" for key in ("dropout_op", "bottleneck_channels", "stem_channels") if kwargs.get(key) is not None
    ]
    faults += ["conv_bias False"] if not kwargs.get("conv_bias", False) else []
    if faults:
        raise WeightsError(
            f"the adaptation plan has {', '.join(faults)}; accepted are the networks of the presets: Conv3d with bias, InstanceNorm3d, "
            "LeakyReLU, no dropout"
        )
    names = ("features_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder", "kernel_sizes", "strides")
    return complete({"in_channels": channels, **{key: kwargs[key] for key in names if key in kwargs}})


def network_of_plan(plan: Mapping[str, Any]) -> Any:
    """Build the network that a plan describes, without last convolutions."""
    return build_network(args_of_plan(plan))


def require_plain(content: Any) -> None:
    """Raise WeightsError at anything that `torch.load(weights_only=True)` of another torch may refuse (numpy scalars above all)."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            require_plain(key)
            require_plain(value)
    elif isinstance(content, list | tuple):
        for value in content:
            require_plain(value)
    elif type(content) not in PLAIN and not isinstance(content, Tensor):
        raise WeightsError(
            f"the manifest holds a {type(content).__name__}, which nnU-Net does not open; accepted: numbers, strings, lists; "
            "save the weights again with this medssl"
        )


def _turn(x: Tensor) -> Tensor:
    return x.permute(0, 1, 4, 3, 2)


def _scheme(manifest: Mapping[str, Any]) -> str:
    if is_unknown(manifest, "intensity"):
        return "medssl_unknown"
    name = normalization_of(manifest.get("intensity") or {})
    return "ZScoreNormalization" if name == "zscore" else f"medssl_{name}"


def _notes(weights: Weights, plan: Mapping[str, Any], channels: int) -> Sequence[str]:
    unknown = is_unknown(weights.manifest, "intensity")
    name = "unknown" if unknown else normalization_of(weights.manifest.get("intensity") or {})
    patch = "x".join(map(str, plan["recommended_downstream_patchsize"]))
    single = "nnU-Net repeats a single one for images of several"
    several = "nnU-Net adapts a single one only: give images of as many, or export with --channels 1"
    notes = [
        f"nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc {FILE}, then nnUNetv2_train_pretrained; patch {patch} (Z, Y, X); nnU-Net's "
        "repository has both commands, its package 2.8.1 on PyPI has not",
        "axes of kernels, strides and sizes reversed to Z, Y, X; nnU-Net turns no image: store yours with axes to R, A and S",
        f"input channels {channels}: {single if channels == 1 else several}",
    ]
    if name != "zscore":
        how = "how intensities were normalised in pretraining is unknown" if unknown else f"pretrained with normalize {name}"
        notes.append(
            f"{how}; nnU-Net z-scores what it fine-tunes from a plan, so features {'may ' if unknown else ''}meet other values"
        )
    if not weights.decoder:
        notes.append(
            "encoder only: nnU-Net's plain -pretrained_weights needs the decoder too; export with --decoder where the run has one"
        )
    return notes
