"""Conformance checks for encoders, objectives and domains: what the registry-walking tests run, open to outside plug-ins.

    from medssl.testing import check_encoder
    check_encoder("mypackage.encoders:MyEncoder", {"width": 16}, image_size=(32, 32, 16))

Every check raises AssertionError with a sentence.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.registry import lookup
from medssl.types import Sample, StepContext, Views, ViewsMeta


def check_encoder(name: str, args: Mapping[str, Any], *, image_size: Sequence[int], batch: int = 2) -> None:
    """Check that an encoder keeps the contract of DESIGN section 5.

    Args:
        name: Registered name or import path.
        args: Constructor arguments, at toy size.
        image_size: Non-cubic (X, Y, Z) in voxels, or (H, W) of unequal sides, so that a transposition shows. An encoder that takes
            stacks of slices (`takes_stacks`) gets volumes with slices along Z.
        batch: Items.
    """
    torch.manual_seed(0)
    encoder = lookup("encoder", name)(**args)
    if getattr(encoder, "takes_stacks", False):
        _check_stack_encoder(encoder, image_size, batch)
        return
    children = [child for child, _ in encoder.named_children()]
    assert children == ["net"], f"an encoder has one child `net`, the stock module; found {children}"
    x = torch.randn(batch, encoder.in_channels, *image_size)
    output = encoder.forward_features(x)
    patch = tuple(encoder.patch_size)
    grid = tuple(n // p for n, p in zip(image_size, patch))
    assert tuple(output.grid) == grid, f"grid is {output.grid}, expected {grid} from image size and patch"
    count = int(np.prod(grid))
    expected = (batch, count, encoder.embed_dim)
    assert tuple(output.tokens.shape) == expected, f"tokens have shape {tuple(output.tokens.shape)}, expected {expected}"
    assert tuple(output.pooled.shape) == (batch, encoder.embed_dim), "pooled must be (B, E)"
    divisor = tuple(encoder.divisor(encoder.config()["args"]))
    assert len(divisor) == len(patch) and all(d % p == 0 for d, p in zip(divisor, patch)), (
        f"divisor(args) is {divisor}; it must be patch_size {patch}, or a multiple where the network takes whole windows of patches"
    )
    _check_gradients(encoder, output)
    _check_rebuild(encoder, x)
    _check_token_order(encoder, image_size)
    _check_blocks(encoder, x)


def _check_blocks(encoder: Any, x: torch.Tensor, **kwargs: Any) -> None:
    """Blocks are submodules; checkpointing them changes neither gradients nor buffers."""
    assert encoder.blocks, "blocks lists the units to shard, compile and checkpoint; found none"
    modules = list(encoder.modules())
    assert all(any(block is module for module in modules) for block in encoder.blocks), "every block is a submodule of the encoder"
    assert len({id(block) for block in encoder.blocks}) == len(encoder.blocks), "blocks lists each unit once"
    twin = copy.deepcopy(encoder).train()
    encoder.train()
    twin.checkpoint_blocks = True
    for model in (encoder, twin):
        model.zero_grad()
        torch.manual_seed(0)
        output = model.forward_features(x, **kwargs)
        (output.tokens.square().mean() + output.pooled.square().mean()).backward()
    for (key, a), b in zip(encoder.named_parameters(), twin.parameters()):
        same = a.grad is b.grad if a.grad is None or b.grad is None else torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        assert same, f"{key}: activation checkpointing changes the gradient"
    assert all(torch.equal(a, b) for a, b in zip(encoder.buffers(), twin.buffers())), (
        "activation checkpointing changes buffers: the second forward pass must not move running statistics again"
    )


def _check_stack_encoder(encoder: Any, image_size: Sequence[int], batch: int) -> None:
    """The contract of an encoder of slice stacks: variable N, padding, positions, parts."""
    slices = image_size[2]
    x = torch.randn(batch, encoder.in_channels, *image_size)
    valid = torch.ones(batch, slices, dtype=torch.bool)
    valid[-1, slices // 2 :] = False
    z_mm = torch.arange(slices).expand(batch, -1) * 2.5
    output = encoder.forward_features(x, valid=valid, z_mm=z_mm)
    expected = (batch, slices, encoder.embed_dim)
    assert tuple(output.tokens.shape) == expected, f"tokens have shape {tuple(output.tokens.shape)}, expected {expected}"
    assert tuple(output.grid) == (slices,), f"grid is {output.grid}, expected one cell per slice, {(slices,)}"
    assert tuple(output.pooled.shape) == (batch, encoder.embed_dim), "pooled must be (B, E)"
    divisor = tuple(encoder.divisor(encoder.config()["args"]))
    assert divisor == tuple(encoder.patch_size), f"divisor(args) is {divisor}, patch_size {tuple(encoder.patch_size)}"
    (output.tokens.square().sum() + output.pooled.sum()).backward()
    lost = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, f"{lost[0]} gets no gradient; set requires_grad False on parameters that no path uses"
    encoder.eval()
    config = encoder.config()
    assert json.loads(json.dumps(config)) == config, "config() must survive JSON"
    again = lookup("encoder", _path_of(encoder, config["name"]))(**config["args"]).eval()
    again.net.load_state_dict(encoder.net.state_dict(), strict=True)
    changed = x.masked_fill(~valid[:, None, None, None], 7.0)
    with torch.no_grad():
        whole = encoder.forward_features(x, valid=valid, z_mm=z_mm)
        rebuilt = again.forward_features(changed, valid=valid, z_mm=z_mm)
    assert torch.allclose(whole.tokens, rebuilt.tokens, atol=1e-5), (
        "rebuilt from config() with the same state, and with other content in padded slices, the tokens must be the same"
    )
    parts = encoder.parts()
    assert {"slice_encoder", "aggregator", "joint"} <= set(parts), f"parts() are {sorted(parts)}"
    for name, part in parts.items():
        assert json.loads(json.dumps(part.manifest)) == part.manifest, f"manifest of {name} must survive JSON"
        assert any(key.startswith(part.prefix) for key in part.module.state_dict()), f"part {name} has no tensors"
    _check_blocks(encoder, x, valid=valid, z_mm=z_mm)


def _check_gradients(encoder: Any, output: Any) -> None:
    (output.tokens.sum() + output.pooled.sum() + sum(level.sum() for level in output.pyramid)).backward()
    group = tuple(f"net.{prefix}" for prefix in encoder.key_groups["encoder"])
    lost = [n for n, p in encoder.named_parameters() if n.startswith(group) and p.requires_grad and p.grad is None]
    assert not lost, f"{lost[0]} gets no gradient; set requires_grad False on parameters that no path uses"


def _check_rebuild(encoder: Any, x: torch.Tensor) -> None:
    config = encoder.config()
    assert json.loads(json.dumps(config)) == config, "config() must survive JSON"
    again = lookup("encoder", _path_of(encoder, config["name"]))(**config["args"])
    again.net.load_state_dict(encoder.net.state_dict(), strict=True)
    with torch.no_grad():
        same = torch.equal(encoder.eval()(x).tokens, again.eval()(x).tokens)
    assert same, "an encoder rebuilt from config() with the same state must give the same tokens"


def _path_of(encoder: Any, name: str) -> str:
    from medssl.registry import ENCODERS

    return name if name in ENCODERS else f"{type(encoder).__module__}:{type(encoder).__qualname__}"


def _check_token_order(encoder: Any, image_size: Sequence[int]) -> None:
    """Move a changed patch from one end of an axis to the other; read as n = (x * Y + y) * Z + z, the effect must move along that axis."""
    grid = [n // p for n, p in zip(image_size, encoder.patch_size)]
    near = _effect_centre(encoder, image_size, [0] * len(grid))
    for axis, length in enumerate(grid):
        if length == 1:
            continue
        far = _effect_centre(encoder, image_size, [length - 1 if a == axis else 0 for a in range(len(grid))])
        moved = [far[a] - near[a] for a in range(len(grid))]
        assert max(range(len(grid)), key=lambda a: moved[a]) == axis, (
            f"a patch moved along axis {axis} of grid {tuple(grid)} moves its tokens by {[round(m, 2) for m in moved]}: tokens are transposed"
        )


def _effect_centre(encoder: Any, image_size: Sequence[int], cell: Sequence[int]) -> list[float]:
    """Change one patch and return where its effect lies, from 0 to 1 along each axis of the token grid."""
    grid = [n // p for n, p in zip(image_size, encoder.patch_size)]
    base = torch.randn(1, encoder.in_channels, *image_size, generator=torch.Generator().manual_seed(0))
    changed = base.clone()
    window = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, encoder.patch_size))
    changed[(slice(None), slice(None), *window)] *= 5
    with torch.no_grad():
        difference = (encoder.eval()(changed).tokens - encoder(base).tokens).square().sum(dim=-1)[0]
    energy = (difference**2 / (difference**2).sum()).reshape(grid)  # squared again: attention spreads a little everywhere
    places = [torch.linspace(0, 1, n).reshape([-1 if a == axis else 1 for a in range(len(grid))]) for axis, n in enumerate(grid)]
    return [float((energy * place).sum()) for place in places]


def toy_views(
    objective: Any, *, view: str | None = None, channels: int = 1, batch: int = 2, ratio: float = 0.75, seed: int = 0
) -> Views:
    """Return random views as one source brings them: smooth images with noise of each view, and with parts that are not valid.

    Args:
        objective: Has `view_specs`, and an encoder.
        view: Key of the source's views; None takes the first. Small crops (`<view>_local`) come along.
        channels: Image channels.
        batch: Items.
        ratio: Share of hidden patches, for encoders of volumes with patches.
        seed: Of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    main = view or next(iter(objective.view_specs))
    data: dict[str, torch.Tensor] = {}
    valid: dict[str, torch.Tensor] = {}
    spacing: dict[str, torch.Tensor] = {}
    for name, spec in objective.view_specs.items():
        if name not in (main, f"{main}_local"):
            continue
        count, size = spec.count, tuple(spec.size)
        content = torch.randn(batch, 1, channels, *size, generator=generator).cumsum(dim=-2)
        data[name] = content / content.std() + 0.3 * torch.randn(batch, count, channels, *size, generator=generator)
        valid[name] = torch.ones(batch, count, *size, dtype=torch.bool)
        if spec.kind == "clip":
            data[name] = data[name].movedim(2, 3)  # (B, V, N, C, H, W)
            valid[name][-1, :, size[0] // 2 + 1 :] = False  # a shorter stack, padded
            steps = torch.arange(size[0], dtype=torch.float32).expand(batch, count, -1)
            data[f"{name}_depth"], data[f"{name}_share"] = 2.5 * steps, steps / max(size[0] - 1, 1)
        else:
            valid[name][:, :, 0] = False
        if spec.kind == "image":
            share = (torch.arange(batch, dtype=torch.float32) + 0.5) / batch
            data[f"{name}_depth"], data[f"{name}_share"] = (x[:, None].expand(-1, count) for x in (100 * share, share))
        if spec.kind == "volume":
            spacing[name] = torch.tensor([1.0, 1.5, 2.5], dtype=torch.float64).expand(batch, count, 3)
            if not getattr(objective.encoder, "takes_stacks", False):
                grid = [n // p for n, p in zip(size, objective.encoder.patch_size)]
                cells = int(np.prod(grid))
                order = torch.argsort(torch.rand(batch, count, cells, generator=generator), dim=-1)
                data[f"{name}_mask"] = (order < int(ratio * cells)).reshape(batch, count, *grid)
        else:
            whole = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])  # a view of the whole picture
            data[f"{name}_map"] = whole.expand(batch, count, 2, 3)
    meta = ViewsMeta("toy", "mri", torch.arange(batch), spacing, {}, valid, ())
    return Views(data, meta)


def check_objective(
    objective: Any, views: Views | Sequence[Views], *, steps: int = 30, lr: float = 3e-3, separable: bool = True
) -> None:
    """Check that an objective keeps the contract of DESIGN section 5 and can learn one batch by heart.

    Args:
        objective: Built at toy size.
        views: A batch that fits its `view_specs`; where sources differ, one batch of each.
        steps: Steps of the overfitting run.
        lr: Its learning rate.
        separable: The loss is a mean over samples. False where samples of a micro-batch are compared with each other (balanced
            assignments, contrast, graphs), so that a batch in two halves is another loss.
    """
    assert objective.view_specs, "view_specs says which views the objective needs"
    batches = [views] if isinstance(views, Views) else list(views)
    ctx = StepContext()
    for batch in batches:
        torch.manual_seed(0)
        parts = objective(batch, ctx)
        assert "loss" in parts and parts["loss"].ndim == 0, "forward returns {'loss': scalar, ...}"
        assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in parts.values()), "parts are scalar tensors"
        parts["loss"].backward()
        torch.manual_seed(0)
        assert torch.equal(objective(batch, ctx)["loss"], parts["loss"]), "equal seeds must give equal losses: no hidden randomness"
    lost = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, f"{lost[0]} gets no gradient; set requires_grad False on parameters that no path uses"
    for batch in batches:
        _check_reach(objective, batch, separable)
        _check_denominators(objective, batch, separable)
    _check_state(objective, batches)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    first = [_loss(objective, batch) for batch in batches]
    for step in range(steps):
        _advance(objective, batches[step % len(batches)], optimiser, step)
    last = [_loss(objective, batch) for batch in batches]
    assert sum(last) < sum(first), f"the loss of repeated batches went from {sum(first):.4f} to {sum(last):.4f}; it must fall"
    for name, part in objective.exported().items():
        state = part.module.state_dict()
        kept = [
            k for k in state if k.startswith(part.prefix) and (part.keys is None or k[len(part.prefix) :].startswith(part.keys))
        ]
        assert kept, f"exported part {name} has no tensors under prefix {part.prefix!r}"


def _loss(objective: Any, views: Views, draws: int = 4) -> float:
    """Mean over a few seeds: the loss of an objective with noise of its own is a draw."""
    total = 0.0
    for seed in range(draws):
        torch.manual_seed(seed)
        total += float(objective(views, StepContext())["loss"].detach()) / draws
    return total


def _advance(objective: Any, views: Views, optimiser: torch.optim.Optimizer, step: int) -> None:
    """One step as the loop takes it."""
    ctx = StepContext(step=step)
    torch.manual_seed(step)
    optimiser.zero_grad()
    objective(views, ctx)["loss"].backward()
    optimiser.step()
    if hasattr(objective, "after_step"):
        objective.after_step(ctx)


def _check_reach(objective: Any, views: Views, separable: bool) -> None:
    """The encoder learns from every item of a batch, and from no padding; where items are compared, some may be right already."""
    inputs = {key: value.clone().requires_grad_(True) for key, value in views.data.items() if key in objective.view_specs}
    torch.manual_seed(0)
    loss = objective(Views({**views.data, **inputs}, views.meta), StepContext())["loss"]
    for key, grad in zip(inputs, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)):
        assert grad is not None and torch.isfinite(grad).all(), f"{key}: no finite gradient with respect to the views"
        felt = grad.flatten(1).abs().sum(dim=1) > 0
        assert felt.all() or (not separable and felt.any()), (
            f"{key}: items {(~felt).nonzero()[:, 0].tolist()} of the batch teach nothing"
        )
        if objective.view_specs[key].kind == "clip":
            padding = ~views.meta.valid[key].flatten(3).any(dim=-1)
            assert (grad[padding] == 0).all(), f"{key}: padded slices reach the loss"


def _check_state(objective: Any, batches: Sequence[Views]) -> None:
    """What an untouched copy needs to go on where another one is must be in `state_dict()`."""
    old = copy.deepcopy(objective.state_dict())
    twin, third = copy.deepcopy(objective), copy.deepcopy(objective)
    for step, views in enumerate([*batches, *batches]):
        _advance(twin, views, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1e-2), step)
    if hasattr(twin, "on_epoch"):
        twin.on_epoch(StepContext(step=len(batches) * 2), None)
    third.load_state_dict(twin.state_dict(), strict=True)
    for model in (twin, third):
        _advance(model, batches[0], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2), 9)
    unequal = [key for key, value in twin.state_dict().items() if not torch.equal(value, third.state_dict()[key])]
    assert not unequal, f"{unequal[0]} differs after loading: state_dict() must hold everything that survives a step"
    assert all(torch.equal(value, old[key]) for key, value in objective.state_dict().items()), (
        "a copy shares tensors with the original"
    )


def _check_denominators(objective: Any, views: Views, separable: bool) -> None:
    """Counts add up over micro-steps; where the loss is separable, its mean over two micro-steps equals one step over both."""
    if not hasattr(objective, "denominators"):
        return
    if separable:
        views = _uneven(views)
    halves = [_slice(views, slice(0, 1)), _slice(views, slice(1, None))]
    totals = {name: float(value) for name, value in objective.denominators(views).items()}
    counts = [{name: float(value) for name, value in objective.denominators(half).items()} for half in halves]
    for name in {*totals, *counts[0], *counts[1]}:
        total, parts = totals.get(name, 0.0), [half.get(name, 0.0) for half in counts]
        assert math.isclose(sum(parts), total, rel_tol=1e-6), (
            f"denominators: {name} is {total:g} for a batch and {parts[0]:g} and {parts[1]:g} for its parts; a count must add up"
        )
    if not separable:
        return
    assert counts[0] != counts[1], (
        "both micro-steps have the same counts, so that no wrong division would show; give views of three or more items"
    )
    whole = objective(views, StepContext(totals=totals))["loss"].detach()
    split = [objective(half, StepContext(totals=totals, micro_steps=2))["loss"].detach() for half in halves]
    average = (split[0] + split[1]) / 2
    assert torch.allclose(whole, average, rtol=1e-4), (
        f"micro-steps must average to the loss of the whole batch: it is {float(whole):.6g}, their average {float(average):.6g}; divide "
        "sums by `ctx.mean(total, name, local_count)` under the names that `denominators` returns"
    )


def _uneven(views: Views) -> Views:
    """Return the views with half of the first item's content not valid, so that it counts for less than the others."""
    valid = {key: value.clone() for key, value in views.meta.valid.items()}
    for value in valid.values():
        if value.ndim > 3:  # more than which slices there are
            value[0, ..., : value.shape[-1] // 2] = False
    return Views(views.data, replace(views.meta, valid=valid))


def _slice(views: Views, rows: slice) -> Views:
    data = {key: value[rows] for key, value in views.data.items()}
    valid, spacing = ({key: x[rows] for key, x in table.items()} for table in (views.meta.valid, views.meta.spacing_mm))
    return Views(data, ViewsMeta(views.meta.source, views.meta.domain, views.meta.ids[rows], spacing, {}, valid, ()))


def check_domain(
    name: str, files: Sequence[Path], *, args: Mapping[str, Any] | None = None, affine: np.ndarray | None = None
) -> Sample:
    """Check that a domain delivers canonical samples (DESIGN section 4).

    Args:
        name: Registered name or import path.
        files: Files of one volume, image or clip that the domain must read.
        args: Constructor arguments.
        affine: Expected affine, when known.

    Returns:
        The sample, for further checks.
    """
    domain = lookup("domain", name)(**(args or {}))
    sample: Sample = domain.read(list(files), series_id="0" * 32)
    if sample.meta.kind == "volume":
        _check_volume(sample, affine)
    else:
        assert sample.meta.kind in getattr(domain, "kinds", ()), f"`kinds` of the domain must name {sample.meta.kind}"
        _check_planar(sample)
    assert {"mean", "std", "p00_5", "p99_5"} <= set(sample.meta.stats), "meta.stats holds the foreground statistics"
    assert np.isfinite(sample.image.astype(np.float64)).all(), "NaN voxels are replaced and marked in `valid`"
    again = domain.read(list(files), series_id="0" * 32)
    assert np.array_equal(again.image, sample.image), "reading twice must give the same voxels"
    mask = domain.foreground(sample)
    space = sample.image.shape[1:] if sample.meta.kind == "volume" else sample.image.shape[-2:]
    assert mask.shape == space and mask.dtype == bool, f"foreground must be bool {space}"
    assert sample.valid is None or not (mask & ~sample.valid).any(), "what is not valid is no foreground"
    params = domain.params()
    assert isinstance(params, dict) and domain.name and int(domain.version) >= 1, "name, version and params() key the store"
    assert json.loads(json.dumps(params)) == params, "params() must survive JSON"
    return sample


def _check_volume(sample: Sample, affine: np.ndarray | None) -> None:
    assert sample.image.ndim == 4, f"image must be (C, X, Y, Z); found shape {sample.image.shape}"
    assert sample.image.dtype in (np.int16, np.uint8, np.float32), f"dtype {sample.image.dtype}; accepted: int16, uint8, float32"
    assert sample.affine is not None and sample.spacing_mm is not None, "a volume has an affine and a spacing"
    directions = sample.affine[:3, :3] / np.linalg.norm(sample.affine[:3, :3], axis=0)
    assert (np.argmax(np.abs(directions), axis=0) == np.arange(3)).all() and (np.diag(directions) > 0).all(), "axes must be RAS+"
    assert np.allclose(np.linalg.norm(sample.affine[:3, :3], axis=0), sample.spacing_mm, rtol=1e-4), (
        "spacing_mm must match the affine"
    )
    if affine is not None:
        assert np.allclose(sample.affine, affine, atol=1e-4), f"affine is\n{sample.affine}, expected\n{affine}"


def _check_planar(sample: Sample) -> None:
    clip = sample.meta.kind == "clip"
    image, times = sample.image, sample.meta.frame_times_ms
    axes = "(T, C, H, W)" if clip else "(C, H, W)"
    assert image.ndim == (4 if clip else 3), f"{sample.meta.kind} must be {axes}; found shape {image.shape}"
    accepted = (np.uint8, np.uint16, np.int16, np.float32)
    assert image.dtype in accepted, f"dtype {image.dtype}; accepted: uint8, uint16, int16, float32"
    assert sample.affine is None, "images and clips have no affine"
    assert sample.spacing_mm is None or (len(sample.spacing_mm) == 2 and min(sample.spacing_mm) > 0), (
        "spacing_mm is (row step, column step), or None: nothing is assumed"
    )
    assert sample.valid is None or (sample.valid.shape == image.shape[-2:] and sample.valid.dtype == bool), "valid is bool (H, W)"
    assert times is None or (clip and len(times) == len(image) and times[0] == 0 and all(np.diff(times) > 0)), (
        "frame_times_ms belongs to clips: one time per frame, from 0, rising; None when unknown"
    )
    n_channels = image.shape[1] if clip else image.shape[0]
    assert len(sample.meta.channels) in (0, n_channels), "channels names every channel, or none"
    assert all(isinstance(value, str | float | bool) for value in sample.meta.facts.values()), "facts are words and numbers"
