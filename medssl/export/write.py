"""Export weights under a name that users know; nothing counts, and nothing is left, before the reload check has passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medssl.errors import RequestError, WeightsError, near
from medssl.evaluation.membership import read_membership
from medssl.export import (
    flexible_unet,
    hf,
    joint,
    monai_bundle,
    nnunet,
    onnx,
    resnet,
    resnet_trunk,
    retinanet,
    segmentation_bundle,
    segresnet,
    swin_unetr,
    timm,
    torchvision,
    unetr,
)
from medssl.export.manifest import Weights, exported_manifest, read_weights, require_whole
from medssl.export.slices import Adaptation, Inflation
from medssl.export.verify import ExportReport, compare, features, require_equal, source_encoder
from medssl.weights import folder_aside, load_part, save_part

TRUNKS = {module.TARGET.to: module.TARGET for module in (torchvision, resnet, flexible_unet, retinanet)}
EXPORTS = (
    *("safetensors", "unetr", "segresnet", "swin-unetr", "monai-bundle", "nnunet", "timm", *TRUNKS),
    *("joint", "aggregator", "onnx", "hf"),
)
WITH_CHANNELS = ("unetr", "segresnet", "swin-unetr", "nnunet", "timm", *TRUNKS)
WITH_IMAGE_SIZE = ("unetr", "monai-bundle")
WITH_DECODER = ("safetensors", "segresnet", "swin-unetr", "nnunet")


def export_weights(
    weights_path: Path,
    to: str,
    out: Path,
    *,
    decoder: bool = False,
    tag: str = "last",
    channels: int | None = None,
    dims: int | None = None,
    inflation: Inflation = "repeat",
    image_size: Sequence[int] | None = None,
    membership: Path | None = None,
) -> ExportReport:
    """Write an encoder in another form, load what was written into the stock network, and compare features.

    Everything is written into a folder beside `out` that takes its name once all checks have passed.

    Args:
        weights_path: Run folder, its `weights` folder, or the encoder's safetensors file; for `monai-bundle` also the folder of a fine-tuning,
            one of its cells, or its `network.safetensors`.
        to: One of `EXPORTS`.
        out: Folder to create; it must not exist, or be empty.
        decoder: Whether to add a pretrained decoder (`safetensors`, `segresnet`, `swin-unetr` and `nnunet` only). The default leaves it out.
        tag: `last` or `best`.
        channels: Input channels of the export, for those of `WITH_CHANNELS`; None keeps them (torchvision: 3).
        dims: 2 or 3 spatial axes, for slice encoders to MONAI's ResNet, FlexibleUNet and RetinaNet; 3 inflates the kernels.
        inflation: `repeat` or `centre`, see `medssl.export.slices.inflate`.
        image_size: (X, Y, Z) of the images, for those of `WITH_IMAGE_SIZE` and weights of a ViT, whose positions are resized; None keeps it.
        membership: JSON file of `medssl membership`; its AUC and interval go into the manifest, as `membership_inference`.

    Returns:
        Files, matched and missing keys of the stock network, and the largest difference of features.

    Raises:
        RequestError: An unknown name, a decoder, channels or axes where none fit, a membership result of other weights, or `out` is taken.
        WeightsError: The weights are missing, damaged or of an encoder that the form does not take, or the check failed.
        StoreError: The disk is full, or the folder cannot be written.
    """
    out = Path(out)
    if to not in EXPORTS:
        raise RequestError(f'export: unknown form "{to}"{near(to, EXPORTS)}; known: {", ".join(EXPORTS)}')
    if decoder and to not in WITH_DECODER:
        raise RequestError(f"export to {to} holds the encoder only; a decoder goes with {' or '.join(WITH_DECODER)}")
    asked = Adaptation(channels, dims, inflation, None if image_size is None else tuple(image_size))
    asked.check()
    if asked.channels is not None and to not in WITH_CHANNELS:
        raise RequestError(
            f"export to {to} takes the channels that the weights have"
            + (": a bundle prepares images as they were pretrained" if to == "monai-bundle" else "")
            + f"; channels go with {', '.join(WITH_CHANNELS)}"
        )
    if asked.image_size is not None and to not in WITH_IMAGE_SIZE:
        raise RequestError(f"export to {to} keeps the image size of the weights; image_size goes with {', '.join(WITH_IMAGE_SIZE)}")
    if asked != Adaptation(asked.channels, image_size=asked.image_size) and to not in TRUNKS:
        raise RequestError(
            f"export to {to} keeps the axes of the weights; dims and inflation go with {', '.join(TRUNKS)}; leave them out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"export: {out} exists and is not an empty folder; choose another one, or remove it first")
    weights = read_weights(segmentation_bundle.find_network(Path(weights_path)), decoder=decoder, tag=tag)
    if weights.manifest["part"] == segmentation_bundle.PART and to != "monai-bundle":
        raise WeightsError(
            f"{weights_path} is a fine-tuned network, which goes to monai-bundle; {to} takes an encoder: give the run folder of the pretraining"
        )
    if membership is not None:
        weights.manifest["membership_inference"] = _membership(membership, weights)
    with folder_aside(out) as aside:
        report = _writer(to, out.name, asked)(aside, weights)
    return replace(report, files=tuple(out / path.relative_to(aside) for path in report.files))


def _membership(path: Path, weights: Weights) -> dict[str, Any]:
    found = read_membership(path)
    if found.get("weights_hash") != weights.manifest["weights_hash"]:
        raise RequestError(
            f"{path} is of weights {found.get('weights_hash', 'unknown')}, these are {weights.manifest['weights_hash']}; "
            "run `medssl membership` on the weights that are exported"
        )
    return found


def _writer(to: str, name: str, asked: Adaptation) -> Callable[[Path, Weights], ExportReport]:
    writers: dict[str, Callable[[Path, Weights], ExportReport]] = {
        "safetensors": write_safetensors,
        "unetr": lambda folder, weights: unetr.write(folder, weights, asked),
        "segresnet": lambda folder, weights: segresnet.write(folder, weights, asked),
        "swin-unetr": lambda folder, weights: swin_unetr.write(folder, weights, asked),
        "monai-bundle": lambda folder, weights: write_bundle(folder, weights, name, asked),
        "timm": lambda folder, weights: timm.write(folder, weights, asked),
        "nnunet": lambda folder, weights: nnunet.write(folder, weights, asked),
        "joint": joint.write_joint,
        "aggregator": joint.write_aggregator,
        "onnx": onnx.write,
        "hf": hf.write,
    }
    if to in TRUNKS:
        return lambda folder, weights: resnet_trunk.write(folder, weights, TRUNKS[to], asked)
    return writers[to]


def write_bundle(folder: Path, weights: Weights, name: str, asked: Adaptation) -> ExportReport:
    """Write the bundle of an encoder, or of a fine-tuned network, which is not adapted."""
    if weights.manifest["part"] != segmentation_bundle.PART:
        return monai_bundle.write(folder, weights, name=name, asked=asked)
    if asked.image_size is not None:
        raise RequestError(
            "export to monai-bundle: a fine-tuned network keeps the crop that it was trained on; leave image_size out"
        )
    return segmentation_bundle.write(folder, weights, name=name)


def write_safetensors(folder: Path, weights: Weights) -> ExportReport:
    """Write `encoder.safetensors` and `.json` (and those of the decoder) for use with medssl, without the rest of the run.

    Args:
        folder: Existing, empty.
        weights: Of any encoder.

    Raises:
        WeightsError: The weights do not fit the encoder that their manifest names.
    """
    require_whole(weights.manifest, "safetensors")
    source = source_encoder(weights)
    files: list[Path] = []
    parts = {"encoder": (weights.state, weights.manifest), "decoder": (weights.decoder, weights.decoder_manifest)}
    reloaded = Weights({}, {})
    for name, (state, manifest) in parts.items():
        if not state:
            continue
        path = save_part(folder, name, state, exported_manifest(manifest, to="safetensors"))
        files += [path, path.with_suffix(".json")]
        found, found_manifest = load_part(path)
        require_equal(found, state, path.name)
        if name == "encoder":
            reloaded = Weights(found, found_manifest)
        else:
            reloaded.decoder, reloaded.decoder_manifest = found, found_manifest
    pairs = list(zip(features(source_encoder(reloaded)), features(source), strict=True))
    matched = {*reloaded.state, *reloaded.decoder}
    return ExportReport(
        files=tuple(files),
        matched=tuple(sorted(matched)),
        missing=tuple(sorted(set(source.net.state_dict()) - matched)),
        unexpected=(),
        max_feature_difference=compare(pairs, "safetensors"),
    )
