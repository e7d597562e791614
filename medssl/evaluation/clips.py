"""Frozen features of clips, and what is asked of them: the phase of the heart, the outline of a chamber, whether a clip is unlike normal ones.

Labels of whole clips (ejection fraction, a diagnosis) go through `features.probe_table`, as those of images do; its control `raw_pixels` is
a ridge on the clip made 8 x 8 x 8. Everything else here takes arrays, so that it can be checked without an encoder. Folds, neighbours and
intervals are by patient.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.errors import RequestError
from medssl.evaluation.controls import small_images
from medssl.evaluation.features import encode, evaluation_mode
from medssl.evaluation.linear_probe import fit_linear
from medssl.evaluation.metrics import dice
from medssl.evaluation.scores import check_features, group_indices, patient_folds, roc_auc, score_row
from medssl.layers.tokens import patchify, unflatten_tokens, valid_tokens
from medssl.seeding import derive_seed
from medssl.types import ClipBatch, EncoderOutput

IGNORED = -1
"""Label of pixels that count for nothing: outside the sector, or of a frame without a label."""
CERTAIN = 30.0


@dataclass(frozen=True)
class ClipFeatures:
    """Features of N clips.

    Args:
        pooled: (N, E) float32, one vector per clip.
        steps: (N, t, E) float32, the mean over the valid tokens of each tubelet; NaN where it has none.
        tokens: (N, t, h, w, E) float32, or None when they were not asked for.
        token_valid: (N, t, h, w) bool: tokens that the encoder computed.
        ids: N ids, in the order of the clips.
    """

    pooled: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray | None
    token_valid: np.ndarray
    ids: list[Any]


def embed_clips(
    encoder: nn.Module, batches: Iterable[tuple[ClipBatch, Sequence[Hashable]]], *, tokens: bool = False
) -> ClipFeatures:
    """Embed clips with a frozen encoder.

    Args:
        encoder: Has `forward_features(video (B, C, T, H, W), valid=(B, T, H, W)) -> EncoderOutput` with a grid (t, h, w) and tokens
            that are zero where not valid (`encoders.video_vit`); its state is the same afterwards.
        batches: Clips and their ids. All must have one shape.
        tokens: Keep all tokens: N * t * h * w * E numbers.

    Raises:
        RequestError: There is no clip.
    """
    parameter = next(encoder.parameters())
    pooled, steps, kept, valid = [], [], [], []
    ids: list[Any] = []
    with evaluation_mode(encoder), torch.autocast(parameter.device.type, enabled=False):
        for clips, batch_ids in batches:
            output = encode(encoder, clips.to(parameter.device, parameter.dtype))
            found = unflatten_tokens(output.tokens.float(), output.grid).movedim(1, -1)
            seen = (found != 0).any(dim=-1)
            pooled.append(output.pooled.float().cpu().numpy())
            steps.append(step_means(found, seen).cpu().numpy())
            valid.append(seen.cpu().numpy())
            if tokens:
                kept.append(found.cpu().numpy())
            ids.extend(batch_ids)
    if not ids:
        raise RequestError("embed_clips: no clips; check the selection (an SQL filter or a split may have left nothing)")
    return ClipFeatures(
        np.concatenate(pooled), np.concatenate(steps), np.concatenate(kept) if tokens else None, np.concatenate(valid), ids
    )


def motion(output: EncoderOutput) -> Tensor:
    """Return (B, 3 E): how the tokens of clips change over time, for numbers that no single frame shows, as an ejection fraction."""
    tokens = unflatten_tokens(output.tokens.float(), output.grid).movedim(1, -1)
    return motion_of(tokens, (tokens != 0).any(dim=-1))


def motion_of(tokens: Tensor, valid: Tensor) -> Tensor:
    """Return the mean and the deviation over time of the mean token of a step, and the mean over places of the deviation of a place's token.

    Args:
        tokens: (B, t, h, w, E).
        valid: (B, t, h, w) bool. Of places only those that are valid throughout count.

    Returns:
        (B, 3 E); 0 where nothing is valid.
    """
    steps = step_means(tokens, valid)
    mean = steps.nanmean(dim=1)
    spread = (steps - mean[:, None]).square().nanmean(dim=1).sqrt()
    steady = valid.all(dim=1)[..., None]
    moved = (tokens.std(dim=1, correction=0) * steady).sum(dim=(1, 2)) / steady.sum(dim=(1, 2)).clamp(min=1)
    return torch.cat([mean, spread, moved], dim=1).nan_to_num(0)


def step_means(tokens: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over the valid tokens of each tubelet.

    Args:
        tokens: (B, t, h, w, E).
        valid: (B, t, h, w) bool.

    Returns:
        (B, t, E), NaN where none is valid.
    """
    weight = valid[..., None].to(tokens.dtype)
    return (tokens * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))


class PixelTokens(nn.Module):
    """Pixels in the place of an encoder, the control of every probe of clips: tokens are the pixels they stand for, `pooled` is the clip made small.

    Args:
        patch: (frames, rows, columns) of a token.
        size: Cells per axis of the small clip.
        share: Share of a token's pixels that must be valid, as in `video_vit`.
    """

    def __init__(self, patch: Sequence[int], *, size: int = 8, share: float = 0.25) -> None:
        super().__init__()
        self.patch, self.size, self.share = tuple(patch), size, share
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says device and kind, as an encoder's weights do

    def forward_features(self, video: Tensor, valid: Tensor) -> EncoderOutput:
        """Return tokens (B, N, C * frames * rows * columns) of clips (B, C, T, H, W), zero where not valid, (B, T, H, W) bool."""
        shown = video.masked_fill(~valid[:, None], 0.0)
        real = valid_tokens(valid, self.patch, self.share)
        grid = tuple(n // p for n, p in zip(video.shape[2:], self.patch))
        return EncoderOutput(tokens=patchify(shown, self.patch) * real[..., None], grid=grid, pooled=small_images(video, self.size))


# The phase of the heart


def phase_targets(n_frames: int, ed: Sequence[int], es: Sequence[int]) -> np.ndarray:
    """Return how far each frame is from end diastole (0) towards end systole (1), linear between marks; NaN before the first and after the last.

    Args:
        n_frames: Frames of the clip.
        ed: Frames of end diastole.
        es: Frames of end systole.
    """
    marks = sorted([(frame, 0.0) for frame in ed] + [(frame, 1.0) for frame in es])
    target = np.full(n_frames, np.nan)
    if marks:
        places, values = np.array(marks, dtype=np.float64).T
        inside = slice(int(places[0]), int(places[-1]) + 1)
        target[inside] = np.interp(np.arange(n_frames)[inside], places, values)
    return target


def mark_error(score: np.ndarray, marks: Sequence[int]) -> tuple[float, float]:
    """Return by how many frames the frame of the highest score misses the nearest mark, and by how many any frame does on average.

    Args:
        score: (T,), NaN where there is none.
        marks: True frames, at least one.
    """
    away = np.abs(np.arange(len(score))[:, None] - np.asarray(marks)[None]).min(axis=1)
    seen = np.isfinite(score)
    return float(away[int(np.nanargmax(score))]), float(away[seen].mean())


def phase_retrieval(
    features: Sequence[np.ndarray],
    ed: Sequence[Sequence[int]],
    es: Sequence[Sequence[int]],
    groups: Sequence[str] | None,
    *,
    name: str = "encoder",
    frame_ms: Sequence[float] | None = None,
    folds: int = 5,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Find the frames of end diastole and end systole by a ridge on frame features, fitted on other patients.

    The features of a clip are taken relative to their mean over the clip, because phase is motion and not appearance. Predicted is
    `phase_targets`; the frame where it is lowest is held against the nearest true end diastole, the highest against end systole.

    Args:
        features: N arrays (T_i, E), one row per frame (or tubelet, with marks counted alike); rows with NaN are left out.
        ed: N lists of frames of end diastole.
        es: N lists of frames of end systole. Clips without one of the two are left out.
        groups: Patient of each clip, or None.
        name: Name of the features in the rows.
        frame_ms: (N,) time between rows, for errors in ms as well.
        folds: Folds of patients.
        draws: Bootstrap draws.
        seed: Seed of folds and intervals.

    Returns:
        Rows as in `score_row`: `ed_frames` and `es_frames` (mean error), `..._chance` (of a frame taken at random), and with
        `frame_ms` also `ed_ms` and `es_ms`.

    Raises:
        RequestError: Fewer than three patients are left.
    """
    used = [k for k in range(len(features)) if len(ed[k]) and len(es[k]) and np.isfinite(features[k]).all(axis=1).any()]
    if not used:
        raise RequestError("phase retrieval: no clip has a frame of end diastole and one of end systole; check the labels")
    rows, targets, owner = [], [], []
    for k in used:
        own = np.asarray(features[k], dtype=np.float64)
        rows.append(own - np.nanmean(own, axis=0))
        targets.append(phase_targets(len(own), ed[k], es[k]))
        owner.append(np.full(len(own), k))
    stacked, wanted, clip_of = np.concatenate(rows), np.concatenate(targets), np.concatenate(owner)
    patients = [str(k) if groups is None else str(groups[k]) for k in range(len(features))]
    score = _fold_scores(stacked, wanted, [patients[int(k)] for k in clip_of], folds, seed)
    errors: dict[str, list[float]] = {"ed_frames": [], "es_frames": [], "ed_frames_chance": [], "es_frames_chance": []}
    for k in used:
        own = score[clip_of == k]
        for mark, sign, frames in (("ed", -1, ed[k]), ("es", 1, es[k])):
            missed, chance = mark_error(sign * own, frames)
            errors[f"{mark}_frames"].append(missed)
            errors[f"{mark}_frames_chance"].append(chance)
    if frame_ms is not None:
        for mark in ("ed", "es"):
            errors[f"{mark}_ms"] = [missed * frame_ms[k] for missed, k in zip(errors[f"{mark}_frames"], used)]
    kept = None if groups is None else [str(groups[k]) for k in used]
    return [
        score_row(name, "phase_ridge", metric, np.array(values), kept, draws=draws, seed=seed) for metric, values in errors.items()
    ]


def _fold_scores(features: np.ndarray, targets: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Return predictions (N,) of a ridge fitted on other patients' rows that have a target; NaN for rows that are not finite."""
    usable = np.isfinite(features).all(axis=1)
    labelled = usable & np.isfinite(targets)
    index = group_indices(len(groups), groups)
    middle = np.array([np.nanmean(targets[index == g]) if labelled[index == g].any() else 0.5 for g in range(index.max() + 1)])
    fold = patient_folds(middle[index], groups, folds=folds, seed=seed)
    score = np.full(len(targets), np.nan)
    for held in np.unique(fold):
        fit, shown = np.flatnonzero(labelled & (fold != held)), np.flatnonzero(usable & (fold == held))
        model = fit_linear(features[fit], targets[fit], [groups[int(i)] for i in fit], task="regression", seed=seed)
        score[shown] = model.predict(features[shown])
    return score


# Anomalies


def anomaly_scores(features: np.ndarray, normal: np.ndarray, groups: Sequence[str] | None, *, k: int = 5) -> np.ndarray:
    """Return the mean cosine distance of each clip to its k nearest normal clips of other patients.

    Args:
        features: (N, E).
        normal: (N,) bool: clips known to be normal.
        groups: Patient of each clip; None excludes the clip itself only.
        k: Neighbours; all there are when there are fewer.

    Returns:
        (N,) float64, 0 to 2; higher is less normal.

    Raises:
        RequestError: A clip has no normal one of another patient, or features are unusable.
    """
    normal = np.asarray(normal, dtype=bool)
    features = check_features(features, normal, groups)
    if k < 1:
        raise RequestError(f"anomaly: k is {k}; give 1 or more neighbours")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms == 0, 1.0, norms)
    index = group_indices(len(unit), groups)
    distance = 1 - unit @ unit[normal].T
    distance[index[:, None] == index[normal][None]] = np.inf
    nearest = np.sort(distance, axis=1)[:, :k]
    there = np.isfinite(nearest)
    if not there.any(axis=1).all():
        raise RequestError("anomaly: a clip has no normal clip of another patient to be compared with; give more normal patients")
    scores: np.ndarray = np.where(there, nearest, 0).sum(axis=1) / there.sum(axis=1)
    return scores


def anomaly_probe(
    features: np.ndarray,
    abnormal: Sequence[Any] | np.ndarray,
    groups: Sequence[str] | None,
    *,
    name: str = "encoder",
    k: int = 5,
    draws: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score `anomaly_scores` by the area under the ROC curve of abnormal against normal clips, with an interval by patient."""
    abnormal = np.asarray(abnormal, dtype=bool)
    scores = anomaly_scores(features, ~abnormal, groups, k=k)
    rows = np.stack([abnormal.astype(np.float64), scores], axis=1)
    return [score_row(name, f"anomaly_knn{k}", "auroc", rows, groups, statistic=roc_auc, draws=draws, seed=seed)]


# The outline of a chamber


def labels_in_view(
    labels: np.ndarray, frames: Sequence[int], view_map: np.ndarray, size: tuple[int, int], sector: np.ndarray
) -> np.ndarray:
    """Show labels of a screen as a view shows its frames: nearest pixel, `IGNORED` outside the sector.

    Args:
        labels: (T, H, W) integer, of the whole cine.
        frames: Frames that the view shows (`<view>_frame`).
        view_map: (2, 3) `<view>_map` of the view.
        size: (h, w) of the view.
        sector: (h, w) bool of the view.

    Returns:
        (len(frames), h, w) int64.
    """
    y, x = ((np.arange(n) + 0.5) * (2 / n) - 1 for n in size)
    corner = np.asarray(view_map, dtype=np.float64)
    row = (corner[0, 0] * x[None] + corner[0, 1] * y[:, None] + corner[0, 2]) * labels.shape[1]
    column = (corner[1, 0] * x[None] + corner[1, 1] * y[:, None] + corner[1, 2]) * labels.shape[2]
    inside = sector & (row >= 0) & (row < labels.shape[1]) & (column >= 0) & (column < labels.shape[2])
    rows = np.clip(np.floor(row).astype(int), 0, labels.shape[1] - 1)
    columns = np.clip(np.floor(column).astype(int), 0, labels.shape[2] - 1)
    shown = labels[np.asarray(frames)][:, rows, columns].astype(np.int64)
    return np.where(inside, shown, IGNORED)


class FrameHead(nn.Module):
    """Class scores of pixels from the tokens of one frame, in MONAI's two-dimensional blocks.

    `width` 0 is a linear map of each token to the pixels under it (sub-pixel order), what papers call a linear head; otherwise a 1 x 1
    convolution to that many channels, then doublings of size, each with a residual block, as in UNETR's decoder without skips.

    Args:
        dim: Token width E.
        classes: Classes, background included.
        scale: Pixels of the view per token, a power of two.
        width: Channels of the decoder, or 0.
    """

    def __init__(self, dim: int, classes: int, scale: int, width: int = 0) -> None:
        from monai.networks.blocks import Convolution, SubpixelUpsample, UnetOutBlock, UnetResBlock, UpSample

        super().__init__()
        if scale < 1 or scale & (scale - 1):
            raise RequestError(f"segmentation probe: {scale} pixels per token; a power of two is needed; choose size and patch so")
        if width == 0:
            point = Convolution(2, dim, classes * scale**2, kernel_size=1, conv_only=True)
            shuffled = SubpixelUpsample(2, None, scale_factor=scale, conv_block=None, apply_pad_pool=False)
            self.net = nn.Sequential(point, shuffled)
            return
        layers: list[nn.Module] = [Convolution(2, dim, width, kernel_size=1, conv_only=True)]
        for _ in range(scale.bit_length() - 1):
            narrow = max(width // 2, 8)
            layers += [UpSample(2, width, narrow, scale_factor=2), UnetResBlock(2, narrow, narrow, 3, 1, norm_name="instance")]
            width = narrow
        self.net = nn.Sequential(*layers, UnetOutBlock(2, width, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (N, classes, h * scale, w * scale) of tokens (N, h, w, E)."""
        scores: Tensor = self.net(tokens.permute(0, 3, 1, 2))
        return scores


@dataclass(frozen=True)
class HeadSettings:
    """How the head of `segmentation_probe` is fitted.

    Args:
        width: See `FrameHead`.
        steps: Steps of AdamW, cosine to 0.
        batch: Frames per step.
        lr: Peak learning rate; None is 3e-2 for a linear head and 3e-3 for a decoder. Tokens of a frozen encoder lie along few directions,
            and a linear head that is fitted for too short or too slowly says how far it came, not what the tokens hold.
        weight_decay: Of AdamW.
        folds: Folds of patients.
    """

    width: int = 0
    steps: int = 1500
    batch: int = 32
    lr: float | None = None
    weight_decay: float = 1e-3
    folds: int = 3

    @property
    def peak(self) -> float:
        """Peak learning rate."""
        return self.lr if self.lr is not None else 3e-3 if self.width else 3e-2


def fit_head(
    tokens: np.ndarray, labels: np.ndarray, *, classes: int, settings: HeadSettings, seed: int, device: torch.device | str = "cpu"
) -> FrameHead:
    """Fit a head on frozen tokens by cross-entropy and soft Dice (MONAI `DiceCELoss`) over the pixels that are not `IGNORED`.

    Args:
        tokens: (N, h, w, E), standardised by the caller.
        labels: (N, H, W) integers, 0 to classes - 1, or `IGNORED`.
        classes: Classes, background included.
        settings: The fit.
        seed: Seed of weights and batches; the global generators stay as they were.
        device: Where it is fitted.

    Raises:
        RequestError: Labels are not a whole number of pixels per token.
    """
    from monai.losses import DiceCELoss

    (n, height, width), (rows, columns) = labels.shape, tokens.shape[1:3]
    scale = height // rows
    if (rows * scale, columns * scale) != (height, width) or len(tokens) != n:
        raise RequestError(
            f"segmentation probe: tokens {tokens.shape} and labels {labels.shape}; labels must be a multiple of the token grid"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "frame_head"))
        head = FrameHead(tokens.shape[-1], classes, scale, settings.width)
    head.to(device).train()
    loss_of = DiceCELoss(include_background=False, softmax=True, batch=True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.peak, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    order = np.random.default_rng(derive_seed(seed, "frame_batches"))
    x, y = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.float32)), torch.from_numpy(np.ascontiguousarray(labels))
    for _ in range(settings.steps):
        chosen = torch.from_numpy(order.choice(n, min(settings.batch, n), replace=False))
        wanted = y[chosen].to(device)
        counts = (wanted != IGNORED)[:, None]
        truth = F.one_hot(wanted.clamp_min(0), classes).movedim(-1, 1).float()
        # Pixels that do not count get certain scores for the background, which is right there: they add nothing.
        loss = loss_of(torch.where(counts, head(x[chosen].to(device)), CERTAIN * truth), truth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return head.eval()


def segmentation_probe(
    tokens: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | None,
    structures: dict[int, str],
    *,
    name: str = "encoder",
    settings: HeadSettings | None = None,
    draws: int = 2000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Segment frames from frozen tokens with a head fitted on other patients' frames.

    Args:
        tokens: (N, h, w, E) tokens of N frames.
        labels: (N, H, W) integers, 0 background, `IGNORED` where nothing counts.
        groups: Patient of each frame, or None.
        structures: Label value -> name; their Dice is reported.
        name: Name of the features in the rows.
        settings: The fit of the head.
        draws: Bootstrap draws.
        seed: Seed of folds, heads and intervals.
        device: Where heads are fitted.

    Returns:
        Rows as in `score_row` with metric `dice_<name>`, one value per frame, and the predicted labels (N, H, W).
    """
    settings = settings or HeadSettings()
    fold = patient_folds(np.zeros(len(labels)), groups, folds=settings.folds, seed=seed)
    predicted = np.zeros(labels.shape, dtype=np.int64)
    classes = 1 + max(structures)
    if labels.max() >= classes:
        raise RequestError(
            f"segmentation probe: labels up to {labels.max()}, structures name up to {classes - 1}; name all of them"
        )
    for held in np.unique(fold):
        fit, shown = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        seen = tokens[fit].reshape(-1, tokens.shape[-1]).astype(np.float64)
        seen = seen[(seen != 0).any(axis=1)]  # tokens outside the sector were never computed
        mean, scale = seen.mean(axis=0), seen.std(axis=0) + 1e-6
        head = fit_head((tokens[fit] - mean) / scale, labels[fit], classes=classes, settings=settings, seed=seed, device=device)
        with torch.no_grad():
            for part in np.array_split(shown, -(-len(shown) // 64)):
                x = torch.from_numpy(((tokens[part] - mean) / scale).astype(np.float32)).to(device)
                predicted[part] = head(x).argmax(dim=1).cpu().numpy()
    predicted[labels == IGNORED] = 0
    kept = np.where(labels == IGNORED, 0, labels)
    scores = [dice(p, t, structures) for p, t in zip(predicted, kept)]
    rows = []
    for value, structure in structures.items():
        found = np.array([score[value] for score in scores])
        there = np.isfinite(found)
        if there.any():
            own = None if groups is None else [str(groups[int(i)]) for i in np.flatnonzero(there)]
            probe = "linear_head" if settings.width == 0 else f"head{settings.width}"
            rows.append(score_row(name, probe, f"dice_{structure}", found[there], own, draws=draws, seed=seed))
    return rows, predicted
