"""The words of a bundle: licence note and README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medssl.export.manifest import UNKNOWN, domain_of, is_unknown, normalization_of, spacing_of, unknown_of, window_of


def weights_licence_text(manifest: dict[str, Any], name: str) -> str:
    """Return `LICENSE`: the licence that the run's recipe names for the weights, or of a fine-tuned network that of its starting weights."""
    licence = manifest.get("licence") or UNKNOWN
    if "pretrained_licence" in manifest:  # a fine-tuning names no licence of its own
        began = manifest["pretrained_licence"]
        known = {None: "trained from scratch", UNKNOWN: "fine-tuned from weights whose licence nobody stated"}
        return (
            f"Licence of the network of {name}: not stated by its owner.\n\n"
            f"It was {known.get(began, f'fine-tuned from weights under {began} (https://spdx.org/licenses/)')}. Terms of the starting weights "
            "and of the data sets (docs/data_license.txt) may restrict it. Without a licence nobody but the owner may pass it on: the owner may "
            "state one in this file.\n"
        )
    if licence == UNKNOWN:
        again = "Import them with `--licence`" if manifest.get("imported") else "Set `export.licence` in the recipe"
        return (
            f"Licence of the weights of {name}: not stated by their owner.\n\n"
            f"Without a licence nobody but the owner may pass them on. {again} and export again.\n"
        )
    return (
        f"Licence of the weights of {name}: {licence}\n\n"
        f"SPDX-License-Identifier: {licence}\n\nThe full text is published under that identifier at https://spdx.org/licenses/. "
        "The terms of the data sets behind the weights are in docs/data_license.txt.\n"
    )


def origin_text(manifest: Mapping[str, Any]) -> str:
    """Return how the weights came about: pretrained here, or imported, which says nothing of their training."""
    made, found = manifest["export"]["versions"]["medssl"], manifest.get("imported")
    if not found:
        return f"pretrained with medssl {made} without labels"
    source = found.get("source") or UNKNOWN
    origin = f"source {source}" if source != UNKNOWN else "source unknown"
    return f"imported into medssl {made} from a file of another project ({origin})"


def unknown_text(manifest: Mapping[str, Any]) -> str:
    """Return a paragraph on what nobody has said of the pretraining; empty where all is known."""
    words = unknown_of(manifest)
    return f"\nUnknown of the pretraining: {words}. What is done here in their place is no statement about it.\n" if words else ""


def readme_text(manifest: dict[str, Any], *, name: str, window: Sequence[int], stride: Sequence[int], features: int) -> str:
    """Return `docs/README.md`.

    Args:
        manifest: Manifest of the export.
        name: Name of the bundle.
        window: Size (X, Y, Z) of the sliding window, voxels.
        stride: Voxels per feature along X, Y, Z.
        features: Channels of the feature map.
    """
    spacing = spacing_of(manifest)
    grid = (
        "nothing: every image keeps its own voxel size"
        if spacing is None
        else f"{' x '.join(f'{s:g}' for s in spacing)} mm (trilinear)"
    )
    library = manifest["library"]
    coarser, at_least = " x ".join(map(str, stride)), " x ".join(map(str, window))
    return f"""# {name}

The encoder `{manifest["encoder"]["name"]}` ({library}), {origin_text(manifest)}, as a MONAI bundle.
It needs MONAI and the packages named in `configs/metadata.json`; it does not need medssl. Made for research: initialising
networks and computing features. Not for diagnostic use.
{unknown_text(manifest)}
## Use

```
python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir IMAGES --output_dir FEATURES
```

`IMAGES` is a folder of NIfTI images. Each becomes `<image>_features.nii.gz`: {features} channels (last axis) on a grid
{coarser} times coarser than the resampled image, with the affine of that grid, so that it overlays on the image.
Its mean over the grid is the image's feature vector.

The tensors in `models/model.pt` have the names of the stock network: `monai.networks.nets.{library.split(".")[-1]}` takes them
too (`load_state_dict`; SegResNet and SwinUNETR keep their own decoder, so `strict=False` there).

## Preprocessing

1. Axes to RAS, X Y Z.
2. {_normalisation_sentence(manifest)}
3. Resampling to {grid}.
4. Padding at the far ends to whole patches and at least one window of {at_least} voxels, with the darkest value.

The network then slides over the image in windows of that size.

This repeats what medssl does with these exceptions: voxels that medssl excludes (NaN, DICOM padding, the corner outside a CT
reconstruction circle) take part in the statistics here; images that medssl refuses (no spacing, a CT that is not in Hounsfield
units) are not refused here; and statistics are computed in float64.

## Checks, without a network

```
python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath docs/metadata_schema.json
python -m monai.bundle verify_net_in_out --net_id network_def --meta_file configs/metadata.json --config_file configs/inference.json
```

`verify_metadata` needs the package jsonschema, and skips its download when the schema file exists; `docs/metadata_schema.json` checks the
mandatory fields of MONAI's bundle specification. Delete it to have MONAI's own schema downloaded.
"""


def segmentation_readme_text(manifest: dict[str, Any], found: Mapping[str, Any], *, name: str) -> str:
    """Return `docs/README.md` of a fine-tuned network.

    Args:
        manifest: Manifest of the export.
        found: Manifest of the network.
        name: Name of the bundle.
    """
    spacing = found.get("spacing_mm")
    grid = (
        "no other: every image keeps its own voxel size"
        if spacing is None
        else f"{' x '.join(f'{s:g}' for s in spacing)} mm (trilinear)"
    )
    rows = "\n".join(f"| {value} | {found['structures'][str(value)]} |" for value in found["label_values"][1:])
    flips = (
        f", mirrored along axes {', '.join(map(str, found['flips']))} too (probabilities are averaged)" if found["flips"] else ""
    )
    forced = "".join(f"\n\nForced: {line}." for line in found.get("forced") or [])
    forced += "".join(f"\n\nWeights adapted to the channels of the images: {line}." for line in found.get("adapted") or [])
    images, each = "Each becomes `<image>_seg.nii.gz`", ""
    if names := found.get("channel_names"):
        images = (
            f"An image has {len(names)} channels, in this order: {', '.join(names)}. They are the volumes of one 4-D file, or files `<case>_0000`, "
            "`<case>_0001` ... on one grid. Each image becomes `<image>_seg.nii.gz` (of several files `<case>_0000_seg.nii.gz`)"
        )
        each = "Each channel by itself. "
    return f"""# {name}

A {found["library"]}, fine-tuned with medssl {manifest["export"]["versions"]["medssl"]}, as a MONAI bundle. It needs MONAI and the packages named in
`configs/metadata.json`; it does not need medssl. Research only. Not for diagnostic use.{forced}

## Use

```
python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir IMAGES --output_dir SEGMENTATIONS
```

`IMAGES` is a folder of NIfTI images. {images} on the grid and with the axes of its file:

| value | structure |
|---|---|
| 0 | background |
{rows}

## What is done

1. Axes to RAS, X Y Z.
2. {each}{_normalisation_sentence(manifest).replace("clipped after", "clipped before")}
3. Resampling to {grid}.
4. Windows of {" x ".join(map(str, found["crop"]))} voxels that overlap by {found["overlap"]:g}{flips}.
5. Scores are brought back to the voxels of the image; the likeliest class is written.

Voxels that medssl excludes (NaN, the corner outside a CT reconstruction circle) take part in the statistics here, and images that medssl
refuses (no spacing, a CT that is not in Hounsfield units) are not refused here.
"""


def _normalisation_sentence(manifest: dict[str, Any]) -> str:
    intensity = manifest.get("intensity") or {}
    how = normalization_of(intensity)
    body = ""
    if how in ("zscore", "percentile"):
        ct = domain_of(manifest) == "ct"
        limit = "the limit of the CT domain in HU" if ct else "a threshold between air and tissue, after Otsu"
        body = f"of the body (above {limit})"
    window = window_of(intensity)
    return {
        "zscore": f"Intensities: (x - mean) / std of the voxels {body}.",
        "percentile": f"Intensities: the 0.5th to 99.5th percentile of the voxels {body} become 0 to 1, clipped after resampling.",
        "window": f"Intensities: {window[0]:g} to {window[1]:g} become 0 to 1, clipped after resampling." if window else "",
        "none": "Intensities are left as they are"
        + (": their normalisation in pretraining is unknown." if is_unknown(manifest, "intensity") else "."),
    }[how]
