"""Any timm image network as a 2D encoder: the network itself inside, so that its weights are those of timm under timm's names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl.encoders.base import Encoder
from medssl.errors import RequestError
from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput, Part

TOKEN_ORDER_2D = "n = h * W + w"
BatchNorm = nn.modules.batchnorm._BatchNorm


def _timm() -> Any:
    from medssl._compat import torchvision_ops

    torchvision_ops.ensure()
    import timm

    return timm


@lru_cache(maxsize=64)
def _skeleton(model: str, in_channels: int, model_args: str) -> nn.Module:
    """The network without storage, to look at its class and sizes.

    Raises:
        RequestError: There is no such network, or this class cannot walk it.
    """
    timm = _timm()
    if not timm.is_model(model):
        close = get_close_matches(model, timm.list_models(), n=3)
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        raise RequestError(f'timm {timm.__version__} has no model "{model}"{hint}; `timm.list_models()` lists them')
    with torch.device("meta"):
        net: Any = timm.create_model(model, pretrained=False, in_chans=in_channels, num_classes=0, **json.loads(model_args))
    if not hasattr(net, "forward_intermediates"):
        raise RequestError(f"timm {timm.__version__} gives no intermediate maps of {model}; choose another model or a newer timm")
    if getattr(net, "head_hidden_size", net.num_features) != net.num_features:
        raise RequestError(
            f"{model} pools {net.num_features} channels and then widens them to {net.head_hidden_size}; accepted are models whose "
            "pooled width is that of their feature map (ResNet, ConvNeXt, ViT, VOLO, ConViT, HaloNet, Swin, EfficientNet ...)"
        )
    return net  # type: ignore[no-any-return]


def _scales(net: Any) -> list[tuple[int, int]]:
    """Channels and stride of every intermediate map."""
    info = net.feature_info if isinstance(net.feature_info, list) else net.feature_info.info
    return [(int(entry["num_chs"]), int(entry["reduction"])) for entry in info]


def _divisor(net: Any) -> int:
    """What sizes must be multiples of: the stride, times the block of halo attention, which takes whole blocks only."""
    from timm.layers.halo_attn import HaloAttn

    block = max((module.block_size for module in net.modules() if isinstance(module, HaloAttn)), default=1)
    return _scales(net)[-1][1] * int(block)


def _ends_in_norm(net: nn.Module) -> bool:
    """Whether a norm follows the last block: such networks normalise at the start of blocks, and their maps are plain sums of residuals."""
    ends = (net, getattr(net, "head", None))
    return any(not isinstance(getattr(end, "norm", nn.Identity()), nn.Identity) for end in ends)


def _units(module: nn.Module) -> list[nn.Module]:
    """Open containers and stages down to residual or transformer blocks."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [unit for child in module for unit in _units(child)]
    inner = getattr(module, "blocks", None)
    if isinstance(inner, nn.Sequential | nn.ModuleList):
        return _units(inner)
    return [module] if any(True for _ in module.parameters()) else []


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norms normalise as before but leave their running statistics alone: for a forward pass that is a repetition."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.num_batches_tracked is not None]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def recomputed(module: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call now, keep only the inputs, and call again in the backward pass without counting twice in batch norms.

    Args:
        module: Holds the batch norms.
        call: What to run.
        args: Its arguments.
        kwargs: Its arguments.
    """
    contexts = partial(_contexts, module)
    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), running_statistics_kept(module)


@contextmanager
def _checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context each block is recomputed in the backward pass; the network that calls the blocks is timm's own code.

    What is replaced is the hook that `nn.Module.compile` uses, so that hooks and a compiled block run inside, as in `Encoder.run`.
    """
    blocks = list(blocks)
    before = [block._compiled_call_impl for block in blocks]
    for block, compiled in zip(blocks, before):
        block._compiled_call_impl = partial(recomputed, block, compiled or block._call_impl)
    try:
        yield
    finally:
        for block, compiled in zip(blocks, before):
            block._compiled_call_impl = compiled


class Image2D(Encoder):
    """A timm network, built without its classifier and never downloaded.

    `pooled` is exactly what the stock network returns with `num_classes=0`: the mean of the last map for ResNet, HaloNet; its norm for
    ConvNeXt; the class token for ViT, VOLO and ConViT (`model_args: {global_pool: avg}` gives the mean where timm offers it).

    Args:
        model: timm name, for instance `resnet18`, `vit_small_patch16_224`, `convnext_tiny`, `volo_d1_224`, `convit_small`, `halonet26t`.
        in_channels: Image channels; grey is 1, nothing is tripled.
        image_size: Size (H, W), or one number for both. Only networks with a position table need it (None: timm's own size). ViT and
            its kin resize their table to every view; VOLO, ConViT and Swin accept views of this size alone.
        model_args: Further arguments of the timm constructor, for instance `drop_path_rate`, or `norm_layer: groupnorm` of a ResNet.
        norm: `batch` leaves batch norms as they are; `frozen` lets them use their running statistics in training too, which makes a
            result independent of what else is in the batch or chunk (for weights that come with statistics).

    Raises:
        RequestError: timm has no such network.

    Reference:
        Wightman, PyTorch Image Models (timm) 1.0, Apache-2.0.
    """

    name = "image2d"
    library = "timm"
    axis_order = "HW"
    key_groups = {"encoder": [""], "slice_encoder": [""]}  # noqa: RUF012
    takes_images = True

    def __init__(
        self,
        *,
        model: str = "resnet18",
        in_channels: int = 1,
        image_size: int | Sequence[int] | None = None,
        model_args: Mapping[str, Any] | None = None,
        norm: Literal["batch", "frozen"] = "batch",
    ) -> None:
        size = None if image_size is None else [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        plain = json.dumps(dict(model_args or {}), sort_keys=True)
        super().__init__(model=model, in_channels=in_channels, image_size=size, model_args=json.loads(plain), norm=norm)
        if norm not in ("batch", "frozen"):
            raise RequestError(f'image2d.norm is "{norm}"; accepted: batch, frozen (another kind of norm: model_args.norm_layer)')
        skeleton: Any = _skeleton(model, in_channels, plain)
        extra: dict[str, Any] = {}
        self.only_size: tuple[int, int] | None = None
        if skeleton.pretrained_cfg.get("fixed_input_size", False):
            extra["img_size"] = tuple(size or skeleton.pretrained_cfg["input_size"][1:])
            if "dynamic_img_size" in inspect.signature(type(skeleton).__init__).parameters:
                extra["dynamic_img_size"] = True
            else:
                self.only_size = extra["img_size"]
        self.in_channels = in_channels
        self.patch_size = (_scales(skeleton)[-1][1],) * 2
        self.multiple = (_divisor(skeleton),) * 2
        self.embed_dim = int(skeleton.num_features)
        self.frozen_norm = norm == "frozen"
        if self.only_size is not None:
            self._check_only_size(type(skeleton).__name__)
        extra.update(json.loads(plain))
        self.net: Any = _timm().create_model(model, pretrained=False, in_chans=in_channels, num_classes=0, **extra)
        self.normalised_maps = not _ends_in_norm(self.net)
        self._lower = self._lower_stages()
        self._live_norms = norm == "batch" and any(isinstance(module, BatchNorm) for module in self.net.modules())
        self.train()

    def _check_only_size(self, kind: str) -> None:
        height, width = self.only_size or (0, 0)
        if kind == "ConVit" and height != width:
            raise RequestError(f"image2d: ConViT takes square images only, image_size is {height}x{width}; crop to a square")
        self.check_size((height, width))

    def _lower_stages(self) -> dict[int, int]:
        """Index -> channels of the last map at each stride from 4 on, without the coarsest."""
        scales = _scales(self.net)
        last_at = {stride: index for index, (_, stride) in enumerate(scales)}
        return {index: scales[index][0] for stride, index in last_at.items() if 4 <= stride < scales[-1][1]}

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """The stride of the last map (times the block size of a HaloNet)."""
        model_args = json.dumps(dict(args.get("model_args") or {}), sort_keys=True)
        return (_divisor(_skeleton(args.get("model", "resnet18"), args.get("in_channels", 1), model_args)),) * 2

    def check_size(self, size: Iterable[int]) -> None:
        """Raise unless the network takes images of this size."""
        size = tuple(size)
        model = self._args["model"]
        if self.only_size is not None and size != self.only_size:
            raise ValueError(
                f"image2d: {model} was built for images of {self.only_size} and cannot resize its position table; found {size}; "
                "make views of that size, or build it with another image_size"
            )
        if len(size) != 2 or any(n % m or n < m for n, m in zip(size, self.multiple)):
            raise ValueError(f"image2d: image size {size} is not a multiple of {self.multiple} ({model}); crop or pad the image")

    def part(self, group: str) -> Part:
        """Describe the network for the run's `weights/` folder; `model` is its timm name."""
        part = super().part(group)
        part.manifest |= {"token_order": TOKEN_ORDER_2D, "model": self._args["model"]}
        return part

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual or transformer blocks."""
        places = ("layer1", "layer2", "layer3", "layer4", "features", "network", "blocks", "stages", "layers")
        found = [unit for place in places if hasattr(self.net, place) for unit in _units(getattr(self.net, place))]
        return found or [self.net]

    def train(self, mode: bool = True) -> Image2D:
        """Set training mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
        """Encode images.

        Args:
            x: (B, C, H, W).
            keep: Not supported: timm's networks see whole images.

        Returns:
            Patch tokens (B, N, E) of the last map, without class and register tokens; the stock network's pooled vector (B, E); and
            the maps (B, C_i, H_i, W_i) of all stages, or of all blocks of a ViT, as `pyramid`.
        """
        if keep is not None:
            raise ValueError("image2d cannot drop tokens: hide patches in the image instead")
        self._check(x)
        on = self.checkpoint_blocks and torch.is_grad_enabled()
        with _checkpointed(self.blocks) if on else nullcontext():
            final, maps = self.net.forward_intermediates(x)
        grid = tuple(n // p for n, p in zip(x.shape[2:], self.patch_size))
        return EncoderOutput(tokens=self._patch_tokens(final, grid), grid=grid, pooled=self._pool(final), pyramid=tuple(maps))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"image2d takes images (B, {self.in_channels}, H, W); found {tuple(x.shape)}; convert the images to "
                f"{self.in_channels} channel(s), or give images of another channel count an encoder of their own (in_channels)"
            )
        self.check_size(x.shape[2:])
        if self.training and self._live_norms and len(x) == 1 and tuple(x.shape[2:]) == self.patch_size:
            raise ValueError(
                f"image2d: one image of {tuple(x.shape[2:])} leaves batch norm a single value per channel to train on; give more images "
                "or slices per step, larger images, or choose norm: frozen or a network with another norm"
            )

    def _patch_tokens(self, final: Tensor, grid: tuple[int, ...]) -> Tensor:
        if final.ndim == 3:
            return final[:, final.shape[1] - grid[0] * grid[1] :]
        return flatten_tokens(final.permute(0, 3, 1, 2) if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else final)

    def _pool(self, final: Tensor) -> Tensor:
        return self.net.forward_head(final, pre_logits=True)  # type: ignore[no-any-return]

    def width(self, pool: str) -> int:
        """Channels of `embed(x, pool)`."""
        return self.embed_dim if pool == "last" else self.embed_dim + sum(self._lower.values())

    def embed(self, x: Tensor, pool: Literal["last", "stages"] = "last") -> Tensor:
        """Return one vector per image.

        Args:
            x: (B, C, H, W).
            pool: `last` is `pooled`; `stages` joins the means of the last map at each stride from 4 on, coarsest replaced by `pooled`,
                each of length 1: 256 + 512 + 1024 + 2048 = 3840 channels for a ResNet-50.

        Returns:
            (B, width(pool)).

        Reference:
            Nguyen et al. 2023, released slice encoder, which holds the coarsest stage twice (5888 channels).
        """
        output = self.forward_features(x)
        if pool == "last":
            return output.pooled
        stages = [output.pyramid[index].mean(dim=(2, 3)) for index in self._lower] + [output.pooled]
        # a constant slice may leave a stage all zero: 1e-6 keeps the gradient there finite in half precision as well
        return torch.cat([nn.functional.normalize(stage.float(), dim=1, eps=1e-6) for stage in stages], dim=1).to(
            output.pooled.dtype
        )
