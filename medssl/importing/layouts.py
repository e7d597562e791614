"""How others name the tensors of the networks that our encoders hold, one function per encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from medssl.encoders.resenc3d import STEM_CONVOLUTION, complete, reverse_args, reverse_axes, without_aliases
from medssl.encoders.stem import adapt_stem
from medssl.encoders.swin3d import DECODER as SWIN_DECODER
from medssl.errors import WeightsError
from medssl.export.nnunet import args_of_plan
from medssl.importing.files import Opened


@dataclass
class Converted:
    """A file's tensors under the names of our encoder's network, and what was found out on the way.

    Args:
        layout: What the file was taken for.
        args: Arguments of the encoder.
        state: Tensors of the encoder, and of its decoder where the file holds one.
        left_out: Names in the file that have no place in the network.
        resized: Tensors that were interpolated to another size.
        image_size: Size of the views of the pretraining, None where unknown.
        spacing_mm: Their spacing, None where unknown.
        normalize: Their normalisation, None where unknown.
        notes: For people: everything that was changed or assumed.
    """

    layout: str
    args: dict[str, Any]
    state: dict[str, Tensor]
    left_out: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    image_size: list[int] | None = None
    spacing_mm: list[float] | None = None
    normalize: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """What the user says about the weights.

    Args:
        args: Arguments of the encoder that tensors do not tell.
        channels: Input channels wanted; None keeps them.
        image_size: Size of the views of the pretraining.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    channels: int | None = None
    image_size: Sequence[int] | None = None


MASK_TOKEN = "mask_token"  # of pretraining; it also tells timm that names are DINOv2's
Reader = Callable[[Opened, Asked], Converted]
ANCHORS = {
    "swin3d": ("layers1.0.blocks.0.norm1.weight", "layers1.0.0.blocks.0.norm1.weight"),
    "vit3d": ("patch_embedding.patch_embeddings.weight", "patch_embedding.patch_embeddings.1.weight"),
    "resenc3d": ("stem.convs.0.conv.weight", "stem.convs.0.all_modules.0.weight"),
    "image2d": ("cls_token", "conv1.weight", "stem.0.weight", "patch_embed.proj.weight"),
}


def prefix_of(encoder: str, names: Iterable[str]) -> str | None:
    """Return what stands before the names of an encoder's network, None where there is no such network; a teacher comes first."""
    found = {name[: -len(anchor)] for name in names for anchor in ANCHORS[encoder] if name.endswith(anchor)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    return min(found, key=lambda prefix: ("teacher" not in prefix, "ema" not in prefix, len(prefix), prefix), default=None)


def require_prefix(encoder: str, opened: Opened, accepted: str) -> str:
    """Return `prefix_of`, or say which encoder the names look like.

    Raises:
        WeightsError: The file holds no such network.
    """
    found = prefix_of(encoder, opened.tensors)
    if found is None:
        others = [name for name in ANCHORS if name != encoder and prefix_of(name, opened.tensors) is not None]
        hint = f"its names are those of {others[0]}: --as {others[0]}" if others else "see docs/export.md for what can be imported"
        raise WeightsError(f"the file holds no tensors of encoder {encoder}; accepted: {accepted}; {hint}")
    return found


def below(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Split tensors into those below a prefix, which is taken off, and the names of the others."""
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return inside, [key for key in tensors if not key.startswith(prefix)]


def read_swin(opened: Opened, asked: Asked) -> Converted:
    """MONAI SwinUNETR: the SSL file `model_swinvit.pt` (prefix `module.`, `fc1`), `swinViT.*`, or a whole network with its decoder."""
    accepted = "MONAI's swinViT (model_swinvit.pt, swinViT.*, a whole SwinUNETR)"
    prefix = require_prefix("swin3d", opened, accepted)
    inside, others = below(prefix, opened.tensors)
    renamed = {}
    for key, value in inside.items():
        name = re.sub(r"^(layers\d)\.0\.0\.", r"\1.0.", key).replace(".mlp.fc", ".mlp.linear")
        renamed[f"swinViT.{name}"] = value
    versions = sorted(key for key in renamed if re.match(r"swinViT\.layers\dc\.", key))
    if versions:
        raise WeightsError(
            f"the file is of SwinUNETR with use_v2 ({len(versions)} tensors like {versions[0]}); swin3d has no such blocks"
        )
    stages = [f"swinViT.layers{n}.0.blocks." for n in range(1, 5)]
    depths = [len({key.split(".")[4] for key in renamed if key.startswith(stage)}) for stage in stages]
    tables = [renamed.get(f"{stage}0.attn.relative_position_bias_table") for stage in stages]
    patch = renamed.get("swinViT.patch_embed.proj.weight")
    if patch is None or patch.ndim != 5 or any(table is None for table in tables):
        raise WeightsError(f"the file lacks the patch embedding or a bias table of one of the four stages; accepted: {accepted}")
    args: dict[str, Any] = {
        "in_channels": patch.shape[1],
        "feature_size": patch.shape[0],
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables if table is not None],
        "window_size": round((int(tables[0].shape[0]) ** (1 / 3) + 1) / 2),  # type: ignore[union-attr]  # (2 w - 1)^3 rows
    }
    parts = {key for key in renamed if key.startswith(("swinViT.patch_embed.", *(f"swinViT.layers{n}." for n in range(1, 5))))}
    others += [prefix + key.removeprefix("swinViT.") for key in renamed if key not in parts]
    state = {key: value for key, value in renamed.items() if key in parts}
    if prefix.endswith("swinViT."):
        root = prefix.removesuffix("swinViT.")
        decoder, _ = below(root, {key: value for key, value in opened.tensors.items() if key.startswith(root)})
        decoder = {key: value for key, value in decoder.items() if key.startswith(SWIN_DECODER)}
        state |= decoder
        others = [key for key in others if key.removeprefix(root) not in decoder]
    return Converted("MONAI SwinUNETR", {**args, **asked.args}, state, others)


def read_vit(opened: Opened, asked: Asked) -> Converted:
    """MONAI ViT, UNETR's `vit.*`, ViTAutoEnc, or MaskedAutoEncoderViT, whose last norm is one block more."""
    accepted = "MONAI's ViT, UNETR, ViTAutoEnc and MaskedAutoEncoderViT, with a convolution as patch embedding"
    prefix = require_prefix("vit3d", opened, accepted)
    inside, others = below(prefix, opened.tensors)
    patch = inside.get("patch_embedding.patch_embeddings.weight")
    if patch is None or patch.ndim != 5:
        raise WeightsError(
            "the patch embedding of the file is no 3D convolution (MONAI's proj_type conv); accepted: "
            + accepted.removeprefix("MONAI's ")
        )
    notes = []
    layers = 1 + max((int(key.split(".")[1]) for key in inside if re.match(r"blocks\.\d+\.norm1\.weight", key)), default=-1)
    layout = "MONAI ViT"
    if f"blocks.{layers}.weight" in inside:
        layout = "MONAI MaskedAutoEncoderViT"
        for leaf in ("weight", "bias"):
            inside[f"norm.{leaf}"] = inside.pop(f"blocks.{layers}.{leaf}")
        notes.append(
            f"blocks.{layers} is the final norm: renamed to norm; the class token is left out, which attention saw in pretraining"
        )
    elif "conv3d_transpose.weight" in inside:
        layout = "MONAI ViTAutoEnc"
    groups = ("patch_embedding.", "blocks.", "norm.")
    stale = [key for key in inside if key.startswith("blocks.") and ".cross_attn." in key]  # of MONAI before 1.4, on no path
    kept = {key: value for key, value in inside.items() if key.startswith(groups) and key not in stale}
    others += [prefix + key for key in inside if key not in kept]
    hidden, channels, *size = patch.shape
    args: dict[str, Any] = {"in_channels": channels, "patch_size": size, "hidden_size": hidden, "num_layers": layers}
    if (mlp := kept.get("blocks.0.mlp.linear1.weight")) is not None:
        args["mlp_dim"] = mlp.shape[0]
    if "num_heads" not in asked.args:
        args["num_heads"] = max(1, hidden // 64)
        notes.append(f"num_heads {args['num_heads']} assumed (64 channels per head): tensors do not tell; else give num_heads=N")
    image, more = _vit_size(kept.get("patch_embedding.position_embeddings"), size, asked)
    return Converted(layout, {**args, **asked.args, "image_size": image}, kept, others, image_size=image, notes=[*notes, *more])


def _vit_size(table: Tensor | None, patch: Sequence[int], asked: Asked) -> tuple[list[int], list[str]]:
    """Return the image size of a position table: as given, or a cube."""
    if table is None or table.ndim != 3:
        raise WeightsError(
            "the file has no table of learned positions; accepted: MONAI's ViT with positions of pos_embed_type learnable"
        )
    count = table.shape[1]
    if asked.image_size is not None:
        size = [int(n) for n in asked.image_size]
        if len(size) != 3 or prod(n // p for n, p in zip(size, patch)) != count:
            raise WeightsError(
                f"the position table has {count} tokens, which images of {size} voxels with patch {list(patch)} do not give; "
                "give the image size of the pretraining"
            )
        return size, []
    side = round(count ** (1 / 3))
    if side**3 != count:
        raise WeightsError(
            f"the position table has {count} tokens, no cube; say which image it is of: --image-size X,Y,Z in voxels"
        )
    size = [side * p for p in patch]
    return size, [
        f"image size {'x'.join(map(str, size))} assumed from {count} positions (a cube of tokens); else give --image-size"
    ]


def read_resenc(opened: Opened, asked: Asked) -> Converted:
    """An nnssl/OpenMind or medssl adaptation-plan checkpoint, or nnU-Net's own tensors; Z-first, so every kernel is turned."""
    accepted = "nnU-Net's residual-encoder U-Net (adaptation-plan checkpoint of nnssl, OpenMind or medssl, or its network_weights)"
    plan = opened.content.get("nnssl_adaptation_plan")
    image = spacing = normalize = None
    if isinstance(plan, Mapping):
        if asked.args:
            raise WeightsError(f"the file's adaptation plan says the arguments of the encoder; leave {', '.join(asked.args)} out")
        try:
            args = args_of_plan(plan)
            prefix = str(plan["key_to_stem"]).removesuffix("stem")
            configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
            image = [int(n) for n in reversed(configuration["patch_size"])]
            spacing = [float(s) for s in reversed(configuration["spacing"])] if configuration["spacing"] else None
            schemes = set(configuration["normalization_schemes"])
        except (KeyError, TypeError, StopIteration) as err:
            raise WeightsError(
                f"the adaptation plan in the file is not complete ({type(err).__name__}); accepted: {accepted}"
            ) from err
        normalize = "zscore" if schemes == {"ZScoreNormalization"} else None
        layout = "adaptation-plan checkpoint"
    else:
        prefix = require_prefix("resenc3d", opened, accepted)
        args = complete(dict(asked.args))
        layout = "nnU-Net residual-encoder U-Net"
    inside, others = below(prefix, opened.tensors)
    root = prefix.removesuffix("encoder.") if prefix.endswith("encoder.") else None
    named = {f"encoder.{key}": value for key, value in inside.items()}
    if root is not None:
        named |= {k: v for k, v in below(root, opened.tensors)[0].items() if k.startswith("decoder.") and ".seg_layers." not in k}
        others = [key for key in others if key.removeprefix(root) not in named]
    state = reverse_axes(without_aliases(named))
    if STEM_CONVOLUTION in state and "in_channels" not in asked.args:
        args["in_channels"] = state[STEM_CONVOLUTION].shape[1]
    notes = ["axes of kernels, strides and sizes turned from nnU-Net's Z, Y, X to X, Y, Z"]
    if not isinstance(plan, Mapping):
        notes.append("no adaptation plan in the file: sizes are those of preset L unless given")
        return Converted(layout, args, state, others, notes=notes)
    return Converted(layout, reverse_args(args), state, others, [], image, spacing, normalize, notes)


def read_image2d(opened: Opened, asked: Asked) -> Converted:
    """Networks of timm under timm's names, and what timm itself converts to them: DINOv2-style ViT (also as a teacher's `backbone.*`)."""
    import sys

    from medssl._compat import torchvision_ops
    from medssl.encoders.image2d import Image2D

    torchvision_ops.ensure()
    config = opened.config
    args: dict[str, Any] = {"model": config.get("architecture"), "model_args": _model_args(config), **asked.args}
    if not args["model"]:
        raise WeightsError(
            "which timm network is it? tensors do not tell; give model=NAME, for instance model=vit_small_patch14_dinov2"
        )
    if asked.image_size is not None:
        args["image_size"] = list(asked.image_size)
    with torch.device("meta"):
        probe = Image2D(**{**args, "in_channels": 1})
    network: Any = probe.net
    own = network.state_dict()
    tensors, notes = _without_chunks(opened.tensors, own)
    prefix = _best_prefix(tensors, own)
    inside, others = below(prefix, tensors)
    notes += [f"tensors below {prefix}"] if prefix else []
    if asked.image_size is None and (size := _size_of_positions(inside, network)):
        args["image_size"] = size
        notes.append(f"image size {'x'.join(map(str, size))} is that of the file's {inside['pos_embed'].shape[1]} positions")
        with torch.device("meta"):
            probe = Image2D(**{**args, "in_channels": 1})
        own = probe.net.state_dict()
    stem = network.pretrained_cfg.get("first_conv")
    stem = f"{stem}.weight" if isinstance(stem, str) else ""
    if stem in inside and inside[stem].ndim == 4:
        args.setdefault("in_channels", inside[stem].shape[1])
        if inside[stem].shape[2:] != own[stem].shape[2:]:
            raise WeightsError(
                f"{stem} has a kernel of {tuple(inside[stem].shape[2:])}, {args['model']} one of {tuple(own[stem].shape[2:])}; "
                "choose the model of that patch size"
            )
    with torch.device("meta"):
        network = Image2D(**args).net
    heads = _heads(network.pretrained_cfg.get("classifier"))
    dropped = [key for key in inside if key.startswith(heads) and key not in own]
    given = {key: value for key, value in inside.items() if key not in dropped}
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None and given.keys() != own.keys():
        try:
            given = dict(convert(dict(given), network))
        except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as err:
            hint = ", one with registers (reg_tokens of model_args)" if "register_tokens" in inside else ""
            raise WeightsError(
                f"timm cannot convert these tensors to {args['model']} ({type(err).__name__}); choose the model that they are of{hint}"
            ) from err
        if given.keys() != inside.keys() - {*dropped, MASK_TOKEN}:
            notes.append("names converted by timm")
    if MASK_TOKEN in inside and MASK_TOKEN not in own:
        given.pop(MASK_TOKEN, None)
        dropped.append(MASK_TOKEN)
    given, resized = _fit_table(given, own, network)
    if "pos_embed" in given and abs(inside["pos_embed"].shape[1] - given["pos_embed"].shape[1]) > 1:  # 1: the class token's own
        resized = ["pos_embed"]
    size = _image_size(probe)
    if args.get("image_size") is None:
        notes.append(f"image size {'x'.join(map(str, size))} is timm's for {args['model']}; else give --image-size")
    return Converted("timm", args, given, [*others, *(prefix + key for key in dropped)], resized, image_size=size, notes=notes)


CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")


def _without_chunks(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Name blocks by their number alone where a file keeps them in chunks: DINOv2's `block_chunks`, `blocks.CHUNK.NUMBER.`, for FSDP.

    Networks of timm whose blocks lie in stages (`blocks.STAGE.NUMBER.`) keep their names.

    Returns:
        Tensors, and what is to be said of it.
    """
    plain = {CHUNK.sub(r"\1blocks.\2.", key): value for key, value in tensors.items()}
    changed = plain.keys() != tensors.keys()
    if not changed or len(plain) != len(tensors) or any(CHUNK.search(key) for key in own):
        return dict(tensors), []
    return plain, ["blocks were in chunks and are named by their number alone"]


def _size_of_positions(inside: Mapping[str, Tensor], network: Any) -> list[int] | None:
    """Return the image size (H, W) that a ViT's position table is of, where tokens make a square; None where that is not told."""
    table, patch = inside.get("pos_embed"), getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if table is None or table.ndim != 3 or patch is None or not hasattr(network.patch_embed, "grid_size"):
        return None
    for before in (int(getattr(network, "num_prefix_tokens", 1)), 1, 0):  # with registers, with the class token alone, without
        side = round(max(table.shape[1] - before, 0) ** 0.5)
        if side > 0 and side**2 == table.shape[1] - before:
            return [side * int(p) for p in patch]
    return None


def _model_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of a timm `config.json` that `Image2D` does not set itself."""
    given = config.get("model_args") or {}
    return {key: value for key, value in dict(given).items() if key not in ("in_chans", "num_classes", "img_size")}


def _best_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the prefix below which most tensors of the network lie; of equals a teacher's, then the shortest."""
    found: dict[str, int] = {"": 0}
    for key in tensors:
        parts = key.split(".")
        for cut in range(min(4, len(parts))):
            if ".".join(parts[cut:]) in own:
                prefix = "".join(f"{part}." for part in parts[:cut])
                found[prefix] = found.get(prefix, 0) + 1
    return max(found, key=lambda prefix: (found[prefix], "teacher" in prefix, -len(prefix)))


def _heads(classifier: Any) -> tuple[str, ...]:
    """Return prefixes of tensors that belong to a task or to pretraining, never to features."""
    own = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return (*(f"{name}." for name in own), "head.", "head_dist.", "fc.", "classifier.", "dino_head.", "ibot_head.", "decoder")


def _fit_table(given: dict[str, Tensor], own: Mapping[str, Tensor], network: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Resample the position table of a ViT where timm's own conversion has not done it."""
    table = given.get("pos_embed")
    if table is None or "pos_embed" not in own or table.shape == own["pos_embed"].shape or table.ndim != 3:
        return given, []
    from timm.layers import resample_abs_pos_embed

    before = 0 if getattr(network, "no_embed_class", False) else int(getattr(network, "num_prefix_tokens", 1))
    side = round((table.shape[1] - before) ** 0.5)
    if side**2 != table.shape[1] - before or table.shape[2] != own["pos_embed"].shape[2]:
        return given, []
    fitted = resample_abs_pos_embed(table, new_size=list(network.patch_embed.grid_size), num_prefix_tokens=before)
    return {**given, "pos_embed": fitted}, ["pos_embed"]


def _image_size(encoder: Any) -> list[int]:
    size = encoder.config()["args"]["image_size"] or encoder.net.pretrained_cfg["input_size"][1:]
    return [int(n) for n in size]


STEMS = {
    "swin3d": "swinViT.patch_embed.proj.weight",
    "vit3d": "patch_embedding.patch_embeddings.weight",
    "resenc3d": STEM_CONVOLUTION,
}
READERS: dict[str, Reader] = {"swin3d": read_swin, "vit3d": read_vit, "resenc3d": read_resenc, "image2d": read_image2d}


def adapt_channels(encoder: str, converted: Converted, channels: int | None) -> Converted:
    """Give the stem another number of input channels, where grey is one of the two, and say so."""
    if channels is None or channels == converted.args.get("in_channels"):
        return converted
    stem = STEMS.get(encoder) or _stem_of(converted)
    if stem not in converted.state:
        raise WeightsError(f"the file lacks {stem}, the input convolution, so its channels cannot be changed; leave --channels out")
    state, notes = adapt_stem(converted.state, stem, channels)
    converted.state, converted.notes = state, [*converted.notes, *notes]
    converted.args["in_channels"] = channels
    return converted


def _stem_of(converted: Converted) -> str:
    from medssl.encoders.image2d import Image2D

    with torch.device("meta"):
        network: Any = Image2D(**converted.args).net
    return f"{network.pretrained_cfg.get('first_conv')}.weight"
