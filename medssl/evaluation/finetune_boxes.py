"""Fine-tuning an encoder to find boxes in pictures and volumes, pretrained or from scratch, all else equal.

A run is a function of (cases, settings, labels, seed, weights), as in `finetune_targets`: both arms see the same cases in the same order
with the same augmentation, and start from the same pyramid and heads. Where pictures come from is the caller's business (`BoxBatches`).

The state that is scored is the last one, or with `patience` the best on validation cases, which then have chosen it; the result says so.
The score threshold of a single answer is fitted on validation cases: at most one false positive per image there.

Which cases train is settled in `box_cases`, how fast each part learns in `learning_rates`; here are the settings, the steps and the scores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, TrainingStopped
from medssl.evaluation.best_state import BestState
from medssl.evaluation.box_cases import BoxBatches, BoxCases, WholeCase, plain_boxes, training_rows
from medssl.evaluation.detection import (
    OPERATING_RATE,
    ImageBoxes,
    detection_rows,
    match_classes,
    mean_average_precision,
    operating_point,
)
from medssl.evaluation.features import encode, evaluation_mode
from medssl.evaluation.learning_rates import factors_inside, hold_norms, parameter_groups, set_learning_rates
from medssl.evaluation.outside import Look, outside, training_range
from medssl.evaluation.settings import refuse_settings, settings_of
from medssl.networks.detection import DetectorSettings, build_detector, detect_mirrored, detector_faults, losses_of
from medssl.seeding import derive_seed

ENCODER = "feature_extractor.encoder"


@dataclass(frozen=True)
class BoxSettings:
    """Everything that a run depends on besides cases, labels, seed and weights.

    Args:
        detector: Fields of `DetectorSettings`.
        steps: Optimiser steps.
        batch: Pictures or crops per step.
        lr: Peak learning rate of pyramid and heads (AdamW).
        encoder_lr_scale: Factor on it for a pretrained encoder; the scratch twin always has 1.
        layer_decay: Factor from block to block, counted from the head, for a pretrained encoder; the scratch twin has 1.
        freeze_steps: First steps in which a pretrained encoder does not learn. 0 for the scratch twin.
        weight_decay: Decoupled weight decay, not applied to norms and biases.
        clip: Largest gradient norm.
        warmup_steps: Steps of linear warm-up; cosine decay to 0 follows.
        box_weight: Weight of the loss of edges beside that of classes.
        val_every: Steps between scores on validation cases; 0 has none.
        patience: Validations without a better one after which training stops; the best state is then scored. Those of the frozen steps
            do not count, but may hold the best state. None scores the last one.
        overlap: Of windows, where a volume is larger than the training crop.
        flips: Axes (0 is the first) along which test images are also shown mirrored; the boxes are fused, see
            `networks.detection.fuse_boxes`. Mirrored anatomy is a wrong picture of what has a side.
        split: Of label maps: whether every connected part of a structure is an object (lesions), or the structure is one (organs).
        min_voxels: Of label maps: smaller parts are left out and counted.
        foreground: Of volumes: share of crops centred on an object.
        augment: Geometric and intensity operations of the views, in training only.
        figures: Worst test cases that are kept as pictures with their boxes; 0 keeps none.
        device: Torch device.
    """

    detector: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 500
    batch: int = 4
    lr: float = 1e-3
    encoder_lr_scale: float = 1.0
    layer_decay: float = 1.0
    freeze_steps: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup_steps: int = 50
    box_weight: float = 1.0
    val_every: int = 0
    patience: int | None = None
    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    split: bool = True
    min_voxels: int = 1
    foreground: float = 0.67
    augment: Mapping[str, Any] = field(default_factory=dict)
    figures: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks = (
            ("steps", self.steps >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("encoder_lr_scale", self.encoder_lr_scale >= 0, "0 or more"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1"),
            ("freeze_steps", 0 <= self.freeze_steps <= self.steps, "0 to steps"),
            ("warmup_steps", 0 <= self.warmup_steps < self.steps, f"0 to below steps, which is {self.steps}"),
            ("box_weight", self.box_weight > 0, "above 0"),
            ("val_every", self.val_every >= 0, "0 or more"),
            ("patience", self.patience is None or (self.patience >= 1 and self.val_every > 0), "1 or more, with val_every above 0"),
            ("overlap", 0 <= self.overlap < 1, "0 to below 1"),
            ("flips", min(self.flips, default=0) >= 0 and len(set(self.flips)) == len(self.flips), "axes from 0 on, none twice"),
            ("min_voxels", self.min_voxels >= 1, "1 or more"),
            ("foreground", 0 <= self.foreground <= 1, "0 to 1"),
            ("figures", self.figures >= 0, "0 or more"),
        )
        faults = [f"{name}: {getattr(self, name)!r}; {accepted}" for name, good, accepted in checks if not good]
        refuse_settings(faults + [f"detector.{fault}" for fault in detector_faults(self.network)])

    @property
    def network(self) -> DetectorSettings:
        """The settings of the detector."""
        return settings_of(DetectorSettings, self.detector, prefix="detector.")


@dataclass(frozen=True)
class BoxResult:
    """What a run leaves, as in `results.json`.

    Args:
        arm: Name of the weights, or `scratch`.
        labels: Training cases used.
        seed: Seed.
        task: `detection`.
        classes: Names of the classes.
        rows: Scores on the test cases, see `detection.detection_rows`.
        cases: One dictionary per test case: id, `real` [[box, label, ignore, region]], `found` [[box, label, score]], in pixels of the case;
            `outside` (see `evaluation.outside`), `facts`.
        fitted: `threshold` of scores as fitted on validation cases, null where there were none, and the `rate` of false positives per image
            that it allows there.
        curve: What was logged.
        choice: Which state was scored, and which labels chose it.
        seconds: Of training, and per step (median).
        settings: Settings used.
        training_range: What the training cases span, see `outside.TrainingRange.facts`.
    """

    arm: str
    labels: int
    seed: int
    task: str
    classes: list[str]
    rows: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    fitted: dict[str, float | None]
    curve: list[dict[str, Any]]
    choice: str
    seconds: dict[str, float]
    settings: dict[str, Any]
    training_range: dict[str, Any] = field(default_factory=dict)


def start(
    encoder: nn.Module, size: Sequence[int], cases: BoxCases, settings: BoxSettings, *, labels: int | None, seed: int
) -> tuple[np.ndarray, Any]:
    """Return the training rows and the detector before its first step: everything that a run can be refused for.

    Args:
        encoder: With its start weights.
        size: Of the training images.
        cases: All labelled cases.
        settings: See there.
        labels: Training cases; None takes all.
        seed: Of pyramid and heads.

    Raises:
        RequestError: Cases, settings and encoder do not go together.
    """
    train = training_rows(cases, labels, seed)
    if settings.patience is not None and not len(cases.where("val")):
        raise RequestError("patience needs validation cases, and no labelled case is marked val; mark some, or set patience: null")
    if max(settings.flips, default=0) >= len(size):
        raise RequestError(
            f"flips: {list(settings.flips)}; these images have {len(size)} axes; name some of 0 to {len(size) - 1}, none twice"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "finetune", "head"))
        return train, build_detector(encoder, len(cases.classes), size, settings.network)


def finetune_boxes(
    encoder: nn.Module,
    batches: BoxBatches,
    cases: BoxCases,
    settings: BoxSettings,
    *,
    labels: int | None = None,
    seed: int = 0,
    pretrained: bool,
    arm: str,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> tuple[BoxResult, nn.Module]:
    """Train on the first labelled cases and score all test cases.

    Args:
        encoder: With its start weights; it is trained in place.
        batches: Where pictures come from.
        cases: All labelled cases.
        settings: See there.
        labels: Training cases, in `few_label_order` of the seed; None takes all.
        seed: Seed of pyramid, heads, order and augmentation.
        pretrained: Whether the encoder is; the scratch twin has no layer decay, no factor and no frozen steps.
        arm: Name in the results.
        on_step: Called with (step, steps, values) now and then.

    Returns:
        The result, and MONAI's RetinaNet in eval mode with the state that was scored.

    Raises:
        RequestError: Cases, settings and encoder do not go together; nothing was trained.
        TrainingStopped: The loss stopped being a number.
    """
    train, detector = start(encoder, batches.size, cases, settings, labels=labels, seed=seed)
    detector.to(settings.device)
    learner = _Learner(detector, batches, cases, settings, train, seed, pretrained)
    learner.compare()
    curve, choice, seconds = learner.train(on_step)
    result = learner.score(arm, curve, choice, seconds)
    network: nn.Module = detector.network
    return result, network.eval()


class _Learner:
    """The moving parts of a run."""

    def __init__(
        self,
        detector: Any,
        batches: BoxBatches,
        cases: BoxCases,
        settings: BoxSettings,
        train: np.ndarray,
        seed: int,
        pretrained: bool,
    ) -> None:
        self.detector, self.batches, self.cases, self.settings = detector, batches, cases, settings
        self.rows, self.seed, self.pretrained = train, seed, pretrained

    def compare(self) -> None:
        """Compare the test cases with the training cases by the encoder as it is before the first step: it is not fitted to these yet."""
        encoder = self.detector.network.get_submodule(ENCODER)

        def looks(rows: np.ndarray) -> list[Look]:
            known = [self.cases.looks[int(row)] if self.cases.looks else Look() for row in rows]
            patients: Sequence[str | None] = self.cases.patients(rows) or [None for _ in rows]
            found = []
            with evaluation_mode(encoder):
                for row, look, patient in zip(rows, known, patients, strict=True):
                    image = middle(self.batches.whole(int(self.cases.ids[row])), self.batches.size)
                    feature = encode(encoder, image).pooled[0].float().cpu().numpy()
                    found.append(replace(look, feature=feature, patient=patient))
            return found

        span = training_range(looks(self.rows))
        self.span = span.facts()
        self.outside = [outside(look, span) for look in looks(self.cases.where("test"))]

    def train(
        self, on_step: Callable[[int, int, Mapping[str, float]], None] | None
    ) -> tuple[list[dict[str, Any]], str, dict[str, float]]:
        """Run all steps, or until validation stops; leave the network with the state to be scored."""
        settings, network = self.settings, self.detector.network
        frozen = settings.freeze_steps if self.pretrained else 0
        factors = factors_inside(network, ENCODER, settings, pretrained=self.pretrained)
        optimizer = torch.optim.AdamW(parameter_groups(network, factors, settings.weight_decay), lr=settings.lr)
        ids = [int(number) for number in self.cases.ids[self.rows]]
        best = BestState(settings.patience, frozen)
        curve: list[dict[str, Any]] = []
        losses: list[dict[str, float]] = []
        times: list[float] = []
        start = time.perf_counter()
        log_every = settings.val_every or max(1, settings.steps // 10)
        self.detector.train()
        for step in range(settings.steps):
            began = time.perf_counter()
            _, lr = set_learning_rates(optimizer, step, settings, pretrained=self.pretrained)
            hold_norms(network, optimizer, step, settings, pretrained=self.pretrained)
            losses.append(self.step(ids, step, optimizer))
            times.append(time.perf_counter() - began)
            done = step + 1
            if done % log_every and done != settings.steps:
                continue
            line: dict[str, Any] = {"step": done, "lr": lr}
            line |= {name: float(np.mean([row[name] for row in losses])) for name in losses[0]}
            losses.clear()
            merit = self.merit() if settings.val_every else None
            if merit is not None:
                line["val"] = merit
            curve.append(line)
            if on_step is not None:
                on_step(done, settings.steps, {"loss": line["loss"]})
            if best.seen(merit, done, network):
                break
        seconds = {"train": time.perf_counter() - start, "per_step": float(np.median(times))}
        return curve, best.restore(network, len(self.cases.where("val"))), seconds

    def step(self, ids: Sequence[int], step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Take one step and return its losses; the sampling of hard background depends on (seed, step)."""
        settings = self.settings
        images, targets = self.batches.training(ids, step, self.seed, settings.batch)
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "finetune", "step", step))
            parts = losses_of(self.detector, images, targets)
        loss = parts["classification"] + settings.box_weight * parts["box_regression"]
        values = {"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}}
        if not math.isfinite(values["loss"]):
            raise TrainingStopped(
                f"fine-tuning: the loss is {values['loss']} at step {step}; it must stay a number; lower lr (now {settings.lr}), or "
                "lengthen warmup_steps"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.detector.network.parameters(), settings.clip)
        optimizer.step()
        return values

    def look(self, rows: np.ndarray) -> list[ImageBoxes]:
        """Return what is in the cases of rows, and what the network finds, in pixels of the cases."""
        self.detector.eval()
        found = [self.find(self.batches.whole(int(number))) for number in self.cases.ids[rows]]
        self.detector.train()
        return found

    def find(self, case: WholeCase) -> ImageBoxes:
        """Look at a whole case, through windows of the training size where it is larger."""
        size = self.batches.size
        image = padded(case.image, [max(n, s) for n, s in zip(case.image.shape[2:], size)], case.padding)
        wanted = [-(-n // d) * d for n, d in zip(image.shape[2:], self.detector.size_divisible)]
        shown, settings = padded(image, wanted, case.padding), self.settings
        found = detect_mirrored(self.detector, shown, settings.flips, window=size, overlap=settings.overlap)[0]
        scale, offset = np.tile(case.scale, 2), np.tile(case.offset, 2)
        boxes = found["boxes"].double().cpu().numpy() * scale + offset
        return ImageBoxes(
            case.boxes, case.labels, case.ignore, boxes, found["labels"].cpu().numpy(), found["scores"].double().cpu().numpy(),
            case.region,
        )  # fmt: skip

    def merit(self) -> float | None:
        """Return the mAP on validation cases; None without such cases, or boxes in them."""
        rows = self.cases.where("val")
        if not len(rows):
            return None
        value = mean_average_precision(match_classes(self.look(rows), len(self.cases.classes)))
        return None if math.isnan(value) else value

    def score(self, arm: str, curve: list[dict[str, Any]], choice: str, seconds: dict[str, float]) -> BoxResult:
        """Fit the threshold on validation cases, then score the test cases."""
        cases, rows, val = self.cases, self.cases.where("test"), self.cases.where("val")
        threshold = operating_point(self.look(val), len(cases.classes)) if len(val) else None
        images = self.look(rows)
        table = detection_rows(arm, images, cases.classes, cases.patients(rows))
        facts = [
            {"id": int(cases.ids[row]), **plain_boxes(one), "outside": flags}
            | ({"facts": dict(cases.facts[int(row)])} if cases.facts else {})
            for row, one, flags in zip(rows, images, self.outside, strict=True)
        ]
        return BoxResult(
            arm=arm, labels=len(self.rows), seed=self.seed, task="detection", classes=list(cases.classes), rows=table, cases=facts,
            fitted={"threshold": threshold, "rate": OPERATING_RATE}, curve=curve, choice=choice, seconds=seconds,
            settings=asdict(self.settings), training_range=self.span,
        )  # fmt: skip


def middle(case: WholeCase, size: Sequence[int]) -> Tensor:
    """Return the middle of a case (1, C, *size), padded at both ends where it is smaller."""
    image = case.image
    for axis, want in enumerate(size, start=2):
        spare = image.shape[axis] - want
        if spare > 0:
            image = image.narrow(axis, spare // 2, want)
        elif spare < 0:
            ends = [0, 0] * (image.ndim - 1 - axis) + [-spare // 2, -spare - (-spare // 2)]
            image = functional.pad(image, ends, value=case.padding)
    return image


def padded(image: Tensor, size: Sequence[int], value: float) -> Tensor:
    """Return an image (1, C, *n) of at least a size, padded behind its end along every axis."""
    missing = [max(0, want - have) for want, have in zip(size, image.shape[2:])]
    if not any(missing):
        return image
    return functional.pad(image, [v for m in reversed(missing) for v in (0, m)], value=value)
