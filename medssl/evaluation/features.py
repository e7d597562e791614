"""Frozen features of images, and the probe table on them, controls included."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.errors import RequestError
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import linear_probe
from medssl.evaluation.scores import Task
from medssl.types import ClipBatch, EncoderOutput, Stack

Batch = tuple[Tensor | Stack | ClipBatch, Sequence[Hashable]]
Readout = Callable[[EncoderOutput], Tensor]
CONTROLS = ("random_init", "raw_pixels", "intensity_statistics")


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients, and leave no trace of it.

    Restores, also after an exception: the training flag of every submodule (frozen parts in eval mode stay so), all
    buffers, and the global generators of torch (CPU and CUDA), NumPy and Python.

    Args:
        module: The encoder, on any device.
    """
    training = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for part, flag in training:
                part.training = flag
            for buffer, value in buffers:
                buffer.copy_(value)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def encode(encoder: nn.Module, images: Tensor | Stack | ClipBatch) -> EncoderOutput:
    """Encode images, stacks or clips that are on the encoder's device; encoders of clips have `forward_features(video, valid=pixels)`.

    An encoder of single frames (`single_frames`) sees each frame of a clip by itself; a clip's vector is the mean over its frames.
    """
    forward: Any = encoder.forward_features
    if not isinstance(images, ClipBatch):
        output: EncoderOutput = forward(images)
    elif getattr(encoder, "single_frames", False):
        output = _encode_frames(forward, images)
    else:
        output = forward(images.video, valid=images.pixels)
    return output


def _encode_frames(forward: Any, clips: ClipBatch) -> EncoderOutput:
    """Encode the frames of clips that are not filled in one by one; tokens of the others are zero."""
    pictures = clips.video.movedim(2, 1)[clips.valid][:, :, None]  # (M, C, 1, H, W)
    found: EncoderOutput = forward(pictures, valid=clips.pixels[clips.valid][:, None])
    count = clips.valid.sum(dim=1, keepdim=True)
    batch, frames = clips.valid.shape
    tokens = found.tokens.new_zeros(batch, frames, *found.tokens.shape[1:])
    pooled = found.pooled.new_zeros(batch, frames, found.pooled.shape[1])
    tokens[clips.valid], pooled[clips.valid] = found.tokens, found.pooled
    return EncoderOutput(tokens=tokens.flatten(1, 2), grid=(frames, *found.grid[1:]), pooled=pooled.sum(dim=1) / count)


def pooled(output: EncoderOutput) -> Tensor:
    """Return (B, E), what the encoder pools itself."""
    return output.pooled


def embed(encoder: nn.Module, batches: Iterable[Batch], readout: Readout = pooled) -> tuple[np.ndarray, list[Any]]:
    """Return one vector of features per image, in the order in which they come.

    Args:
        encoder: Has `forward_features(x) -> EncoderOutput`; its state is the same afterwards (`evaluation_mode`).
        batches: Pairs of images (B, C, *size), stacks or clips, normalised as in pretraining, and their B ids. Moved to the encoder's
            device and dtype.
        readout: Output of the encoder -> (B, E) vectors; `clips.motion` reads another one off clips.

    Returns:
        (N, E) float32 features, and the N ids.

    Raises:
        RequestError: There is no image, or a batch has more or fewer ids than images.
    """
    parameter = next(encoder.parameters())
    parts: list[np.ndarray] = []
    ids: list[Any] = []
    with evaluation_mode(encoder), torch.autocast(parameter.device.type, enabled=False):
        for images, batch_ids in batches:
            if len(images) != len(batch_ids):
                raise RequestError(f"embed: {len(images)} images and {len(batch_ids)} ids in one batch; give one id per image")
            output = encode(encoder, images.to(parameter.device, parameter.dtype))
            parts.append(readout(output).float().cpu().numpy())
            ids.extend(batch_ids)
    if not parts:
        raise RequestError("embed: no images; check the selection (an SQL filter or a split may have left nothing)")
    return np.concatenate(parts), ids


def probe_table(
    features: np.ndarray,
    controls: Mapping[str, np.ndarray],
    targets: Sequence[Any] | np.ndarray,
    groups: Sequence[str] | None,
    *,
    task: Task,
    k: int = 5,
    folds: int = 5,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Probe features and their controls in the same way: linear probe and kNN, both across patients.

    Args:
        features: (N, E) of the encoder.
        controls: Name -> (N, E') features of the same images; all of `CONTROLS` must be there (`control_features` makes
            them), others may be.
        targets: (N,) values, or labels of any sortable kind.
        groups: Patient of each image. None when patients are unknown: folds, neighbours and intervals are then by
            image, every row says `by image`, and such numbers are too good where a patient has several images.
        task: `regression` (R2, MAE) or `classification` (balanced accuracy, accuracy).
        k: Neighbours.
        folds: Folds of patients of the linear probe.
        draws: Bootstrap draws.
        seed: Seed of folds and intervals.

    Returns:
        Rows {name, probe, metric, value, low, high, n_images, n_patients, by}, JSON-able; names are `encoder` and the
        controls'.

    Raises:
        RequestError: A control is missing, or features are unusable.
    """
    missing = [name for name in CONTROLS if name not in controls]
    if missing:
        raise RequestError(
            f"probe table: no control {', '.join(missing)}; every table carries {', '.join(CONTROLS)}; "
            "make them with medssl.evaluation.controls.control_features"
        )
    rows = []
    for name, values in {"encoder": features, **controls}.items():
        rows += linear_probe(values, targets, groups, task=task, name=name, folds=folds, seed=seed, draws=draws)
        rows += knn_probe(values, targets, groups, task=task, name=name, k=k, seed=seed, draws=draws)
    return rows
