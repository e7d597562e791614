"""What an export says about itself, and what it must not carry out of the house."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.errors import WeightsError
from medssl.weights import find_part, load_part

# Everything else (seeds, host facts, notes of a run) stays in the run folder.
KEPT = (
    "format_version",
    "part",
    "encoder",
    "library",
    "key_groups",
    "domains",
    "spacing_mm",
    "spacing_source",
    "axis_order",
    "token_order",
    "intensity",
    "channels",
    "patch_size",
    "image_size",
    "clip",
    "licence",
    "pretrained_licence",
    "authors",
    "copyright",
    "data_cards",
    "imported",
    "unknown",
    "objective",
    "step",
    "recipe_hash",
    "items_hash",
    "weights_hash",
    "versions",
    "membership_inference",
)
AXIS_ORDER = "XYZ-RAS"  # what MONAI delivers too, so no kernel is permuted on the way
INFLATED_ORDER = "XYZ-PLS"  # of a slice encoder with a third axis: rows and columns of an axial slice, as pretraining shows it
IMAGE_ORDERS = (
    "HW",
    "THW",
    "slices of XYZ-RAS",
)  # of encoders of images, of clips, and of those that look at volumes slice by slice


@dataclass
class Weights:
    """What is exported.

    Args:
        state: Encoder tensors under the stock network's keys.
        manifest: Manifest of the encoder.
        decoder: Decoder tensors under the stock network's keys; empty unless they were asked for.
        decoder_manifest: Manifest of the decoder.
    """

    state: dict[str, Tensor]
    manifest: dict[str, Any]
    decoder: dict[str, Tensor] = field(default_factory=dict)
    decoder_manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of the encoder."""
        return dict(self.manifest["encoder"]["args"])


def read_weights(path: Path, *, decoder: bool = False, tag: str = "last") -> Weights:
    """Load the encoder, and its decoder where asked for.

    Args:
        path: Run folder, its `weights` folder, or the encoder's safetensors file.
        decoder: Whether to load the part `decoder` too.
        tag: `last` or `best`.

    Raises:
        WeightsError: There are no such weights, they are damaged, the part is no encoder, or the run has no decoder.
    """
    state, manifest = load_part(path, tag=tag)
    if manifest["part"] == "decoder":
        raise WeightsError(f"{path} is a decoder; an export needs the encoder: give encoder.safetensors or the run folder")
    if manifest["axis_order"] not in (AXIS_ORDER, *IMAGE_ORDERS):
        raise WeightsError(
            f"{path} has axis order {manifest['axis_order']}; exports are written for {AXIS_ORDER}; "
            "save the weights again with this medssl"
        )
    weights = Weights(state, manifest)
    if decoder:
        file = find_part(path, "decoder", tag)
        if not file.is_file():
            raise WeightsError(
                f"{path} has no decoder; only networks that pretrain one (segresnet3d, swin3d, resenc3d) write it; export without the decoder"
            )
        weights.decoder, weights.decoder_manifest = load_part(file)
    return weights


def exported_manifest(manifest: Mapping[str, Any], *, to: str, **facts: Any) -> dict[str, Any]:
    """Return the manifest of an export: what a user of the weights needs, and nothing about the run's machine.

    Args:
        manifest: Manifest of the part.
        to: Name of the export.
        facts: What this export adds, under `export`.
    """
    import monai
    import torch

    from medssl import __version__

    versions = {"medssl": __version__, "monai": monai.__version__, "torch": torch.__version__}
    if to in ("timm", "torchvision"):
        versions[to] = version(to)
    kept = {key: manifest[key] for key in KEPT if key in manifest}
    return {**kept, "export": {"to": to, "versions": versions, **facts}}


def require_library(manifest: Mapping[str, Any], library: str, to: str) -> None:
    """Raise WeightsError unless the weights are those of a stock class.

    Args:
        manifest: Manifest of the encoder.
        library: Stock class the export takes, for instance `monai.ViT`.
        to: Name of the export.
    """
    found = manifest["library"]
    if found != library:
        raise WeightsError(
            f"export to {to}: the weights are of encoder {manifest['encoder']['name']} ({found}); {to} takes {library}; "
            f"export to {', '.join(fitting(found))} instead"
        )


def fitting(library: str) -> tuple[str, ...]:
    """Return the exports that take weights of a stock class."""
    return (*FITTING.get(library, ("safetensors",)), *OF_ANY)


def require_whole(manifest: Mapping[str, Any], to: str) -> None:
    """Raise WeightsError at the aggregator alone, which no encoder can be built from."""
    if manifest["part"] == "aggregator":
        raise WeightsError(
            f"export to {to} checks the whole encoder, and this is the part aggregator; give the run folder or joint.safetensors"
        )


OF_ANY = ("onnx", "hf")
FITTING = {
    "monai.ViT": ("safetensors", "unetr", "monai-bundle"),
    "monai.SegResNet": ("safetensors", "segresnet", "monai-bundle"),
    "medssl.VideoTransformer": ("safetensors", "timm"),
    "monai.SwinUNETR": ("safetensors", "swin-unetr", "monai-bundle"),
    "dynamic_network_architectures.ResidualEncoderUNet": ("safetensors", "nnunet"),
    "timm": ("safetensors", "timm", "torchvision", "resnet", "flexible-unet", "retinanet"),
    "medssl.SliceVolumeEncoder": (
        "joint",
        "aggregator",
        "safetensors",
        "timm",
        "torchvision",
        "resnet",
        "flexible-unet",
        "retinanet",
    ),
}


UNKNOWN = "unknown"
SAID = {  # keys of a manifest that may be unknown of imported weights, for people
    "intensity": "intensities",
    "spacing_mm": "voxel size",
    "axis_order": "axis order",
    "image_size": "image size",
    "domains": "kind of images",
    "data_cards": "training data",
}


def is_unknown(manifest: Mapping[str, Any], key: str) -> bool:
    """Whether nobody has said what this key says of the pretraining, as of imported weights; its value is then no statement."""
    return key in (manifest.get("unknown") or ())


def unknown_of(manifest: Mapping[str, Any]) -> str:
    """Return what is unknown of the pretraining in words, empty where nothing is."""
    return ", ".join(words for key, words in SAID.items() if is_unknown(manifest, key))


def window_of(intensity: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the intensity window (lo, hi) of a manifest, None when it has none.

    Args:
        intensity: `{"normalize": {"window": [lo, hi]}}`, or `{"normalize": name, "window": [lo, hi] or None}`.
    """
    normalize = intensity.get("normalize")
    window = normalize.get("window") if isinstance(normalize, Mapping) else intensity.get("window")
    return None if window is None else (float(window[0]), float(window[1]))


def normalization_of(intensity: Mapping[str, Any]) -> str:
    """Return `zscore`, `percentile`, `window` or `none`.

    Raises:
        WeightsError: The manifest names another normalisation.
    """
    normalize = intensity.get("normalize", "none")
    name = "window" if isinstance(normalize, Mapping) and "window" in normalize else normalize
    if name not in ("zscore", "percentile", "window", "none"):
        raise WeightsError(
            f"the manifest names the normalisation {name!r}; a bundle can write zscore, percentile, window and none; "
            "export to safetensors instead"
        )
    return str(name)


def spacing_of(manifest: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the voxel size (X, Y, Z) in mm that images were resampled to in pretraining, None when each kept its own.

    Args:
        manifest: `spacing_mm` is a summary rather than a rule unless `spacing_source` is `views` (or is not given).
    """
    spacing = manifest.get("spacing_mm")
    if spacing is None or manifest.get("spacing_source", "views") != "views":
        return None
    return tuple(float(s) for s in spacing)


def domain_of(manifest: Mapping[str, Any]) -> str:
    """Return the domain that says which voxels are foreground.

    Raises:
        WeightsError: Several domains: their foregrounds differ, and one bundle has one preprocessing. Or nobody has said which it is.
    """
    if is_unknown(manifest, "domains"):
        raise WeightsError(
            "the weights were imported without the domain of their images, whose foreground their normalisation needs; a bundle guesses none; "
            "import them again with --domain, for instance --domain mri"
        )
    domains = list(manifest.get("domains") or ["mri"])
    if len(domains) > 1:
        raise WeightsError(
            f"weights of the domains {', '.join(domains)}, normalised by the statistics of different foregrounds; "
            "a bundle takes one domain (or an intensity window); export to safetensors instead"
        )
    return str(domains[0])
