"""A 2D encoder on every slice, attention over the slices, one embedding of the volume; an image is a volume of one slice.

Volumes (B, C, X, Y, Z), clips (B, T, C, H, W) and images (B, C, H, W) all become stacks (B, N, C, H, W). Slices of a volume are turned
as in pretraining, the way a radiologist looks at them: rows of an axial slice (slice_axis 2) run from anterior to posterior, columns from
the patient's right to left. A clip is a stack in time.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl.encoders.base import Encoder
from medssl.encoders.image2d import TOKEN_ORDER_2D, Image2D, recomputed, running_statistics_kept
from medssl.errors import RequestError, near
from medssl.layers.deformable import SliceAggregator
from medssl.layers.planes import slices_of
from medssl.types import EncoderOutput, Kind, Part, Stack


def as_stacks(x: Tensor, kind: Kind = "volume", slice_axis: int | None = 2) -> Tensor:
    """View volumes, clips or images as stacks of images; only volumes are copied, since their slices are turned.

    Args:
        x: Volumes (B, C, X, Y, Z), clips (B, T, C, H, W) or images (B, C, H, W).
        kind: Which of them; four axes are always images.
        slice_axis: Of volumes: 0, 1 or 2 for X, Y or Z (`meta.slice_axis`); None, unknown, is taken as Z.

    Returns:
        (B, N, C, H, W).
    """
    if x.ndim == 4:
        return x[:, None]
    if x.ndim != 5 or kind == "image":
        raise ValueError(
            f"{kind} of shape {tuple(x.shape)}; accepted: (B, C, X, Y, Z) volumes, (B, T, C, H, W) clips, (B, C, H, W) images"
        )
    if kind == "clip":
        return x
    axis = 2 if slice_axis is None else slice_axis
    if axis not in (0, 1, 2):
        raise ValueError(f"slice_axis is {slice_axis}; accepted: 0, 1, 2 (X, Y, Z) or None")
    return slices_of(x, axis)


def pad_stacks(stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join stacks of different length.

    Args:
        stacks: Each (N_i, C, H, W), alike but for N_i.

    Returns:
        (B, N, C, H, W) padded with zeros, and `valid` (B, N) bool.

    Raises:
        ValueError: The stacks differ in channels or image size.
    """
    shapes = {tuple(stack.shape[1:]) for stack in stacks}
    if len(shapes) != 1:
        what = "channel counts" if len({shape[0] for shape in shapes}) > 1 else "image sizes"
        found = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(
            f"stacks of mixed {what} in one batch: (C, H, W) is {found}; a batch needs one: convert the images, or make each a source of its own"
        )
    length = max(len(stack) for stack in stacks)
    padded = torch.stack([nn.functional.pad(stack, (0, 0) * 3 + (0, length - len(stack))) for stack in stacks])
    counts = torch.tensor([len(stack) for stack in stacks], device=padded.device)
    return padded, torch.arange(length, device=padded.device) < counts[:, None]


def _nested(path: str, target: type, args: Mapping[str, Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Return nested arguments, unknown ones refused."""
    known = [name for name in inspect.signature(target).parameters if name not in given]
    for key in args:
        if key not in known:
            raise RequestError(f"{path}.{key}: unknown key{near(key, known)}; known: {', '.join(known)}")
    return dict(json.loads(json.dumps(dict(args))))  # as the manifest will hold it


class SliceVolumeEncoder(Encoder):
    """`slice_encoder` per slice, `projection` to the width of the stack, `aggregator` over the slices.

    Only valid slices are embedded, `chunk` at a time. As soon as there are more than one chunk, each is recomputed in the backward pass,
    so that training memory is that of one chunk, however long the stacks. Batch norm in training mode then takes its statistics over a
    chunk; chunk k of K holds slices k, k + K, k + 2K ... of the batch, so that each sees all stacks at all heights and its statistics
    stay near those of the whole batch. Running statistics move once per chunk, not again in the recomputation. What shall not depend on
    the chunk at all takes group norm (`slice_encoder: {model_args: {norm_layer: groupnorm}}`), a network without batch norm, or
    `slice_encoder: {norm: frozen}`.

    Where blocks are sharded over processes (FSDP), each process calls them as often as if all slices were valid, with blank slices in the
    end: processes whose stacks differ in length would wait for each other otherwise.

    Args:
        slice_encoder: Arguments of `Image2D`.
        aggregator: Arguments of `SliceAggregator` but for `dim`.
        in_channels: Image channels.
        dim: Width of slice tokens and volume embedding.
        pool: What is taken from the slice encoder: `last`, its pooled vector, or `stages`, the L2-normalised means of all stages.
        chunk: Slices that are embedded together (two or three where it is 1).

    Reference:
        Nguyen et al. 2023 (arXiv 2212.01893); sizes of the card: ResNet-50, `pool="stages"` (3840), dim 640, 4 layers.
    """

    name = "slice_volume"
    library = "medssl.SliceVolumeEncoder"
    axis_order = "slices of XYZ-RAS"
    key_groups = {"encoder": [""], "joint": [""]}  # noqa: RUF012
    takes_stacks = True

    def __init__(
        self,
        *,
        slice_encoder: Mapping[str, Any] | None = None,
        aggregator: Mapping[str, Any] | None = None,
        in_channels: int = 1,
        dim: int = 640,
        pool: Literal["last", "stages"] = "last",
        chunk: int = 16,
    ) -> None:
        own = _nested("slice_volume.slice_encoder", Image2D, slice_encoder or {}, given=("in_channels",))
        over = _nested("slice_volume.aggregator", SliceAggregator, aggregator or {}, given=("dim",))
        if pool not in ("last", "stages"):
            raise RequestError(f'slice_volume.pool is "{pool}"; accepted: last, stages')
        if chunk < 1:
            raise RequestError(f"slice_volume.chunk is {chunk}; accepted: 1 or more slices")
        super().__init__(slice_encoder=own, aggregator=over, in_channels=in_channels, dim=dim, pool=pool, chunk=chunk)
        self.slice_encoder = Image2D(in_channels=in_channels, **own)
        self.projection = nn.Linear(self.slice_encoder.width(pool), dim)
        self.aggregator = SliceAggregator(dim, **over)
        self.pool: Literal["last", "stages"] = pool
        self.chunk = chunk
        self.in_channels = in_channels
        self.embed_dim = dim
        self.patch_size = (*self.slice_encoder.multiple, 1)

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """This module: there is no stock network for the whole, and `joint` is saved under the names used here."""
        return self

    @property
    def checkpoint_blocks(self) -> bool:
        """Recompute the blocks of the slice encoder too, within a chunk."""
        return self.slice_encoder.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, on: bool) -> None:
        if hasattr(self, "slice_encoder"):  # the base class sets it before there is one
            self.slice_encoder.checkpoint_blocks = on

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """That of the slice encoder in the slice, any number of slices (volumes with slices along Z)."""
        return (*Image2D.divisor({"in_channels": args.get("in_channels", 1), **(args.get("slice_encoder") or {})}), 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the slice encoder, then the layers of the aggregator."""
        return [*self.slice_encoder.blocks, *self.aggregator.layers]

    def part(self, group: str) -> Part:
        """Describe `slice_encoder` (timm's keys), `aggregator` (those of `SliceAggregator`) or `joint` (both, and the projection)."""
        if group == "slice_encoder":
            return self.slice_encoder.part("slice_encoder")
        manifest = {
            "encoder": self.config(),
            "library": self.library,
            "key_groups": self.key_groups,
            "channels": self.in_channels,
            "patch_size": list(self.patch_size),
            "axis_order": self.axis_order,
            "token_order": f"slices in order; within a slice {TOKEN_ORDER_2D}",
        }
        if group == "aggregator":
            return Part(module=self, manifest={**manifest, "key_groups": {"aggregator": [""]}}, prefix="aggregator.")
        if group in self.key_groups:
            return Part(module=self, manifest=manifest, prefix="")
        raise KeyError(f"slice_volume has no part {group}; it has slice_encoder, aggregator, joint")

    def parts(self) -> dict[str, Part]:
        """Everything that is exported, for an objective's `exported()`."""
        return {name: self.part(name) for name in ("joint", "slice_encoder", "aggregator")}

    def embed_slices(self, stacks: Tensor, valid: Tensor | None = None) -> Tensor:
        """Embed every valid slice.

        Args:
            stacks: (B, N, C, H, W), see `as_stacks`.
            valid: (B, N) bool; None means all. The others are not looked at.

        Returns:
            (B, N, dim), before the aggregator; zero where not valid.
        """
        if stacks.ndim != 5 or stacks.shape[2] != self.in_channels:
            raise ValueError(
                f"slice_volume takes slices of {self.in_channels} channel(s); stacks (B, N, C, H, W) are {tuple(stacks.shape)}; convert the "
                "images to that many channels, or train sources of another channel count in a run (or with an encoder) of their own"
            )
        batch, slots = stacks.shape[:2]
        if valid is None:
            place = torch.arange(batch * slots, device=stacks.device)
        else:
            place = valid.flatten().nonzero()[:, 0]
        # never one slice alone where there are two: batch norm could not train on it
        chunks = max(min(-(-len(place) // self.chunk), len(place) // 2), 1)
        parts = [place[first::chunks] for first in range(chunks)] if len(place) else []
        passes = -(-batch * slots // self.chunk) if self._sharded else max(len(parts), 1)
        again = passes > 1 and torch.is_grad_enabled()

        def run(call: Any, *args: Any) -> Tensor:
            return recomputed(self.slice_encoder, call, *args) if again else call(*args)  # type: ignore[no-any-return]

        rows = [run(self._embed_chunk, stacks, part) for part in parts]
        blanks = [run(self._embed_blank, stacks) for _ in range(passes - len(parts))]
        embedded = self.projection(torch.cat([*rows, *blanks]))
        full = embedded.new_zeros(batch * slots, embedded.shape[1])
        if parts:
            full = full.index_copy(0, torch.cat(parts), embedded[: len(place)])
        if blanks:  # so that the zeros depend on every parameter: gradients are zero but there, as distributed training expects
            full = full + 0.0 * embedded[len(place) :].sum(dim=0)
        return full.reshape(batch, slots, -1)  # type: ignore[no-any-return]

    @property
    def _sharded(self) -> bool:
        """Whether the blocks of the slice encoder are sharded over processes: then all must call them equally often."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(block, FSDPModule) for block in self.slice_encoder.blocks)

    def _embed_blank(self, stacks: Tensor) -> Tensor:
        """One row (1, width) from blank slices, of which batch norms learn nothing."""
        with running_statistics_kept(self.slice_encoder):
            return self.slice_encoder.embed(stacks.new_zeros(2, *stacks.shape[2:]), self.pool)[:1]

    def _embed_chunk(self, stacks: Tensor, place: Tensor) -> Tensor:
        slots = stacks.shape[1]
        return self.slice_encoder.embed(stacks[place // slots, place % slots], self.pool)

    def forward_features(
        self,
        x: Tensor | Stack,
        keep: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        z_mm: Tensor | None = None,
        kind: Kind = "volume",
        slice_axis: int | None = 2,
    ) -> EncoderOutput:
        """Encode volumes, clips or images.

        Args:
            x: Volumes (B, C, X, Y, Z), clips (B, T, C, H, W), images (B, C, H, W), or a `Stack`, which knows `valid` and `z_mm`.
            keep: Not supported; hide slices with a mask token before `aggregator` instead.
            valid: (B, N) bool, True = real slice; None means all.
            z_mm: (B, N) position of each slice in mm along the slice axis; for clips the time of each frame in ms; for images not needed.
            kind: `volume` or `clip`; four axes are always images.
            slice_axis: Of volumes, see `as_stacks`.

        Returns:
            Slice tokens (B, N, dim); grid (N,); pooled (B, dim), the mean over valid slices.
        """
        if keep is not None:
            raise ValueError("slice_volume drops no tokens: replace slice embeddings by a mask token before the aggregator")
        if isinstance(x, Stack):
            return self.aggregator(self.embed_slices(x.planes, x.valid), x.valid, x.depth)  # type: ignore[no-any-return]
        return self.aggregator(self.embed_slices(as_stacks(x, kind, slice_axis), valid), valid, z_mm)  # type: ignore[no-any-return]
