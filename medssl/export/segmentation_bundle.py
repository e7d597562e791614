"""A fine-tuned segmentation network as a MONAI bundle: images of a folder to label maps on their own grid, where medssl is not installed.

Preprocessing is that of the encoder's bundle (`monai_bundle.normalization_config`); whole volumes are segmented as
`medssl.evaluation.finetune.predict` does it: resampled, seen in windows, mirrored where the settings say so, and brought back. Of volumes of several
channels each is normalised, and padded, by its own; they come as the volumes of a 4-D file, or as files `<case>_0000`, `<case>_0001` ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medssl.errors import WeightsError
from medssl.export.bundle_text import segmentation_readme_text, weights_licence_text
from medssl.export.manifest import Weights, exported_manifest
from medssl.export.monai_bundle import (
    IMPORTS,
    data_licence_text,
    load_network,
    metadata_json,
    metadata_schema,
    normalization_config,
    preprocessing_config,
    running_config,
)
from medssl.export.verify import ExportReport, compare, load_stock, random_image, read_pt, require_equal, write_pt
from medssl.registry import lookup

PART = "network"
FILE = "network.safetensors"
SETTINGS = ("network", "network_args", "out_channels", "label_values", "structures", "crop", "overlap", "flips", "pretrained")
STOCK = {"unetr": "UNETR", "segresnet": "SegResNet", "swin_unetr": "SwinUNETR"}


def find_network(path: Path) -> Path:
    """Return the file of the fine-tuned network that a folder of `medssl finetune` holds; any other path as it is.

    Args:
        path: What the user gave: of a fine-tuning the folder, one of its `cells`, or the file.

    Raises:
        WeightsError: The folder holds several networks.
    """
    if not path.is_dir() or (path / "index.json").is_file() or (path / "weights" / "index.json").is_file():
        return path
    if (path / FILE).is_file():
        return path / FILE
    cells = sorted(path.glob(f"cells/*/{FILE}"))
    if len(cells) > 1:
        names = ", ".join(str(cell.parent.relative_to(path)) for cell in cells)
        raise WeightsError(f"{path} holds {len(cells)} fine-tuned networks; give the folder of one: {names}")
    return cells[0] if cells else path


def write(folder: Path, weights: Weights, *, name: str) -> ExportReport:
    """Write the bundle, load its network from its own files and compare the scores of an image.

    Args:
        folder: Existing, empty.
        weights: `network.safetensors` of a fine-tuning with network `unetr`, `segresnet` or `swin_unetr`.
        name: Name of the bundle.

    Raises:
        WeightsError: A network without a stock form, a fine-tuning by an earlier medssl, or the scores of the reloaded network differ.
    """
    found = weights.manifest
    if found.get("network") not in STOCK:
        kind = f"network {found['network']}" if found.get("network") else f"task {found.get('task', 'unknown')}"
        raise WeightsError(
            f"export to monai-bundle: this is a fine-tuned network ({kind}); a bundle holds segmentation of volumes by "
            f"{', '.join(STOCK)}, stock networks of MONAI; its own file goes on working in medssl"
        )
    lacking = [key for key in (*SETTINGS, "domains") if key not in found]
    if lacking:
        raise WeightsError(
            f"export to monai-bundle: the fine-tuning does not say {', '.join(lacking)}, it is of an earlier medssl; fine-tune again"
        )
    if found.get("domain_args"):
        raise WeightsError(
            f"export to monai-bundle: images were read with {json.dumps(found['domain_args'])}, which a bundle cannot repeat; fine-tune "
            "without domain_args"
        )
    manifest = exported_manifest(
        found,
        to="monai-bundle",
        load_into="network_def",
        **{key: found[key] for key in SETTINGS},
        forced=found.get("forced", []),
        adapted=found.get("adapted", []),
        channel_names=found.get("channel_names", []),
    )
    network_config = stock_config(found)
    texts = {
        "LICENSE": weights_licence_text(manifest, name),
        "configs/metadata.json": _json(segmentation_metadata(manifest, found, name)),
        "configs/inference.json": _json(inference_json(found, network_config)),
        "configs/manifest.json": _json(manifest),
        "docs/README.md": segmentation_readme_text(manifest, found, name=name),
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
    stock = load_network(folder)
    load_stock(stock, state)
    source = lookup("network", found["network"])(
        encoder=found["encoder"], out_channels=found["out_channels"], image_size=found["crop"], **found["network_args"]
    )
    load_stock(source, weights.state)
    image = random_image(found["channels"], found["crop"])
    with torch.no_grad():
        pairs = [(stock.eval().double()(image), source.eval().double()(image))]
    return ExportReport(
        files=tuple(folder / path for path in (*texts, "models/model.pt")),
        matched=tuple(sorted(state)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare(pairs, "monai-bundle"),
    )


def stock_config(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of MONAI's network, every argument that shapes it."""
    more, kind = dict(manifest["network_args"]), manifest["network"]
    args = lookup("encoder", manifest["encoder"]["name"])(**manifest["encoder"]["args"]).config()["args"]  # with its defaults
    shared = {
        "_target_": f"monai.networks.nets.{STOCK[kind]}",
        "spatial_dims": 3,
        "in_channels": manifest["channels"],
        "out_channels": manifest["out_channels"],
    }
    if kind == "segresnet":
        own = {key: args[key] for key in ("init_filters", "blocks_down", "blocks_up")} | {"dropout_prob": more.get("dropout_prob")}
    elif kind == "swin_unetr":
        own = {key: args[key] for key in ("feature_size", "depths", "num_heads", "window_size")}
        own |= {"norm_name": more.get("norm_name", "instance")}
    else:
        own = {"img_size": list(manifest["crop"]), "proj_type": "conv", "res_block": True}
        own |= {key: args[key] for key in ("hidden_size", "num_heads")} | {"mlp_dim": args["mlp_dim"] or 4 * args["hidden_size"]}
        own |= {"feature_size": more.get("feature_size", 16), "norm_name": more.get("norm_name", "instance")}
    return {**shared, **own}


def inference_json(manifest: Mapping[str, Any], network: dict[str, Any]) -> dict[str, Any]:
    """Return `configs/inference.json`: images of a folder to label maps as NIfTI, with the axes of the image files."""
    spacing, flips = manifest.get("spacing_mm"), [2 + int(axis) for axis in manifest["flips"]]
    channels, size = int(manifest["channels"]), list(manifest["crop"])
    edges = "np.linalg.norm(np.asarray(x.affine, dtype=np.float64).reshape(-1, 4, 4)[0, :3, :3], axis=0)"
    sizes = f"[max(1, round(float(n * own / new))) for n, own, new in zip(x.shape[2:], {edges}, {json.dumps(spacing)})]"
    resized = "torch.nn.functional.interpolate({}, size=tuple({}), mode='trilinear', align_corners=False)"
    return {
        "imports": [*IMPORTS, *(["$import re"] if channels > 1 else [])],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/segmentations'",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        **(
            {"datalist": "$[{'image': os.path.join(@dataset_dir, n)} for n in sorted(os.listdir(@dataset_dir)) if n[0] != '.']"}
            if channels == 1
            else grouped_files_config()
        ),
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "with_padding": "$lambda x, p: (x.meta.update(padding=float(p)), x)[1]",
        **(normalization_config(dict(manifest)) if channels == 1 else channelwise_config(manifest, channels)),
        "preprocessing": preprocessing_config("@normalise", "@clip"),
        "plain": "$lambda x: x.as_tensor() if hasattr(x, 'as_tensor') else x",
        "shrink": "$lambda x: @plain(x)" if spacing is None else f"$lambda x: {resized.format('@plain(x)', sizes)}",
        "windows": (
            f"$lambda x, n, p: monai.inferers.sliding_window_inference(x, {size}, 1, n, "
            f"overlap={manifest['overlap']!r}, mode='gaussian', cval=p)"
        ),
        "looks": (
            "$lambda x, n, p: @windows(x, n, p)"
            if not flips
            else f"$lambda x, n, p: sum(@windows(x.flip(a), n, p).softmax(1).flip(a) for a in [[], *[[a] for a in {flips}]])"
        ),
        **(padding_config(channels, size) if channels > 1 else {}),
        "inferer": (
            "$lambda x, n, *a, **k: "
            + resized.format(
                "@looks(@shrink(x), n, float(torch.as_tensor(x.meta['padding']).ravel()[0]))"
                if channels == 1
                else "@looks_padded(@shrink(x), n, torch.as_tensor(x.meta['padding']).ravel())",
                "x.shape[2:]",
            )
        ),
        "values": list(manifest["label_values"]),
        "label": (
            "$lambda d: {**d, 'pred': monai.data.MetaTensor("
            "torch.tensor(@values, dtype=torch.int16)[@plain(d['pred']).argmax(dim=0).cpu()][None], "
            "meta=d['image'].meta)}"
        ),
        **running_config(
            inferer="@inferer",
            postprocessing=[
                "@label",
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_ext": ".nii.gz",
                    "output_dtype": "$np.int16",
                    "resample": True,  # back to the axes of the file: voxels meet voxels, nothing is interpolated
                    "mode": "nearest",
                    "padding_mode": "border",
                    "separate_folder": False,
                },
            ],
        ),
    }


def grouped_files_config() -> dict[str, Any]:
    """Return `datalist` of images of several channels: 4-D files, or files that differ in `_0000`, `_0001` ... alone."""
    return {
        "case_of": "$lambda n: re.sub(r'_[0-9]{4}(?=\\.)', '', n)",
        "names": "$sorted((n for n in os.listdir(@dataset_dir) if n[0] != '.'), key=lambda n: (@case_of(n), n))",
        "datalist": (
            "$[{'image': g if len(g) > 1 else g[0]} for g in "
            "([os.path.join(@dataset_dir, n) for n in own] for _, own in itertools.groupby(@names, key=@case_of))]"
        ),
    }


def channelwise_config(manifest: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return `normalise` and `clip` for images of several channels: each as an image of one, and the value of padding of each."""
    own = normalization_config(dict(manifest))
    counted = (
        f"$lambda x: x if x.shape[0] == {channels} else (_ for _ in ()).throw("
        f"ValueError('an image has %d channels, the network takes {channels}' % x.shape[0]))"
    )
    return {
        **own,
        "normalise_channel": own["normalise"],
        "counted": counted,
        "joined": (
            "$lambda x, parts: monai.data.MetaTensor(torch.cat([@plain(p) for p in parts]), "
            "meta={**x.meta, 'padding': torch.tensor([p.meta['padding'] for p in parts])})"
        ),
        "normalise": f"$lambda x: @joined(x, [@normalise_channel(@counted(x)[k : k + 1]) for k in range({channels})])",
    }


def padding_config(channels: int, size: Sequence[int]) -> dict[str, Any]:
    """Return `looks_padded`: `looks` at an image that is brought to the size of a window, each channel with its own value."""
    return {
        "spare": f"$lambda x: [max(0, w - n) for w, n in zip({list(size)}, x.shape[2:])]",
        "before_after": "$lambda spare: [v for n in reversed(spare) for v in (n // 2, n - n // 2)]",
        "fill": (
            "$lambda x, p: torch.cat([torch.nn.functional.pad(x[:, k : k + 1], @before_after(@spare(x)), value=float(p[k])) "
            f"for k in range({channels})], dim=1)"
        ),
        "trim": "$lambda y, x: y[(..., *[slice(s // 2, s // 2 + n) for s, n in zip(@spare(x), x.shape[2:])])]",
        "looks_padded": "$lambda x, n, p: @trim(@looks(@fill(x, p), n, 0.0), x)",
    }


def segmentation_metadata(manifest: dict[str, Any], found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return `configs/metadata.json` as MONAI's bundle specification asks for it."""
    window = tuple(int(n) for n in found["crop"])
    classes = {"0": "background", **{str(n): found["structures"][str(v)] for n, v in enumerate(found["label_values"][1:], start=1)}}
    base = metadata_json({**manifest, "patch_size": [1, 1, 1]}, name=name, window=window, features=int(found["out_channels"]))
    if names := found.get("channel_names"):
        base["network_data_format"]["inputs"]["image"]["channel_def"] = {str(k): called for k, called in enumerate(names)}
    base["network_data_format"]["outputs"]["pred"] |= {
        "format": "segmentation",
        "spatial_shape": list(window),
        "channel_def": classes,
    }
    return base | {
        "task": "Segmentation of volumes",
        "description": f"A {STOCK[found['network']]} of MONAI, fine-tuned with medssl: {len(classes) - 1} structure(s) and background.",
        "authors": manifest.get("authors", "the owner of the fine-tuning"),
        "copyright": manifest.get("copyright", "the owner of the fine-tuning"),
        "pred_classes": ", ".join(classes.values()),
        "intended_use": "Research only. Not for diagnostic use.",
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=4) + "\n"
