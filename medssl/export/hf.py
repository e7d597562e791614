"""A folder in the Hugging Face layout: `model.safetensors`, `config.json` and a model card; everything is opened offline.

A plain 2D ViT goes under the names of transformers' `ViTModel`, one with layer scale under those of `Dinov2Model`, so that
`AutoModel.from_pretrained(FOLDER)` opens it. Everything else keeps its stock keys, and `config.json` holds the name and the arguments that
build the encoder again; `medssl.load_encoder(FOLDER)` opens that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import WeightsError
from medssl.export.bundle_text import weights_licence_text
from medssl.export.manifest import UNKNOWN, Weights, exported_manifest, is_unknown, require_whole
from medssl.export.verify import ExportReport, compare, features, random_image, require_equal, source_encoder
from medssl.weights import card_lines, load_part, save_part, write_atomic

NAME = "model"  # the name that the hub and transformers look for
OWN = "medssl"  # model_type of what transformers does not know
USE = "Research only. Not for diagnostic use."
BLOCK = {  # timm's name within a block -> (ViTModel, Dinov2Model)
    "norm1": ("layernorm_before", "norm1"),
    "attn.proj": ("attention.output.dense", "attention.output.dense"),
    "norm2": ("layernorm_after", "norm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
FIXED = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def write(folder: Path, weights: Weights) -> ExportReport:
    """Write the folder, build the network again from its own `config.json` and compare features.

    Args:
        folder: Existing, empty.
        weights: Of any encoder. A joint encoder goes whole; give `slice_encoder.safetensors` for its slice encoder alone.

    Raises:
        WeightsError: The weights do not fit the encoder that their manifest names, or the reloaded features differ.
    """
    require_whole(weights.manifest, "hf")
    source = source_encoder(weights)
    kind = transformers_kind(source)
    return _write_own(folder, weights, source) if kind is None else _write_transformers(folder, weights, source, kind)


def _write_own(folder: Path, weights: Weights, source: Any) -> ExportReport:
    manifest = exported_manifest(weights.manifest, to="hf", load_into="medssl.load_encoder", use=USE)
    path = save_part(folder, NAME, weights.state, manifest, part=weights.manifest["part"])
    config = own_config(manifest)
    files = _texts(folder, config, manifest, [f'encoder = medssl.load_encoder("{OWN}-folder")'])
    state, _ = load_part(folder)
    require_equal(state, weights.state, path.name)
    again = encoder_of_config(json.loads((folder / "config.json").read_text()), state, weights.manifest["part"])
    return ExportReport(
        files=(path, path.with_suffix(".json"), *files),
        matched=tuple(sorted(state)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare(list(zip(features(again), features(source), strict=True)), "hf"),
        notes=("load with medssl.load_encoder(FOLDER); transformers has no such network",),
    )


def own_config(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config.json` of a network that transformers does not have: enough to build it, and how its images are prepared."""
    facts = {key: manifest[key] for key in ("axis_order", "channels", "patch_size", "spacing_mm", "intensity") if key in manifest}
    return {
        "model_type": OWN,
        "library_name": OWN,
        "library": manifest["library"],
        "encoder": manifest["encoder"]["name"],
        "args": manifest["encoder"]["args"],
        **facts,
        "medssl_version": manifest["export"]["versions"]["medssl"],
        "use": USE,
    }


def encoder_of_config(config: Mapping[str, Any], state: Mapping[str, Tensor], part: str = "encoder") -> Any:
    """Build an encoder from `config.json` alone and fill it; strict but for a decoder, which the file has not."""
    description = {"name": config["encoder"], "args": config["args"]}
    manifest = {"encoder": description, "part": part, "library": config["library"]}
    return source_encoder(Weights(dict(state), manifest))


def transformers_kind(source: Any) -> str | None:
    """Return `vit` or `dinov2` where transformers has exactly the network that the encoder is, else None.

    What counts is everything that would change features: class token and no registers, positions for all tokens, norm before the
    branches, a bias in qkv, no norm of queries and keys, GELU, class token pooled after the last norm; for `dinov2` a square table.
    """
    if not getattr(source, "takes_images", False):
        return None
    from timm.models.vision_transformer import Block, VisionTransformer

    net = source.net
    if type(net) is not VisionTransformer or any(type(block) is not Block for block in net.blocks):
        return None
    plain = (
        net.num_prefix_tokens == 1
        and net.cls_token is not None
        and not net.no_embed_class
        and net.global_pool == "token"
        and net.pos_embed is not None
        and net.patch_embed.proj.bias is not None
        and all(type(module) is nn.Identity for module in (net.norm_pre, net.fc_norm, net.patch_embed.norm))
        and isinstance(net.norm, nn.LayerNorm)
    )
    scaled = {not isinstance(module, nn.Identity) for block in net.blocks for module in (block.ls1, block.ls2)}
    alike = all(_plain_block(block) for block in net.blocks) and len(scaled) == 1
    if not plain or not alike:
        return None
    if not scaled.pop():
        return "vit"
    height, width = net.patch_embed.img_size
    return "dinov2" if height == width else None  # Dinov2Model reads its position table as a square


def _plain_block(block: Any) -> bool:
    absent = (
        block.attn.q_norm,
        block.attn.k_norm,
        getattr(block.attn, "norm", nn.Identity()),
        getattr(block.mlp, "norm", nn.Identity()),
    )
    gelu = isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"
    return gelu and block.attn.qkv.bias is not None and all(type(module) is nn.Identity for module in absent)


def transformers_config(source: Any, kind: str) -> dict[str, Any]:
    """Return `config.json` of transformers for a 2D ViT."""
    net, block = source.net, source.net.blocks[0]
    height, width = net.patch_embed.img_size
    hidden = block.mlp.fc1.out_features
    shared = {
        "model_type": kind,
        "hidden_size": net.embed_dim,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": net.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": net.patch_embed.patch_size[0],
        "num_channels": source.in_channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if kind == "vit":
        return {"architectures": ["ViTModel"], **shared, "intermediate_size": hidden}
    return {
        "architectures": ["Dinov2Model"],
        **shared,
        "mlp_ratio": hidden / net.embed_dim if hidden % net.embed_dim else hidden // net.embed_dim,
        "layerscale_value": 1.0,  # the start of training; the values are in the file
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "use_mask_token": True,
    }


def transformers_state(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return timm's tensors of a ViT under the names of `ViTModel` or `Dinov2Model`; qkv is cut into three.

    Raises:
        WeightsError: A tensor has no place there.
    """
    column = 0 if kind == "vit" else 1
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in FIXED:
            result[FIXED[key]] = value
            continue
        parts = key.split(".")
        if parts[0] != "blocks":
            raise WeightsError(f"export to hf: {key} has no place in transformers' {kind}; export to timm instead")
        inside, leaf = ".".join(parts[2:-1]), parts[-1]
        prefix = f"encoder.layer.{parts[1]}"
        if inside == "attn.qkv":
            for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{prefix}.attention.attention.{name}.{leaf}"] = third.contiguous()
        elif inside in BLOCK:
            result[f"{prefix}.{BLOCK[inside][column]}.{leaf}"] = value
        elif kind == "dinov2" and inside in ("ls1", "ls2") and leaf == "gamma":
            result[f"{prefix}.layer_scale{inside[-1]}.lambda1"] = value
        else:
            raise WeightsError(f"export to hf: {key} has no place in transformers' {kind}; export to timm instead")
    if kind == "dinov2":
        result["embeddings.mask_token"] = torch.zeros(1, result["layernorm.weight"].shape[0])
    return result


def timm_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `transformers_state` was made of."""
    result = {mine: state[theirs] for mine, theirs in FIXED.items()}
    places = {theirs[column]: mine for mine, theirs in BLOCK.items() for column in (0, 1)}
    for key, value in state.items():
        if not key.startswith("encoder.layer."):
            continue
        number, _, inside = key.removeprefix("encoder.layer.").partition(".")
        name, _, leaf = inside.rpartition(".")
        if name == "attention.attention.query":
            three = [state[key.replace(".query.", f".{other}.")] for other in ("query", "key", "value")]
            result[f"blocks.{number}.attn.qkv.{leaf}"] = torch.cat(three)
        elif name in places:
            result[f"blocks.{number}.{places[name]}.{leaf}"] = value
        elif name.startswith("layer_scale"):
            result[f"blocks.{number}.ls{name[-1]}.gamma"] = value
    return result


def _write_transformers(folder: Path, weights: Weights, source: Any, kind: str) -> ExportReport:
    model = {"vit": "ViTModel", "dinov2": "Dinov2Model"}[kind]
    call = f"transformers.{model}.from_pretrained(FOLDER{', add_pooling_layer=False' if kind == 'vit' else ''})"
    manifest = exported_manifest(weights.manifest, to="hf", load_into=call, use=USE)
    path = save_part(folder, NAME, transformers_state(weights.state, kind), manifest)
    config = transformers_config(source, kind)
    files = _texts(folder, config, manifest, [f"network = {call.replace('FOLDER', repr(OWN + '-folder'))}"])
    written, _ = load_part(path)
    again = _from_config(json.loads((folder / "config.json").read_text()), timm_state(written))
    size = again.patch_embed.img_size
    image = random_image(source.in_channels, size)
    with torch.no_grad():
        tokens = again.forward_features(image)
        output = source.forward_features(image)
    pairs = [(tokens[:, 1:], output.tokens), (tokens[:, 0], output.pooled)]
    return ExportReport(
        files=(path, path.with_suffix(".json"), *files),
        matched=tuple(sorted(written)),
        missing=(),
        unexpected=(),
        max_feature_difference=compare(pairs, "hf"),
        notes=(
            f"load with {call}; the class token, pooled here, is last_hidden_state[:, 0]",
            "checked by building timm's network from config.json and turning the names back; transformers itself is not needed here",
            *(["embeddings.mask_token: zeros, which no whole image meets"] if kind == "dinov2" else []),
        ),
    )


def _from_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """Build timm's ViT from a config of transformers alone, and fill it strictly."""
    from timm.models.vision_transformer import VisionTransformer

    hidden = config.get("intermediate_size") or round(config["mlp_ratio"] * config["hidden_size"])
    network = VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        in_chans=config["num_channels"],
        num_classes=0,
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=hidden / config["hidden_size"],
        init_values=1.0 if config["model_type"] == "dinov2" else None,
        norm_layer=_norm(config["layer_norm_eps"]),
    )
    network.load_state_dict(dict(state))
    return network.eval().double()


def _norm(eps: float) -> Callable[..., nn.Module]:
    return lambda width, **_: nn.LayerNorm(width, eps=eps)


def _texts(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], code: list[str]) -> tuple[Path, Path]:
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    write_atomic(folder / "README.md", card_text(manifest, config, code).encode())
    return folder / "config.json", folder / "README.md"


def card_text(manifest: Mapping[str, Any], config: Mapping[str, Any], code: list[str]) -> str:
    """Return the model card: front matter that the hub reads, then what a user must know."""
    import yaml

    licence = manifest.get("licence") or "unknown"
    own = config["model_type"] == OWN
    front = {
        "library_name": OWN if own else "transformers",
        "license": licence.lower() if licence != "unknown" else "unknown",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["medical", *([] if manifest.get("imported") else ["self-supervised"]), *manifest.get("domains", [])],
    }
    facts = {
        "Encoder": f"`{manifest['encoder']['name']}` ({manifest['library']})",
        "Objective": manifest.get("objective") or "not recorded",
        "Channels": manifest["channels"],
        "Axes": f"unknown; medssl shows {manifest['axis_order']}" if is_unknown(manifest, "axis_order") else manifest["axis_order"],
        "Voxel size": UNKNOWN
        if is_unknown(manifest, "spacing_mm")
        else manifest.get("spacing_mm") or "not resampled, or not recorded",
        "Intensities": UNKNOWN if is_unknown(manifest, "intensity") else json.dumps(manifest.get("intensity") or "not recorded"),
    }
    listed = "\n".join(f"- {line}" for line in card_lines(manifest.get("data_cards") or [])) or (
        "- unknown" if is_unknown(manifest, "data_cards") else "- none was recorded"
    )
    title = "Imported encoder" if manifest.get("imported") else "Encoder pretrained without labels"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    load = "\n".join(["import medssl" if own else "import transformers", "", *code])
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n{USE}\n\n"
        f"| | |\n|---|---|\n{rows}\n\nPrepare images as in pretraining: `model.json` holds the whole manifest.\n\n"
        f"```python\n{load}\n```\n\n## Data\n\n{listed}\n\n## Licence\n\n{weights_licence_text(dict(manifest), 'this folder')}"
    )
