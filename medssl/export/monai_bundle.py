"""A MONAI bundle of the encoder that runs where MONAI is installed and medssl is not.

The network of the bundle is the stock MONAI module cut to its encoder, as an expression over stock parts, so that
`models/model.pt` keeps the stock keys: it loads into `monai.networks.nets.ViT`, `SegResNet` or `SwinUNETR` as well. Loading and normalisation
are written as MONAI transforms and NumPy expressions that repeat `medssl.domains.statistics` and `medssl.views.intensity`
(a test holds the two together).
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from medssl.errors import WeightsError
from medssl.export.adapt import adapted
from medssl.export.bundle_text import readme_text, weights_licence_text
from medssl.export.manifest import (
    Weights,
    domain_of,
    exported_manifest,
    fitting,
    is_unknown,
    normalization_of,
    spacing_of,
    window_of,
)
from medssl.export.slices import Adaptation
from medssl.export.verify import ExportReport, compare, load_stock, random_image, read_pt, require_equal, source_encoder, write_pt
from medssl.layers.tokens import unflatten_tokens
from medssl.weights import card_lines

VERSION = "0.1.0"  # of the bundle's layout
SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
DEFAULT_WINDOW = (96, 96, 96)  # of the sliding window, for encoders that take any size
BODY_HU = -500.0  # medssl.domains.ct
IGNITE, FIRE = "0.5.1", "0.7.1"  # where none is installed: the oldest ignite that MONAI 1.5 and later accept; fire as tested
AIR_SHARE = 0.25  # medssl.domains.statistics
LIBRARIES = ("monai.ViT", "monai.SegResNet", "monai.SwinUNETR")

IMPORTS = [
    "$import collections",
    "$import itertools",
    "$import os",
    "$import monai",
    "$import numpy as np",
    "$import torch",
    "$from einops.layers.torch import Rearrange",
]

FOREGROUND = {
    # voxels of a strided grid of at most two million, as medssl.domains.statistics.sample
    "sample": (
        "$lambda v: v[tuple(slice(None, None, next(s for s in itertools.count(1)"
        " if np.prod([-(-n // s) for n in v.shape]) <= 2000000)) for _ in v.shape)]"
    ),
    "quantile_range": "$lambda v: tuple(float(q) for q in np.quantile(v, [0.005, 0.995]))",
    "range": "$lambda v: @quantile_range(v) if np.ptp(@quantile_range(v)) > 0 else (float(v.min()), float(v.max()))",
    "histogram": "$lambda v, r: np.histogram(np.clip(v, *r), bins=256, range=r)",
    "moments": "$lambda n, c: (np.cumsum(n), np.cumsum(n * c))",
    "between": (
        "$lambda w, t: np.where((w[:-1] > 0) & (w[-1] > w[:-1]), w[:-1] * (w[-1] - w[:-1])"
        " * (t[:-1] / np.maximum(w[:-1], 1) - (t[-1] - t[:-1]) / np.maximum(w[-1] - w[:-1], 1)) ** 2, 0.0)"
    ),
    "cut": "$lambda n, e: float(e[1:-1][np.argmax(@between(*@moments(n, (e[:-1] + e[1:]) / 2)))])",
    # Otsu 1979 on 256 bins between the 0.5th and the 99.5th percentile
    "otsu": "$lambda v: @cut(*@histogram(v, @range(v)))",
    # body: above halfway between the Otsu threshold and the median of the darker class; everything where there is no air
    "medians": "$lambda v, t: (np.median(v[v <= t]), np.median(v[v > t]))",
    "halfway": (f"$lambda t, m, floor: -np.inf if m[0] - floor > {AIR_SHARE} * (m[1] - floor) else (m[0] + t) / 2"),
    "below_otsu": "$lambda v, t: @halfway(t, @medians(v, t), min(0.0, np.quantile(v, 0.005)))",
    "threshold": "$lambda v: @below_otsu(v, @otsu(v))",
}


def write(folder: Path, weights: Weights, *, name: str, asked: Adaptation | None = None) -> ExportReport:
    """Write the bundle, load its network from its own files and compare features.

    Args:
        folder: Existing, empty.
        weights: Of encoder `vit3d`, `segresnet3d` or `swin3d`; a decoder is never part of a bundle.
        name: Name of the bundle.
        asked: Image size of a ViT.

    Raises:
        WeightsError: An encoder without a stock form, or the features of the reloaded network differ.
    """
    if weights.manifest["library"] not in LIBRARIES:
        raise WeightsError(
            f"export to monai-bundle: the weights are of {weights.manifest['library']}; it takes {', '.join(LIBRARIES)}; "
            f"export to {', '.join(fitting(weights.manifest['library']))} instead"
        )
    weights, changes = adapted(weights, asked or Adaptation(), "monai-bundle")
    source = source_encoder(weights)
    window = window_size(weights)
    manifest = exported_manifest(weights.manifest, to="monai-bundle", load_into="network_def", adaptations=changes)
    metadata = metadata_json(manifest, name=name, window=window, features=source.embed_dim)
    texts = {
        "LICENSE": weights_licence_text(manifest, name),
        "configs/metadata.json": _json(metadata),
        "configs/inference.json": _json(inference_json(weights, window)),
        "configs/manifest.json": _json(manifest),
        "docs/README.md": readme_text(manifest, name=name, window=window, stride=source.patch_size, features=source.embed_dim),
        "docs/data_license.txt": data_licence_text(manifest),
        "docs/metadata_schema.json": _json(metadata_schema()),
    }
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    model = folder / "models" / "model.pt"
    model.parent.mkdir()
    write_pt(model, weights.state)
    state = read_pt(model)
    require_equal(state, weights.state, "models/model.pt")

    network = load_network(folder)
    load_stock(network, state)
    network = network.eval().double()
    # a network of any size is compared at one that is quick in float64, other on each axis so that a permuted kernel shows
    any_size = [n * p for n, p in zip((2, 3, 1), source.patch_size, strict=True)]
    image = random_image(source.in_channels, weights.args.get("image_size") or any_size)
    with torch.no_grad():
        output = source.forward_features(image)
        pairs = [(network(image), unflatten_tokens(output.tokens, output.grid))]
    return ExportReport(
        files=tuple(folder / path for path in (*texts, "models/model.pt")),
        matched=tuple(sorted(state)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare(pairs, "monai-bundle"),
        notes=tuple(changes),
    )


def load_network(folder: Path) -> Any:
    """Build `network_def` from the bundle's own configuration, as MONAI does; the weights are not loaded yet."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    return parser.get_parsed_content("network_def")


def window_size(weights: Weights) -> tuple[int, ...]:
    """Return the size (X, Y, Z) in voxels that the network sees at once: what it was trained on."""
    size = weights.args.get("image_size") or weights.manifest.get("image_size") or DEFAULT_WINDOW
    return tuple(int(n) for n in size)


def network_config(weights: Weights) -> dict[str, Any]:
    """Return the configuration of the network: stock MONAI parts under their own names, one feature map as output."""
    args = weights.args
    if weights.manifest["library"] == "monai.SegResNet":
        encoder = {
            "_target_": "monai.networks.nets.SegResNet",
            "spatial_dims": 3,
            "init_filters": args["init_filters"],
            "in_channels": args["in_channels"],
            "blocks_down": list(args["blocks_down"]),
            "blocks_up": list(args["blocks_up"]),
        }
        parts = "convInit=@encoder.convInit, down_layers=torch.nn.Sequential(*@encoder.down_layers)"
    elif weights.manifest["library"] == "monai.SwinUNETR":
        encoder = {
            "_target_": "monai.networks.nets.SwinUNETR",
            "in_channels": args["in_channels"],
            "out_channels": 1,
            "feature_size": args["feature_size"],
            "depths": list(args["depths"]),
            "num_heads": list(args["num_heads"]),
            "window_size": list(args["window_size"]),
            "spatial_dims": 3,
        }
        stages = ", ".join(f"layers{n}=torch.nn.Sequential(*@encoder.swinViT.layers{n})" for n in range(1, 5))
        width = 16 * args["feature_size"]
        parts = (
            f"swinViT=torch.nn.Sequential(collections.OrderedDict(patch_embed=@encoder.swinViT.patch_embed, {stages})), "
            "channels_last=Rearrange('b c x y z -> b x y z c'), "
            f"norm=torch.nn.LayerNorm({width}, elementwise_affine=False), features=Rearrange('b x y z c -> b c x y z')"
        )
    else:
        encoder = {
            "_target_": "monai.networks.nets.ViT",
            "in_channels": args["in_channels"],
            "img_size": list(args["image_size"]),
            "patch_size": list(weights.manifest["patch_size"]),
            "hidden_size": args["hidden_size"],
            "mlp_dim": args["mlp_dim"],
            "num_layers": args["num_layers"],
            "num_heads": args["num_heads"],
            "proj_type": "conv",
            "pos_embed_type": "learnable",
            "classification": False,
            "spatial_dims": 3,
        }
        x, y, z = (n // p for n, p in zip(args["image_size"], weights.manifest["patch_size"], strict=True))
        rearrange = f"Rearrange('b (x y z) c -> b c x y z', x={x}, y={y}, z={z})"
        parts = (
            "patch_embedding=@encoder.patch_embedding, blocks=torch.nn.Sequential(*@encoder.blocks), norm=@encoder.norm, "
            f"features={rearrange}"
        )
    return {"encoder": encoder, "network_def": f"$torch.nn.Sequential(collections.OrderedDict({parts}))"}


def normalization_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return named expressions `normalise` (raw voxels, native grid, not clipped yet) and `clip` (after resampling).

    Statistics are taken over the foreground as medssl takes them: above a threshold below Otsu's, or above the default
    `body_hu` in CT. The value that padding takes, normalised, travels in the image's metadata under `padding`.
    """
    intensity = manifest.get("intensity") or {}
    how = normalization_of(intensity)
    if how == "none":
        return {"normalise": "$lambda x: @with_padding(x, float(x.min()))", "clip": "$lambda x: x"}
    if how == "window":
        window = window_of(intensity)
        assert window is not None
        low, high = window
        return {
            "normalise": f"$lambda x: @with_padding((x - {low!r}) / {high - low!r}, 0.0)",
            "clip": "$lambda x: x.clamp(0, 1)",
        }
    name = domain_of(manifest)
    rule = {"threshold": f"$lambda v: {BODY_HU!r}"} if name == "ct" else dict(FOREGROUND)
    argument = "v" if name == "ct" else "@sample(v)"
    shared = {
        **rule,
        "voxels": "$lambda x: np.asarray(x[0].cpu(), dtype=np.float64)",
        "foreground": f"$lambda v: v[v > @threshold({argument})]",
        "body": "$lambda x: (lambda f, v: f if f.size else v.ravel())(@foreground(@voxels(x)), @voxels(x))",
        "width": "$lambda w: float(w) if w > 0 else 1.0",
    }
    if how == "zscore":
        scale = (
            "$lambda x, f: @with_padding((x - f.mean()) / @width(f.std()), (np.quantile(f, 0.005) - f.mean()) / @width(f.std()))"
        )
        clip = "$lambda x: x"
    else:
        scale = "$lambda x, f: @with_padding((x - f[0]) / @width(f[1] - f[0]), 0.0)"
        clip = "$lambda x: x.clamp(0, 1)"
        shared["body_range"] = "$lambda x: np.quantile(@body(x), [0.005, 0.995])"
    source = "@body(x)" if how == "zscore" else "@body_range(x)"
    return {**shared, "scale": scale, "normalise": f"$lambda x: @scale(x, {source})", "clip": clip}


def resample_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a named expression `resample` to the voxel size of the pretraining.

    The outer corner of voxel 0 stays where it is, as in medssl's boxes. MONAI's `Spacing` keeps its centre instead, and with
    `scale_extent` (MONAI 1.6) it places the corner by half a unit instead of half a voxel.
    """
    spacing = spacing_of(manifest)
    if spacing is None:
        return {"resample": "$lambda x: x"}
    return {
        "spacing_mm": list(spacing),
        "ratio": "$lambda x: np.array(@spacing_mm) / np.linalg.norm(np.asarray(x.affine)[:3, :3], axis=0)",
        "to_input_voxels": "$lambda r: np.vstack([np.column_stack([np.diag(r), (r - 1) / 2]), [0.0, 0.0, 0.0, 1.0]])",
        "resampled_size": "$lambda n, r: np.maximum(np.rint(np.array(n) / r), 1).astype(int).tolist()",
        "resampler": {
            "_target_": "SpatialResample",
            "mode": "bilinear",
            "padding_mode": "border",
            "align_corners": False,
        },
        "resample": (
            "$lambda x: @resampler(x, dst_affine=np.matmul(np.asarray(x.affine), @to_input_voxels(@ratio(x))),"
            " spatial_size=@resampled_size(x.shape[1:], @ratio(x)))"
        ),
    }


def inference_json(weights: Weights, window: tuple[int, ...]) -> dict[str, Any]:
    """Return `configs/inference.json`: images of a folder to feature maps as NIfTI, with the geometry of the grid."""
    manifest = weights.manifest
    stride = [int(p) for p in manifest["patch_size"]]
    # half a window where that is whole patches, because features of a step between patches would not fall on the grid
    overlap = [0.5 if n % (2 * p) == 0 else 0.0 for n, p in zip(window, stride, strict=True)]
    affine = [[float(p) if i == j else 0.0 for j in range(3)] + [(p - 1) / 2] for i, p in enumerate(stride)]
    return {
        "imports": IMPORTS,
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/features'",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$[{'image': os.path.join(@dataset_dir, n)} for n in sorted(os.listdir(@dataset_dir)) if n[0] != '.']",
        **network_config(weights),
        "network": "$@network_def.to(@device)",
        "with_padding": "$lambda x, p: (x.meta.update(padding=float(p)), x)[1]",
        **normalization_config(manifest),
        **resample_config(manifest),
        "pad": (
            f"$lambda x: monai.transforms.DivisiblePad({stride}, method='end', value=x.meta['padding'])("
            f"monai.transforms.SpatialPad({list(window)}, method='end', value=x.meta['padding'])(x))"
        ),
        "preprocessing": preprocessing_config("@normalise", "@resample", "@clip", "@pad"),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(window),
            "sw_batch_size": 1,
            "overlap": overlap,
            "mode": "constant",
        },
        "grid_affine": [*affine, [0.0, 0.0, 0.0, 1.0]],
        "place": "$lambda a: torch.matmul(a, torch.tensor(@grid_affine, dtype=a.dtype))",
        **running_config(
            inferer="@inferer",
            postprocessing=[
                "$lambda d: (d['pred'].meta.update(affine=@place(d['image'].affine)), d)[1]",
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "features",
                    "output_ext": ".nii.gz",
                    "resample": False,
                    "separate_folder": False,
                    "squeeze_end_dims": False,
                },
            ],
        ),
    }


def preprocessing_config(*steps: str) -> dict[str, Any]:
    """Return the transforms from a file to the image that the network is shown: axes to RAS, then the named expressions."""
    return {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "image_only": True},
            {
                "_target_": "Orientationd",
                "keys": "image",
                "axcodes": "RAS",
                "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
            },
            *({"_target_": "Lambdad", "keys": "image", "func": step} for step in steps),
            {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        ],
    }


def running_config(*, inferer: str, postprocessing: list[Any]) -> dict[str, Any]:
    """Return what runs a bundle: data, the checkpoint, the evaluator, and what is done with a prediction."""
    return {
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False, "num_workers": 0},
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "@ckpt_path",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
            "strict": True,
        },
        "handlers": ["@checkpointloader"],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": inferer,
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def metadata_json(manifest: dict[str, Any], *, name: str, window: tuple[int, ...], features: int) -> dict[str, Any]:
    """Return `configs/metadata.json` as MONAI's bundle specification asks for it."""
    import einops
    import nibabel
    import numpy as np

    clipped = normalization_of(manifest.get("intensity") or {}) in ("window", "percentile")
    normalised = "unknown" if is_unknown(manifest, "intensity") else normalization_of(manifest.get("intensity") or {})
    imported = bool(manifest.get("imported"))
    domains = {{"ct": "CT", "mri": "MR"}.get(name, "n/a") for name in manifest.get("domains") or ()}
    return {
        "schema": SCHEMA_URL,
        "version": VERSION,
        "changelog": {VERSION: f"written by medssl {manifest['export']['versions']['medssl']}"},
        "monai_version": manifest["export"]["versions"]["monai"].split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            "nibabel": nibabel.__version__,
            "einops": einops.__version__,
            "pytorch-ignite": _package_version("pytorch-ignite", IGNITE),
            "fire": _package_version("fire", FIRE),  # `python -m monai.bundle` does not start without it
        },
        "name": name,
        "task": f"Features of medical images from {'an imported' if imported else 'a self-supervised'} encoder",
        "description": (
            f"The pretrained encoder {manifest['encoder']['name']} ({manifest['library']}) alone: one feature map of {features} "
            "channels per image. No decoder, no task head."
        ),
        "authors": manifest.get("authors", "unknown" if imported else "the owner of the pretraining run"),
        "copyright": manifest.get("copyright", "unknown" if imported else "the owner of the pretraining run"),
        "data_type": "nibabel",
        "image_classes": f"{manifest['channels']} channel(s), normalised: {normalised}",
        "pred_classes": f"{features} feature channels",
        "intended_use": "Initialisation of networks and features for research. Not for diagnostic use.",
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": domains.pop() if len(domains) == 1 else "n/a",
                    "num_channels": manifest["channels"],
                    "spatial_shape": list(window),
                    "dtype": "float32",
                    "value_range": [0, 1] if clipped else [],
                    "is_patch_data": True,
                    "channel_def": {str(i): "image" for i in range(manifest["channels"])},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "latent",
                    "num_channels": features,
                    "spatial_shape": [n // p for n, p in zip(window, manifest["patch_size"], strict=True)],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {},
                }
            },
        },
    }


def metadata_schema() -> dict[str, Any]:
    """Return a JSON schema of the fields that MONAI's bundle specification makes mandatory, for machines without a network.

    `verify_metadata` downloads the schema that `metadata.json` names, unless the file it would save it to exists; this one
    stands in.
    """
    text, table, numbers = {"type": "string", "minLength": 1}, {"type": "object"}, {"type": "array", "items": {"type": "number"}}
    tensor = {
        "type": "object",
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
        "properties": {
            "type": {"enum": ["image", "series", "tuples", "probabilities"]},
            "format": text,
            "num_channels": {"type": "integer", "minimum": 1},
            "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
            "dtype": text,
            "value_range": numbers,
            "is_patch_data": {"type": "boolean"},
            "channel_def": table,
        },
    }
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": tensor}
    texts = ("schema", "monai_version", "pytorch_version", "numpy_version", "name", "task", "description", "authors", "copyright")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "metadata.json of a MONAI bundle (mandatory fields of the bundle specification)",
        "type": "object",
        "required": [
            *texts,
            "version",
            "changelog",
            "required_packages_version",
            "network_data_format",
        ],
        "properties": {
            **dict.fromkeys(texts, text),
            "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+"},
            "changelog": {"type": "object", "minProperties": 1},
            "required_packages_version": table,
            "network_data_format": {
                "type": "object",
                "required": ["inputs", "outputs"],
                "properties": {"inputs": tensors, "outputs": tensors},
            },
        },
    }


def data_licence_text(manifest: dict[str, Any]) -> str:
    """Return `docs/data_license.txt`: which data cards stand behind the weights; no data are in the bundle."""
    cards = manifest.get("data_cards") or []
    if not cards and is_unknown(manifest, "data_cards"):
        return (
            "This bundle holds no images and no labels. Which images the weights were trained on is unknown: they were imported from a file "
            "that does not say.\n\nAsk their owner; the terms of each data set may restrict the weights.\n"
        )
    listed = "\n".join(f"- {line}" for line in [*card_lines(cards), *(note for card in cards for note in card.get("notes", []))])
    return (
        "This bundle holds no images and no labels. The weights were pretrained on the data sets behind these data cards:\n\n"
        f"{listed or '- none was recorded'}\n\n"
        "Ask the owner of the weights for the cards; the terms of each data set are stated there and may restrict the weights.\n"
    )


def _package_version(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=4) + "\n"
