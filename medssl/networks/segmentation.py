"""Segmentation networks around an encoder (stock MONAI, and nnU-Net's form), and the strict loading of pretrained weights into them.

Loading knows `pyramid_segmentation.py` and `flexible_unet.py` as well; a further network is one entry of `PLANS`.

Nothing is loaded partially in silence: every encoder tensor of the network must be in the file under its own name and
with its own shape. The one adaptation is a learned position table, which is resized trilinearly when the crop of the
task differs from that of the pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from medssl.encoders.resenc3d import LIBRARY as RESENC
from medssl.encoders.resenc3d import STEM_CONVOLUTION, ResEnc3D, build_network
from medssl.encoders.stem import adapt_stem
from medssl.errors import RequestError, WeightsError
from medssl.layers.pos_embed import resize_positions
from medssl.networks.pyramid_segmentation import PyramidSegmenter

UNETR_PATCH = 16  # both are fixed inside MONAI's UNETR
UNETR_LAYERS = 12
SWIN_STRIDE = 32
SWIN_DECODER = ("encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10.", *(f"decoder{n}." for n in range(1, 6)))
POSITIONS = "patch_embedding.position_embeddings"
FLEXIBLE_HEAD = "segmentation_head."  # its last convolution is 3x3, those of the other networks are 1x1
RESENC_DECODER = ("decoder.stages.", "decoder.transpconvs.")
FITS = {  # encoder: network
    "vit3d": "unetr",
    "segresnet3d": "segresnet",
    "swin3d": "swin_unetr",
    "resenc3d": "resenc_unet",
    "image2d": "flexible_unet",
}
LIBRARIES = {
    "monai.ViT": "unetr",
    "monai.SegResNet": "segresnet",
    "monai.SwinUNETR": "swin_unetr",
    RESENC: "resenc_unet",
    "timm": "flexible_unet or pyramid",
}
STEMS = (  # the last two are those of most networks of timm
    "patch_embedding.patch_embeddings.weight",
    "convInit.conv.weight",
    "swinViT.patch_embed.proj.weight",
    STEM_CONVOLUTION,
    "conv1.weight",
    "patch_embed.proj.weight",
)
SWIN_INPUTS = (
    "encoder1.layer.conv1.conv.weight",
    "encoder1.layer.conv3.conv.weight",
)  # a SwinUNETR's decoder sees the image as well
UNUSED = "norm_cross_attn"  # in every MONAI ViT block since 1.4, on no path without cross attention; older files lack it

Network: TypeAlias = nn.Module


@dataclass(frozen=True)
class Plan:
    """Where a network has what can be pretrained, and whose names it has there.

    Args:
        weights: Library of the weights that fit, as manifests name it.
        encoder: Prefixes of the keys of the encoder in the network.
        prefix: What the network puts before the keys of the weights.
        decoder: Prefixes of the keys of the decoder; empty where none is transferred.
        library: The class of the network; empty where it is called as its weights are.
    """

    weights: str
    encoder: tuple[str, ...]
    prefix: str = ""
    decoder: tuple[str, ...] = ()
    library: str = ""


PLANS = {  # by class; a `PyramidSegmenter` has the plan of its encoder
    "UNETR": Plan("monai.ViT", ("vit.",), prefix="vit."),
    "SegResNet": Plan("monai.SegResNet", ("convInit.", "down_layers."), decoder=("up_samples.", "up_layers.")),
    "SwinUNETR": Plan("monai.SwinUNETR", ("swinViT.",), decoder=SWIN_DECODER),
    "ResidualEncoderUNet": Plan(RESENC, ("encoder.",), decoder=RESENC_DECODER),
    "FlexibleUNet": Plan("timm", ("encoder.",), prefix="encoder.", library="monai.FlexibleUNet"),
}


@dataclass(frozen=True)
class LoadReport:
    """How a pretrained part met the network.

    Args:
        matched: Tensors of the network that were filled from the weights.
        missing: Encoder tensors of the network that the weights lack; only parameters that no path uses may be.
        unexpected: Tensors of the weights that the network does not know; always 0 after a successful load.
        resized: Position tables that were interpolated to the crop of the task (counted in `matched` too).
        fresh: Tensors that keep their random start: head, and the decoder where none was given.
    """

    matched: int
    missing: int
    unexpected: int
    resized: int
    fresh: int


def build_unetr(
    *,
    encoder: Mapping[str, Any],
    out_channels: int,
    image_size: Sequence[int],
    feature_size: int = 16,
    norm_name: str = "instance",
    dropout_rate: float = 0.0,
) -> Network:
    """Build MONAI's UNETR around the ViT that an encoder manifest describes.

    Args:
        encoder: `{"name": "vit3d", "args": {...}}`; patch size 16 and 12 layers, which UNETR fixes.
        out_channels: Classes including background.
        image_size: Crop (X, Y, Z) in voxels, multiples of 16. It may differ from the crop of the pretraining.
        feature_size: Filters of the finest decoder scale.
        norm_name: Normalisation of the decoder.
        dropout_rate: Between 0 and 1.

    Raises:
        RequestError: The encoder cannot sit in a UNETR, or the crop does not divide.

    Reference:
        Hatamizadeh et al. 2022, "UNETR: Transformers for 3D Medical Image Segmentation"; MONAI 1.6
        `networks/nets/unetr.py`.
    """
    from monai.networks.nets import UNETR

    args = encoder_args(encoder, "vit3d", "unetr")
    patch = args.get("patch_size", UNETR_PATCH)
    patch = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    layers = int(args.get("num_layers", UNETR_LAYERS))
    if patch != (UNETR_PATCH,) * 3 or layers != UNETR_LAYERS:
        raise RequestError(
            f"network unetr: the encoder has patch size {'x'.join(map(str, patch))} and {layers} layers; MONAI's "
            f"UNETR is fixed to patch size {UNETR_PATCH} and {UNETR_LAYERS} layers; pretrain a vit3d of that form, or "
            "fine-tune a segresnet"
        )
    size = check_crop("unetr", image_size, UNETR_PATCH)
    hidden = int(args.get("hidden_size", 768))
    network: Any = UNETR(
        in_channels=int(args.get("in_channels", 1)),
        out_channels=out_channels,
        img_size=size,
        feature_size=feature_size,
        hidden_size=hidden,
        mlp_dim=int(args.get("mlp_dim") or 4 * hidden),
        num_heads=int(args.get("num_heads", 12)),
        proj_type="conv",
        norm_name=norm_name,
        res_block=True,
        dropout_rate=dropout_rate,
        spatial_dims=3,
    )
    for block in network.vit.blocks:
        for parameter in block.norm_cross_attn.parameters():
            parameter.requires_grad_(False)
        block.attn.use_flash_attention = True  # torch's fused attention: same parameters, same result up to rounding
    return network  # type: ignore[no-any-return]


def build_segresnet(
    *,
    encoder: Mapping[str, Any],
    out_channels: int,
    image_size: Sequence[int] | None = None,
    dropout_prob: float | None = None,
) -> Network:
    """Build MONAI's SegResNet with the encoder that a manifest describes.

    Args:
        encoder: `{"name": "segresnet3d", "args": {...}}`.
        out_channels: Classes including background.
        image_size: Crop (X, Y, Z) in voxels, checked against the strides; None skips the check (any size runs).
        dropout_prob: Dropout after the first convolution; None has none.

    Raises:
        RequestError: The encoder is another one, or the crop does not divide.

    Reference:
        Myronenko 2018, "3D MRI brain tumor segmentation using autoencoder regularization"; MONAI 1.6
        `networks/nets/segresnet.py`.
    """
    from monai.networks.nets import SegResNet

    args = encoder_args(encoder, "segresnet3d", "segresnet")
    blocks_down = tuple(args.get("blocks_down", (1, 2, 2, 4)))
    if image_size is not None:
        check_crop("segresnet", image_size, 2 ** (len(blocks_down) - 1))
    network: Network = SegResNet(
        spatial_dims=3,
        init_filters=int(args.get("init_filters", 16)),
        in_channels=int(args.get("in_channels", 1)),
        out_channels=out_channels,
        blocks_down=blocks_down,
        blocks_up=tuple(args.get("blocks_up", (1, 1, 1))),
        dropout_prob=dropout_prob,
    )
    return network


def build_swin_unetr(
    *,
    encoder: Mapping[str, Any],
    out_channels: int,
    image_size: Sequence[int] | None = None,
    norm_name: str = "instance",
    drop_rate: float = 0.0,
    drop_path: float = 0.0,
) -> Network:
    """Build MONAI's SwinUNETR with the encoder that a manifest describes.

    Args:
        encoder: `{"name": "swin3d", "args": {...}}`.
        out_channels: Classes including background.
        image_size: Crop (X, Y, Z) in voxels, multiples of 32 and not 32 on every axis; None skips the check.
        norm_name: Normalisation of the decoder.
        drop_rate: Dropout of the encoder, between 0 and 1.
        drop_path: Largest rate of stochastic depth while fine-tuning; that of the pretraining is not taken over.

    Raises:
        RequestError: The encoder is another one, or the crop does not divide.

    Reference:
        Hatamizadeh et al. 2022, "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images"; MONAI 1.6
        `networks/nets/swin_unetr.py`.
    """
    from monai.networks.nets import SwinUNETR

    args = encoder_args(encoder, "swin3d", "swin_unetr")
    if image_size is not None and check_crop("swin_unetr", image_size, SWIN_STRIDE) == (SWIN_STRIDE,) * 3:
        raise RequestError(
            f"network swin_unetr: crop 32x32x32 voxels leaves one cell at stride {SWIN_STRIDE}, over which the decoder's instance norm is "
            "undefined; use 64 voxels or more along an axis"
        )
    window = args.get("window_size", 7)
    network: Network = SwinUNETR(
        in_channels=int(args.get("in_channels", 1)),
        out_channels=out_channels,
        feature_size=int(args.get("feature_size", 48)),
        depths=tuple(args.get("depths", (2, 2, 2, 2))),
        num_heads=tuple(args.get("num_heads", (3, 6, 12, 24))),
        window_size=(window,) * 3 if isinstance(window, int) else tuple(window),
        norm_name=norm_name,
        drop_rate=drop_rate,
        dropout_path_rate=drop_path,
        spatial_dims=3,
    )
    return network


def build_resenc_unet(
    *,
    encoder: Mapping[str, Any],
    out_channels: int,
    image_size: Sequence[int] | None = None,
) -> Network:
    """Build nnU-Net's residual-encoder U-Net, under nnU-Net's names, with the encoder that a manifest describes.

    Only the finest of its last convolutions is used: those of the coarser scales serve nnU-Net's deep supervision, and exist so that the
    names are complete.

    Args:
        encoder: `{"name": "resenc3d", "args": {...}}`.
        out_channels: Classes including background.
        image_size: Crop (X, Y, Z) in voxels, checked against the strides; None skips the check.

    Raises:
        RequestError: The encoder is another one, or the crop does not divide.

    Reference:
        Isensee et al. 2024, "nnU-Net Revisited" (arXiv 2404.09556), presets ResEnc M, L, XL.
    """
    args = encoder_args(encoder, "resenc3d", "resenc_unet")
    if image_size is not None:
        divisor = ResEnc3D.divisor(args)
        if check_crop("resenc_unet", image_size, divisor) == divisor:
            raise RequestError(
                f"network resenc_unet: crop {'x'.join(map(str, image_size))} voxels leaves one cell at the coarsest scale, over which "
                f"instance norm is undefined; use {2 * divisor[0]} voxels or more along an axis"
            )
    network = build_network(args, out_channels)
    for layer in network.decoder.seg_layers[:-1]:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    return network


def encoder_args(encoder: Mapping[str, Any], wanted: str, network: str) -> dict[str, Any]:
    """Return the encoder's arguments after checking that it is the one this network is built around."""
    name = encoder.get("name")
    if name != wanted:
        fits = FITS.get(str(name))
        advice = f'choose network "{fits}"' if fits else f"choose an encoder {wanted}"
        raise RequestError(f'network {network}: the encoder is "{name}"; it is built around {wanted}; {advice}')
    return dict(encoder.get("args", {}))


def check_crop(network: str, image_size: Sequence[int], divisor: int | Sequence[int]) -> tuple[int, int, int]:
    """Return the crop as a tuple of three, or say which multiple is needed, of every axis or of each."""
    size = tuple(int(n) for n in image_size)
    divisors = (divisor,) * 3 if isinstance(divisor, int) else tuple(divisor)
    if len(size) != 3:
        raise RequestError(f"network {network}: the crop {list(size)} has {len(size)} axes; it segments volumes: give [X, Y, Z]")
    if any(n < d or n % d for n, d in zip(size, divisors)):
        nearest = "x".join(str(max(d, -(-n // d) * d)) for n, d in zip(size, divisors))
        needed = str(divisors[0]) if len(set(divisors)) == 1 else "x".join(map(str, divisors))
        raise RequestError(
            f"network {network}: crop {'x'.join(map(str, size))} voxels; every axis must be a multiple of {needed}; use {nearest}"
        )
    return size[0], size[1], size[2]


def load_pretrained(
    network: Network,
    state: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    *,
    decoder_state: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Fill the encoder of a network, and optionally the decoder of a SegResNet, SwinUNETR or residual-encoder U-Net, with pretrained tensors.

    Nothing of the network is changed unless everything fits.

    Args:
        network: Result of one of the builders here.
        state: Encoder tensors under the stock network's own keys. Keys of the manifest's other key groups are ignored.
        manifest: Manifest of the weights: `library`, `key_groups`, `image_size` and `patch_size` for position tables.
        decoder_state: Decoder tensors of a SegResNet (`up_samples.*`, `up_layers.*`), SwinUNETR (`encoder1.*` to `decoder5.*`) or
            residual-encoder U-Net (`decoder.stages.*`, `decoder.transpconvs.*`); None leaves the decoder as it is.

    Raises:
        WeightsError: Another kind of network, other input channels, or any name or shape that does not match.
    """
    plan = _plan(network)
    found = manifest.get("library", plan.weights)
    if found != plan.weights:
        name = dict(manifest.get("encoder", {})).get("name", found)
        fits = LIBRARIES.get(str(found), "the one they were made for")
        raise WeightsError(f"the weights are of {found} (encoder {name}); this network needs {plan.weights}; choose network {fits}")
    own = network.state_dict()
    wanted = encoder_tensors(network)
    given = _of_the_encoder(state, dict(manifest.get("key_groups", {})))
    _check_channels(given, own, wanted)
    given, resized = _fit_positions(given, own, wanted, manifest, _table_grid(network))
    filled, missing = _match("encoder", given, own, wanted)
    if decoder_state is not None:
        if not plan.decoder:
            raise WeightsError(
                "decoder weights were given, but only a SegResNet or SwinUNETR takes a pretrained decoder, or a "
                f"ResidualEncoderUNet, this is a {type(network).__name__}; transfer the encoder alone"
            )
        part, _ = _match("decoder", decoder_state, own, {key: key for key in own if key.startswith(plan.decoder)})
        filled.update(part)
    network.load_state_dict(filled, strict=False)
    return LoadReport(
        matched=len(filled),
        missing=missing,
        unexpected=0,
        resized=resized,
        fresh=len(own) - len(filled) - missing,
    )


def adapt_inputs(
    state: Mapping[str, Tensor], decoder_state: Mapping[str, Tensor] | None, channels: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, list[str]]:
    """Spread weights of one input channel over several, wherever they meet the image: the stem, and the decoder of a SwinUNETR.

    Args:
        state: Encoder tensors of a network of volumes.
        decoder_state: Decoder tensors, or None.
        channels: Wanted.

    Returns:
        Both, and a sentence for each tensor that changed.

    Raises:
        WeightsError: The weights take several channels, and others than are wanted, or their input convolution is not known.
    """
    stem = next((key for key in STEMS if key in state and state[key].ndim == 5), None)
    if stem is None:
        raise WeightsError(
            f"the weights have no input convolution of a known name, so they cannot be spread over {channels} channels; pretrain with "
            f"in_channels {channels}"
        )
    if (found := state[stem].shape[1]) not in (1, channels):
        raise WeightsError(
            f"the weights take {found} input channels, the images have {channels}; only weights of one channel are spread over several: give "
            f"images of {found} channels, or weights of 1 or {channels}"
        )
    notes: list[str] = []
    given, decoder = dict(state), None if decoder_state is None else dict(decoder_state)
    for tensors, said in ((given, decoder is None), (decoder or {}, True)):
        for key in (stem, *SWIN_INPUTS):
            if key in tensors:
                changed, more = adapt_stem(tensors, key, channels)
                tensors.update(changed)
                notes += more if said or key == stem else []
    return given, decoder, notes


def set_head_prior(network: Network, frequencies: Sequence[float]) -> None:
    """Start the last convolution so that an untrained network predicts how frequent each class is.

    With equal start logits the first steps push the rare classes down, through head weights that act on few
    non-negative features (8 in a SegResNet of 8 filters, after its last ReLU). Measured on hippocampus: one seed in
    five ended with all weights of a structure negative and its features at zero, where a ReLU passes no gradient, and
    never predicted it again. With the bias at the log frequency there is nothing to push down, and that seed learns
    both structures.

    Args:
        network: Result of one of the builders here.
        frequencies: One share of voxels per class, background first; shares under 1e-4 count as 1e-4.

    Reference:
        Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4.1, for one rare class.
    """
    convolutions = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    heads = [module for name, module in convolutions if set(module.kernel_size) == {1} or name.startswith(FLEXIBLE_HEAD)]
    fitting = [module for module in heads if module.out_channels == len(frequencies)]
    if not fitting or fitting[-1].bias is None:
        raise RequestError(
            f"head prior: no last 1x1 convolution with {len(frequencies)} outputs and a bias in this {type(network).__name__}; "
            "switch head_prior off"
        )
    values = torch.tensor([max(float(f), 1e-4) for f in frequencies], dtype=torch.float64).log()
    with torch.no_grad():
        fitting[-1].bias.copy_(values)


def encoder_tensors(network: Network) -> dict[str, str]:
    """Return the names that the tensors of the pretrainable encoder have in its weights, and in the network."""
    plan = _plan(network)
    return {key.removeprefix(plan.prefix): key for key in network.state_dict() if key.startswith(plan.encoder)}


def encoder_parameters(network: Network) -> set[str]:
    """Return the names of the parameters that belong to the pretrainable encoder."""
    keys = _plan(network).encoder
    return {name for name, _ in network.named_parameters() if name.startswith(keys)}


def library_of(network: Network) -> str:
    """Return the class that a network is, or whose names it has, as manifests name it."""
    plan = _plan(network)
    return plan.library or plan.weights


def _plan(network: Network) -> Plan:
    """Return where a network has its encoder."""
    if isinstance(network, PyramidSegmenter):
        encoder: Any = network.encoder
        prefix = "pyramid.encoder.net."
        groups = tuple(prefix + group for group in encoder.key_groups["encoder"])
        return Plan(encoder.library, groups, prefix=prefix, library=network.library)
    kind = type(network).__name__
    if kind not in PLANS:
        raise WeightsError(
            f"pretrained weights for a {kind}: only {', '.join(PLANS)} and PyramidSegmenter are known; build one of these"
        )
    return PLANS[kind]


def _of_the_encoder(state: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the tensors but those of the other key groups, as of a decoder."""
    own = tuple(groups.get("encoder", ()))
    other = tuple(key for group, keys in groups.items() if group != "encoder" for key in keys)
    return {key: tensor for key, tensor in state.items() if key.startswith(own) or not key.startswith(other)}


def _check_channels(given: Mapping[str, Tensor], own: Mapping[str, Tensor], wanted: Mapping[str, str]) -> None:
    for key in STEMS:
        if key in wanted and key in given and given[key].ndim == own[wanted[key]].ndim:
            have, need = given[key].shape[1], own[wanted[key]].shape[1]
            if have != need:
                raise WeightsError(
                    f"the weights take {have} input channel(s), the network has {need}; channels are not adapted; "
                    f"give images of {have} channel(s), or pretrain with {need}"
                )


def _table_grid(network: Network) -> tuple[int, ...]:
    """Return the token grid that the position table of a network is made for: a UNETR's own, or that of the encoder inside."""
    inside = getattr(network, "encoder", None)
    return tuple(getattr(network, "feat_size", getattr(inside, "table_grid", ())))


def _fit_positions(
    given: dict[str, Tensor],
    own: Mapping[str, Tensor],
    wanted: Mapping[str, str],
    manifest: Mapping[str, Any],
    new_grid: tuple[int, ...],
) -> tuple[dict[str, Tensor], int]:
    """Resize a learned position table to the network's token grid, in the token order of `medssl.layers.tokens`."""
    if POSITIONS not in given or POSITIONS not in wanted:
        return given, 0
    table, target = given[POSITIONS], own[wanted[POSITIONS]]
    args = dict(dict(manifest.get("encoder", {})).get("args", {}))
    size = manifest.get("image_size") or args.get("image_size")
    patch = manifest.get("patch_size") or args.get("patch_size", UNETR_PATCH)
    patch = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    if size is None:
        if table.shape == target.shape:
            return given, 0
        raise WeightsError(
            f"the position table has {table.shape[1]} tokens, the network {target.shape[1]}, and the manifest has no "
            "image_size to say how they lie; save the weights again with this medssl"
        )
    old_grid = tuple(int(n) // int(p) for n, p in zip(size, patch))
    if prod(old_grid) != table.shape[1] or table.shape[2] != target.shape[2]:
        return given, 0  # a shape error that `_match` reports by name
    if old_grid == new_grid:
        return given, 0
    return {**given, POSITIONS: resize_positions(table, old_grid, new_grid)}, 1


def _match(
    part: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor], wanted: Mapping[str, str]
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors under the network's names and the number of unused ones that are absent; else fail."""
    absent = [key for key in wanted if key not in given]
    missing = [key for key in absent if UNUSED not in key]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[name].shape)}"
        for key, name in wanted.items()
        if key in given and given[key].shape != own[name].shape
    ]
    faults = [
        f"{len(keys)} {kind} ({_few(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise WeightsError(
            f"{part} weights do not fit the network: {'; '.join(faults)}; every tensor must match by name and shape; "
            "build the network from the arguments in the manifest of these weights"
        )
    return {name: given[key] for key, name in wanted.items() if key in given}, len(absent)


def _few(keys: Sequence[str], count: int = 3) -> str:
    more = f", and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
