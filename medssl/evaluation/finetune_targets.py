"""Fine-tuning an encoder for one label per case, a class or a number: volumes, images, stacks and clips.

A run is a function of (cases, settings, labels, seed, weights), as in `finetune`: the pretrained encoder and its scratch twin see the same
cases in the same order with the same augmentation, and start from the same head. Where pictures come from is the caller's business: a
`Batches` yields them, so that whatever a source of pretraining can show can be fine-tuned on.

The state that is scored is the last one, or with `patience` the best on validation cases, which then have chosen it; the result says so.
Temperature and threshold are fitted on validation cases. Test cases are looked at once, after that.

Which cases train is settled in `target_cases`, how fast each part learns in `learning_rates`; here are the settings, the steps and the scores.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError, TrainingStopped
from medssl.evaluation.best_state import BestState
from medssl.evaluation.calibration import calibration_rows, fit_temperature, reliability, softmax, threshold_at_specificity
from medssl.evaluation.features import encode
from medssl.evaluation.learning_rates import factors_inside, hold_norms, parameter_groups, set_learning_rates
from medssl.evaluation.outside import Look, outside, training_range
from medssl.evaluation.scores import balanced_accuracy, mae, mean_auc, r2, score_row
from medssl.evaluation.settings import refuse_settings, settings_of
from medssl.evaluation.target_cases import Cases, training_rows
from medssl.networks.classification import LinearHead, build_head
from medssl.seeding import derive_seed
from medssl.types import ClipBatch, Stack

Images = Tensor | Stack | ClipBatch
SPECIFICITY = 0.95


@dataclass(frozen=True)
class TargetSettings:
    """Everything that a run depends on besides cases, labels, seed and weights.

    Args:
        head: `linear` (pooled features) or `attention` (gated attention over tokens).
        head_args: Its further arguments.
        steps: Optimiser steps.
        batch: Cases per step.
        lr: Peak learning rate of the head (AdamW).
        encoder_lr_scale: Factor on it for a pretrained encoder; the scratch twin always has 1.
        layer_decay: Factor from block to block, counted from the head, for a pretrained encoder; the scratch twin has 1.
        freeze_steps: First steps in which a pretrained encoder does not learn; `steps` keeps it frozen. 0 for the scratch twin.
        weight_decay: Decoupled weight decay, not applied to norms and biases.
        clip: Largest gradient norm.
        warmup_steps: Steps of linear warm-up; cosine decay to 0 follows.
        class_weights: `balanced` (one over the share of the class in the training cases, mean 1), `none`, or one number
            above 0 per class. Of classes only, as `label_smoothing`.
        label_smoothing: Share of a class's probability that goes to all classes.
        val_every: Steps between validations; 0 has none.
        patience: Validations without a better one after which training stops; the best state is then scored. Those of the frozen steps
            do not count, but may hold the best state. None scores the last one.
        flips: Axes of an image or a volume (0 is its first spatial axis) along which test images are also shown mirrored; the mean is
            scored. None by default: mirrored anatomy is a wrong label for everything that has a side.
        augment: Geometric and intensity operations of the views, in training only.
        precision: `fp32`, or `bf16` autocast.
        device: Torch device.
    """

    head: str = "linear"
    head_args: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 500
    batch: int = 16
    lr: float = 1e-3
    encoder_lr_scale: float = 1.0
    layer_decay: float = 0.75
    freeze_steps: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup_steps: int = 50
    class_weights: str | Sequence[float] = "none"
    label_smoothing: float = 0.0
    val_every: int = 50
    patience: int | None = None
    flips: tuple[int, ...] = ()
    augment: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
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
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to below 1"),
            ("val_every", self.val_every >= 0, "0 or more"),
            ("patience", self.patience is None or (self.patience >= 1 and self.val_every > 0), "1 or more, with val_every above 0"),
            (
                "flips",
                all(axis >= 0 for axis in self.flips) and len(set(self.flips)) == len(self.flips),
                "axes from 0 on, none twice",
            ),
            ("precision", self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            (
                "class_weights",
                self.class_weights in ("none", "balanced")
                or (not isinstance(self.class_weights, str) and all(0 < w < math.inf for w in self.class_weights)),
                "none, balanced, or one number above 0 per class",  # of a batch that is of a class of 0 the loss is no number
            ),
        )
        wrong = [f"{name}: {getattr(self, name)!r}; {accepted}" for name, good, accepted in checks if not good]
        refuse_settings(wrong)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TargetSettings:
        """Build settings from a recipe section or a results file; lists become tuples.

        Raises:
            RequestError: A key is unknown.
        """
        return settings_of(cls, values)


class Batches(Protocol):
    """Where pictures come from."""

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Images, Sequence[int]]:
        """Return augmented images and the ids of a step, drawn from `ids`; equal arguments give equal images."""
        ...

    def plain(self, ids: Sequence[int]) -> Iterable[tuple[Images, Sequence[int]]]:
        """Yield the images of ids in their order, without augmentation."""
        ...


@dataclass(frozen=True)
class TargetResult:
    """What a run leaves, as in `results.json`.

    Args:
        arm: Name of the weights, or `scratch`.
        labels: Training cases used.
        seed: Seed.
        task: `classification` or `regression`.
        classes: Names of the classes.
        rows: Scores on the test cases, as in `scores.score_row`.
        cases: One dictionary per test case: id, target, `probability` (K,) or `prediction`, `outside` (see `evaluation.outside`), `facts`.
        reliability: Bins of the reliability plot of the test cases.
        fitted: `temperature` and `threshold` (of two classes), as fitted on validation cases; null where there were none.
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
    classes: list[Any]
    rows: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    reliability: list[dict[str, Any]]
    fitted: dict[str, float | None]
    curve: list[dict[str, Any]]
    choice: str
    seconds: dict[str, float]
    settings: dict[str, Any]
    training_range: dict[str, Any] = field(default_factory=dict)


class Classifier(nn.Module):
    """An encoder and a head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Images) -> Tensor:
        """Return scores (B, K)."""
        scores: Tensor = self.head(encode(self.encoder, images))
        return scores


def class_weights(settings: TargetSettings, targets: np.ndarray, classes: int) -> Tensor | None:
    """Return one weight per class, mean 1 over the cases, or None.

    Raises:
        RequestError: There are more or fewer weights than classes.
    """
    if settings.class_weights == "none":
        return None
    if settings.class_weights == "balanced":
        counts = np.bincount(targets.astype(int), minlength=classes)
        return torch.tensor(len(targets) / (classes * counts), dtype=torch.float32)
    given = list(settings.class_weights)
    if len(given) != classes:
        raise RequestError(f"class_weights: {len(given)} numbers for {classes} classes; give one per class")
    return torch.tensor(given, dtype=torch.float32)


def start(batches: Batches, cases: Cases, settings: TargetSettings, *, labels: int | None, seed: int) -> np.ndarray:
    """Return the training rows, after checking everything that a run can be refused for before its first step.

    Args:
        batches: Where pictures come from; one is looked at where they are to be mirrored.
        cases: All labelled cases.
        settings: See there.
        labels: Training cases; None takes all.
        seed: Of their order.

    Raises:
        RequestError: Cases, pictures and settings do not go together.
    """
    train = training_rows(cases, labels, seed)
    if settings.patience is not None and not len(cases.where("val")):
        raise RequestError("patience needs validation cases, and no labelled case is marked val; mark some, or set patience: null")
    if cases.task == "classification":
        class_weights(settings, cases.targets[train], len(cases.classes))
    else:
        refuse_settings(_of_classes_only(settings))
    if settings.flips:
        images, _ = next(iter(batches.plain([int(cases.ids[train[0]])])))
        _refuse_flips(images, settings.flips)
    return train


def _of_classes_only(settings: TargetSettings) -> list[str]:
    given = {"class_weights": settings.class_weights != "none", "label_smoothing": settings.label_smoothing > 0}
    return [f"{name}: numbers have no classes, and this would do nothing; leave it out" for name, set_ in given.items() if set_]


def _refuse_flips(images: Images, flips: Sequence[int]) -> None:
    if not isinstance(images, Tensor) or images.ndim < 4:  # (B, N, D) is a bag of features, which has no sides
        raise RequestError("flips mirror images and volumes; set flips: [] for stacks, clips and bags of features")
    if max(flips) >= (axes := images.ndim - 2):
        raise RequestError(f"flips: {list(flips)}; these images have {axes} axes; name some of 0 to {axes - 1}, none twice")


def finetune_targets(
    encoder: nn.Module,
    batches: Batches,
    cases: Cases,
    settings: TargetSettings,
    *,
    labels: int | None = None,
    seed: int = 0,
    pretrained: bool,
    arm: str,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> tuple[TargetResult, Classifier]:
    """Train on the first labelled cases and score all test cases.

    Args:
        encoder: With its start weights; it is trained in place.
        batches: Where pictures come from.
        cases: All labelled cases.
        settings: See there.
        labels: Training cases, in `target_cases.few_label_order` of the seed; None takes all.
        seed: Seed of head, order and augmentation.
        pretrained: Whether the encoder is; the scratch twin has no layer decay, no factor and no frozen steps.
        arm: Name in the results.
        on_step: Called with (step, steps, values) at every validation.

    Returns:
        The result, and the network in eval mode with the state that was scored.

    Raises:
        RequestError: Cases and settings do not go together; nothing was trained.
        TrainingStopped: The loss stopped being a number.
    """
    train = start(batches, cases, settings, labels=labels, seed=seed)
    network = _network(encoder, cases, settings, seed)
    learner = _Learner(network, batches, cases, settings, train, seed, pretrained)
    learner.look()
    curve, choice, seconds = learner.train(on_step)
    return learner.score(arm, curve, choice, seconds), network.eval()


def _network(encoder: nn.Module, cases: Cases, settings: TargetSettings, seed: int) -> Classifier:
    dim: Any = encoder.embed_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "finetune", "head"))
        head = build_head(settings.head, int(dim), max(1, len(cases.classes)), **settings.head_args)
    return Classifier(encoder, head).to(settings.device)


class _Learner:
    """The moving parts of a run."""

    def __init__(
        self,
        network: Classifier,
        batches: Batches,
        cases: Cases,
        settings: TargetSettings,
        train: np.ndarray,
        seed: int,
        pretrained: bool,
    ) -> None:
        self.network, self.batches, self.cases, self.settings = network, batches, cases, settings
        self.rows, self.seed, self.pretrained = train, seed, pretrained
        self.row_of = {int(number): row for row, number in enumerate(cases.ids)}
        self.device = torch.device(settings.device)
        self.middle = float(cases.targets[train].mean()) if cases.task == "regression" else 0.0
        self.spread = float(cases.targets[train].std()) if cases.task == "regression" else 1.0
        weights = class_weights(settings, cases.targets[train], len(cases.classes)) if cases.task == "classification" else None
        self.weights = None if weights is None else weights.to(self.device)

    def look(self) -> None:
        """Compare the test cases with the training cases by the encoder as it is before the first step: it is not fitted to these yet."""

        def looks(rows: np.ndarray) -> list[Look]:
            known = [self.cases.looks[int(row)] if self.cases.looks else Look() for row in rows]
            features = self.features(self.cases.ids[rows]).cpu().numpy()
            patients: Sequence[str | None] = self.cases.patients(rows) or [None for _ in rows]
            return [
                replace(look, feature=feature, patient=patient)
                for look, feature, patient in zip(known, features, patients, strict=True)
            ]

        span = training_range(looks(self.rows))
        self.span = span.facts()
        self.outside = [outside(look, span) for look in looks(self.cases.where("test"))]

    def targets(self, ids: Sequence[int]) -> np.ndarray:
        found: np.ndarray = self.cases.targets[[self.row_of[int(number)] for number in ids]]
        return found

    def loss(self, scores: Tensor, targets: np.ndarray) -> Tensor:
        """Cross-entropy, or the Huber loss of numbers brought to mean 0 and variance 1."""
        if self.cases.task == "classification":
            wanted = torch.from_numpy(targets.astype(np.int64)).to(scores.device)
            return functional.cross_entropy(
                scores.float(), wanted, weight=self.weights, label_smoothing=self.settings.label_smoothing
            )
        wanted = torch.from_numpy((targets - self.middle) / self.spread).to(scores.device, torch.float32)
        return functional.smooth_l1_loss(scores.float()[:, 0], wanted)

    def train(
        self, on_step: Callable[[int, int, Mapping[str, float]], None] | None
    ) -> tuple[list[dict[str, Any]], str, dict[str, float]]:
        """Run all steps, or until validation stops; leave the network with the state to be scored."""
        settings, network = self.settings, self.network
        frozen = settings.freeze_steps if self.pretrained else 0
        if isinstance(network.head, LinearHead):
            network.head.settle(self.features(self.cases.ids[self.rows], training=frozen == 0 and len(self.rows) > 1))
        factors = factors_inside(network, "encoder", settings, pretrained=self.pretrained)
        optimizer = torch.optim.AdamW(parameter_groups(network, factors, settings.weight_decay), lr=settings.lr)
        ids = [int(number) for number in self.cases.ids[self.rows]]
        best = BestState(settings.patience, frozen)
        curve: list[dict[str, Any]] = []
        losses: list[float] = []
        times: list[float] = []
        start = time.perf_counter()
        network.train()
        for step in range(settings.steps):
            began = time.perf_counter()
            _, lr = set_learning_rates(optimizer, step, settings, pretrained=self.pretrained)
            hold_norms(network, optimizer, step, settings, pretrained=self.pretrained)
            images, shown = self.batches.training(ids, step, self.seed, settings.batch)
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(
                    derive_seed(self.seed, "finetune", "step", step)
                )  # dropout, equal for both arms and after a restart
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                    scores = network(images)
            loss = self.loss(scores, self.targets(shown))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            times.append(time.perf_counter() - began)
            if not math.isfinite(losses[-1]):
                raise TrainingStopped(
                    f"fine-tuning: the loss is {losses[-1]} at step {step}; it must stay a number; lower lr (now {settings.lr}), "
                    "lengthen warmup_steps, or use precision fp32"
                )
            done = step + 1
            if not settings.val_every or (done % settings.val_every and done != settings.steps):
                continue
            line: dict[str, Any] = {"step": done, "loss": float(np.mean(losses)), "lr": lr}
            losses.clear()
            merit = self.merit()
            if merit is not None:
                line["val"] = merit
            curve.append(line)
            if on_step is not None:
                on_step(done, settings.steps, {"loss": line["loss"]})
            if best.seen(merit, done, network):
                break
        seconds = {"train": time.perf_counter() - start, "per_step": float(np.median(times))}
        return curve, best.restore(network, len(self.cases.where("val"))), seconds

    def features(self, ids: Sequence[int], *, training: bool = False) -> Tensor:
        """Return the pooled features of cases, of the encoder as it is scored or as it is trained.

        The two are far apart where batch norms have seen few batches, or none: those of a training step are not standardised by the others.
        """
        encoder = copy.deepcopy(self.network.encoder).train(training)  # which counts no batch of these
        with torch.no_grad(), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "finetune", "settle"))
            return torch.cat([encode(encoder, images).pooled.float()[-n:] for images, n in self._plain(ids, training)])

    def _plain(self, ids: Sequence[int], training: bool) -> Iterator[tuple[Images, int]]:
        """Yield images and how many of the last ones are asked for; in training no image comes alone, which batch norms cannot take."""
        for images, shown in self.batches.plain(ids):
            if training and len(shown) == 1 and len(ids) > 1:
                beside = ids[0] if ids[0] != shown[0] else ids[1]
                images, _ = next(iter(self.batches.plain([beside, shown[0]])))
            yield images, len(shown)

    @torch.no_grad()
    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Return logits (N, K), or numbers (N, 1), of rows in their order; the mean over mirrored views where asked."""
        self.network.eval()
        found: dict[int, np.ndarray] = {}
        for images, ids in self.batches.plain([int(number) for number in self.cases.ids[rows]]):
            looks = [images, *self._mirrored(images)]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"):
                scores = torch.stack([self.network(look).float() for look in looks]).mean(dim=0).double().cpu().numpy()
            found.update({int(number): row for number, row in zip(ids, scores)})
        self.network.train()
        stacked = np.stack([found[int(self.cases.ids[row])] for row in rows])
        return stacked if self.cases.task == "classification" else stacked * self.spread + self.middle

    def _mirrored(self, images: Images) -> list[Images]:
        if not isinstance(images, Tensor):  # `start` has refused flips of others
            return []
        return [images.flip(2 + axis) for axis in self.settings.flips]

    def merit(self) -> float | None:
        """Return what validation cases say, higher is better: -NLL of classes, -MAE of numbers; None without such cases."""
        rows = self.cases.where("val")
        if not len(rows):
            return None
        scores, targets = self.scores(rows), self.cases.targets[rows]
        if self.cases.task == "regression":
            return -mae(np.stack([targets, scores[:, 0]], axis=1))
        logs = np.log(np.maximum(softmax(scores), 1e-30))
        return float(logs[np.arange(len(rows)), targets.astype(int)].mean())

    def score(self, arm: str, curve: list[dict[str, Any]], choice: str, seconds: dict[str, float]) -> TargetResult:
        """Fit temperature and threshold on validation cases, then score the test cases."""
        cases, rows = self.cases, self.cases.where("test")
        scores, targets, groups = self.scores(rows), cases.targets[rows], cases.patients(rows)
        fitted: dict[str, float | None] = {}
        bins: list[dict[str, Any]] = []
        if cases.task == "regression":
            pairs = np.stack([targets, scores[:, 0]], axis=1)
            table = [score_row(arm, "finetune", name, pairs, groups, statistic=f) for name, f in (("mae", mae), ("r2", r2))]
            values: list[dict[str, Any]] = [{"prediction": float(v)} for v in scores[:, 0]]
        else:
            val = cases.where("val")
            seen = (self.scores(val), cases.targets[val].astype(int)) if len(val) else None
            temperature = fit_temperature(*seen) if seen else None
            chances = softmax(scores, temperature or 1.0)
            threshold = None
            if seen and len(cases.classes) == 2 and (seen[1] == 0).any():
                threshold = threshold_at_specificity(softmax(seen[0], temperature or 1.0)[:, 1], seen[1], SPECIFICITY)
            fitted = {"temperature": temperature, "threshold": threshold}
            table = classification_rows(arm, chances, targets.astype(int), groups, threshold)
            bins = reliability(chances, targets.astype(int))
            values = [{"probability": [float(v) for v in row]} for row in chances]
        facts = [
            {"id": int(cases.ids[row]), "target": float(cases.targets[row]), **value, "outside": flags}
            | ({"facts": dict(cases.facts[int(row)])} if cases.facts else {})
            for row, value, flags in zip(rows, values, self.outside, strict=True)
        ]
        return TargetResult(
            arm=arm, labels=len(self.rows), seed=self.seed, task=cases.task, classes=list(cases.classes), rows=table, cases=facts,
            reliability=bins, fitted=fitted, curve=curve, choice=choice, seconds=seconds, settings=asdict(self.settings),
            training_range=self.span,
        )  # fmt: skip


def classification_rows(
    name: str, chances: np.ndarray, targets: np.ndarray, groups: Sequence[str] | None, threshold: float | None
) -> list[dict[str, Any]]:
    """Return scores of probabilities (N, K): AUC (mean of one against the rest), balanced accuracy, Brier, calibration error.

    With two classes and a threshold from validation cases also sensitivity and specificity there.
    """
    rows = np.concatenate([targets[:, None].astype(np.float64), chances], axis=1)
    called = np.stack([targets, chances.argmax(axis=1)], axis=1).astype(np.float64)
    table = [score_row(name, "finetune", "auroc", rows, groups, statistic=mean_auc)]
    table.append(score_row(name, "finetune", "balanced_accuracy", called, groups, statistic=balanced_accuracy))
    for metric, (value, low, high) in calibration_rows(chances, targets, groups).items():
        table.append({**table[0], "metric": metric, "value": value, "low": _plain(low), "high": _plain(high)})
    if threshold is not None:
        positive = (chances[:, 1] >= threshold).astype(np.float64)
        for metric, kind in (("sensitivity", 1), ("specificity", 0)):
            inside = np.flatnonzero(targets == kind)
            right = positive[inside] if kind else 1 - positive[inside]
            own = None if groups is None else [groups[int(row)] for row in inside]
            if len(inside):
                table.append(score_row(name, "finetune", metric, right, own))
    return table


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
