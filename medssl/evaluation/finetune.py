"""Fine-tuning a MONAI segmentation network on few labelled volumes, pretrained or from scratch, all else equal.

A run is a function of (cohort, settings, labels, seed, weights). The pretrained network and its scratch twin see the
same cases in the same order, the same crops and the same augmentation, and start from the same decoder and head: draws
are keyed by (seed, step, position), and the network is built from the seed before pretrained tensors replace its
encoder.

    out/results.json                 scores of every test case, curve, settings, what was loaded
    out/curve.jsonl                  one line per log point: step, loss, learning rates, validation Dice
    out/network.safetensors, .json   the last state, under the stock network's keys
    out/figures/segmentation.npz     slices, labels and predictions of a few test cases
    out/figures/worst.npz            the slices of the worst test cases where prediction and label differ most
    out/predictions/<case>.nii.gz    optional, on the grid of the image, axes in the order of its file
    out/private/predictions/<case>.dcm   optional, DICOM-SEG on the slices of the series: holds the patient's identity
    out/labels.json                  what the label readers counted: overlaps, voxels outside, ties of raters ...; only where something was
    out/private/cases.csv            beside predictions: which file a case is, readable by the owner alone
    out/private/structures.csv       names of structures as label files have them, where the cohort lists none
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.domains.label_files.base import Grid
from medssl.domains.label_files.write import check_source, in_file_axes, need_highdicom, write_dicom_seg
from medssl.encoders.loading import load_into
from medssl.errors import RequestError, TrainingStopped, WeightsError
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.features import encode
from medssl.evaluation.metrics import dice, hd95_mm, mean_score, volumes_ml
from medssl.evaluation.outside import Look, outside, training_range
from medssl.evaluation.settings import refuse_settings, settings_of
from medssl.evaluation.volumes import (
    CaseReader,
    TrainingCrops,
    Volume,
    comparable,
    cut,
    known_values,
    labelled_classes,
    whole_image,
)
from medssl.evaluation.worst import WorstCases
from medssl.networks.segmentation import LoadReport, encoder_parameters, library_of, load_pretrained, set_head_prior
from medssl.registry import lookup
from medssl.seeding import counter_rng, derive_seed
from medssl.weights import load_part, save_part, write_atomic, write_private

log = logging.getLogger(__name__)

FIGURE_SIZE = 128  # voxels per axis that a picture keeps at most


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that a fine-tuning run depends on besides cohort, number of labels, seed and weights.

    Args:
        network: Registered network: `segresnet`, `unetr` or `swin_unetr`.
        network_args: Further arguments of its builder.
        encoder: `{"name": ..., "args": {...}}`. Weights, where given, decide the arguments; a scratch run alone has no
            other source.
        domain: Registered domain that reads the images.
        domain_args: Its arguments.
        normalize: As in `VolumeViews`; must be what the encoder was pretrained with.
        spacing_mm: Voxel size to train at; None keeps each volume's own.
        crop: Training crop and inference window (X, Y, Z) in voxels.
        steps: Optimiser steps.
        batch: Crops per step.
        lr: Peak learning rate (AdamW).
        encoder_lr_scale: Factor on the learning rate of a pretrained encoder; the scratch twin always has 1.
        freeze_steps: First steps in which a pretrained encoder has learning rate 0, its gradients still flowing, so
            that decoder and head settle first; then everything warms up again ("sawtooth"). 0 for the scratch twin.
        transfer: `encoder`, or `encoder_decoder` for a SegResNet or SwinUNETR pretrained with its decoder.
        weight_decay: Decoupled weight decay, not applied to norms and biases.
        clip: Largest gradient norm.
        warmup_steps: Steps of linear warm-up; cosine decay to 0 follows.
        dice_weight: Weight of the Dice loss.
        ce_weight: Weight of the cross-entropy.
        batch_dice: Dice over the whole batch instead of the mean over samples: no empty structure in a crop then.
        include_background: Whether Dice counts background as a structure.
        head_prior: Whether the head starts at the class frequencies of the training labels, see `set_head_prior`:
            without it a seed may lose a small structure for good.
        foreground: Share of crops centred on a voxel of a structure, each structure equally often.
        raters: What to learn from where a case has label maps of several raters: `majority`, or `draw`, one rater's map at random
            for each crop. Scores always take the majority.
        augment: Geometric and intensity operations of `VolumeViews`. Flips are absent on purpose: mirrored anatomy
            turns left into right, which is a wrong label for every paired organ.
        precision: `fp32`, or `bf16` autocast.
        log_every: Steps between lines of the curve.
        val_every: Steps between scores on validation cases; 0 has none. They choose nothing: tables use the last state.
        val_cases: Validation cases scored for the curve.
        overlap: Overlap of inference windows, 0 to below 1.
        predictions: Whether to write predictions as NIfTI.
        dicom_seg: Whether to write predictions as DICOM-SEG; images must be DICOM series, and highdicom installed (extra `seg`).
        figures: Test cases pictured.
        device: Torch device.
    """

    network: str = "segresnet"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] | None = None
    domain: str = "mri"
    domain_args: Mapping[str, Any] = field(default_factory=dict)
    normalize: str | Mapping[str, Any] = "zscore"
    spacing_mm: tuple[float, float, float] | None = None
    crop: tuple[int, int, int] = (96, 96, 96)
    steps: int = 2000
    batch: int = 2
    lr: float = 3e-3
    encoder_lr_scale: float = 1.0
    freeze_steps: int = 0
    transfer: str = "encoder"
    weight_decay: float = 1e-2
    clip: float = 1.0
    warmup_steps: int = 50
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    batch_dice: bool = True
    include_background: bool = False
    head_prior: bool = True
    foreground: float = 0.67
    raters: str = "majority"
    augment: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    log_every: int = 10
    val_every: int = 0
    val_cases: int = 8
    overlap: float = 0.5
    predictions: bool = False
    dicom_seg: bool = False
    figures: int = 3
    device: str = "cpu"

    def __post_init__(self) -> None:
        faults = [
            f"{name}: {value!r}; {accepted}"
            for name, value, good, accepted in (
                (
                    "transfer",
                    self.transfer,
                    self.transfer in ("encoder", "encoder_decoder"),
                    "encoder or encoder_decoder",
                ),
                ("precision", self.precision, self.precision in ("fp32", "bf16"), "fp32 or bf16"),
                ("raters", self.raters, self.raters in ("majority", "draw"), "majority or draw"),
                ("steps", self.steps, self.steps >= 1, "1 or more"),
                ("batch", self.batch, self.batch >= 1, "1 or more"),
                ("lr", self.lr, self.lr > 0, "above 0"),
                ("encoder_lr_scale", self.encoder_lr_scale, self.encoder_lr_scale >= 0, "0 or more"),
                ("freeze_steps", self.freeze_steps, 0 <= self.freeze_steps < self.steps, "0 to below steps"),
                ("warmup_steps", self.warmup_steps, 0 <= self.warmup_steps < self.steps, "0 to below steps"),
                ("foreground", self.foreground, 0 <= self.foreground <= 1, "0 to 1"),
                ("overlap", self.overlap, 0 <= self.overlap < 1, "0 to below 1"),
                (
                    "dice_weight + ce_weight",
                    self.dice_weight + self.ce_weight,
                    self.dice_weight + self.ce_weight > 0,
                    "above 0",
                ),
                ("crop", self.crop, len(self.crop) == 3 and min(self.crop) >= 1, "three positive numbers"),
            )
            if not good
        ]
        refuse_settings(faults)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """Build settings from a recipe section or a results file; lists become tuples.

        Raises:
            RequestError: A key is unknown.
        """
        return settings_of(cls, values)


@dataclass(frozen=True)
class Pretrained:
    """Weights as `open_weights` read them.

    Args:
        state: Encoder tensors.
        manifest: Their manifest.
        decoder_state: Decoder tensors; None transfers the encoder alone.
    """

    state: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    decoder_state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class CaseScore:
    """Scores of one test case, per structure name; None where the structure is in neither map, or not labelled (volumes).

    Volumes in ml are of the prediction (`volume_ml`) and of the label map (`reference_ml`). `outside` says in what the case lies outside
    the training range (`evaluation.outside`); None where nobody looked. `facts` are those of its series in the index.
    """

    id: str
    patient: str
    dice: dict[str, float | None]
    hd95_mm: dict[str, float | None]
    volume_ml: dict[str, float | None] = field(default_factory=dict)
    reference_ml: dict[str, float | None] = field(default_factory=dict)
    outside: list[dict[str, str]] | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the structures that have one, NaN when none has."""
        return mean_score({i: v for i, v in enumerate(self.dice.values()) if v is not None})


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves, as in `results.json`.

    Args:
        arm: Name of the weights, or `scratch`.
        labels: Labelled training cases used.
        seed: Seed.
        structures: Names of the structures.
        cases: Scores of every test case.
        curve: Lines of `curve.jsonl`.
        loaded: Counts of the weight loading; None from scratch.
        choice: Which state was scored and which labels chose it.
        seconds: Wall time of training, and per step (median).
        settings: Settings used.
        training_range: What the training cases span, see `outside.TrainingRange.facts`; empty in results of earlier versions.
    """

    arm: str
    labels: int
    seed: int
    structures: list[str]
    cases: list[CaseScore]
    curve: list[dict[str, Any]]
    loaded: dict[str, int] | None
    choice: str
    seconds: dict[str, float]
    settings: dict[str, Any]
    training_range: dict[str, Any] = field(default_factory=dict)

    def mean(self, metric: str = "dice") -> dict[str, float]:
        """Return the mean of `dice` or `hd95_mm` per structure over the test cases that have it."""
        means = {}
        for name in self.structures:
            values = [getattr(case, metric)[name] for case in self.cases]
            kept = [value for value in values if value is not None]
            means[name] = float(np.mean(kept)) if kept else float("nan")
        return means

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN is null."""
        content = asdict(self)
        content["n_test"] = len(self.cases)
        content["mean"] = {metric: {k: _plain(v) for k, v in self.mean(metric).items()} for metric in ("dice", "hd95_mm")}
        content["mean_dice"] = _plain(float(np.nanmean([case.mean_dice for case in self.cases])) if self.cases else math.nan)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FinetuneResult:
        """Read what `to_json` made."""
        values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        values["cases"] = [CaseScore(**case) for case in values["cases"]]
        return cls(**values)


def open_weights(path: Path | str, *, transfer: str = "encoder") -> Pretrained:
    """Read an encoder, and with `encoder_decoder` its decoder, from a run folder, weights folder or safetensors file.

    Raises:
        WeightsError: They are missing or damaged, or there is no decoder.
    """
    state, manifest = load_part(path)
    decoder = None
    if transfer == "encoder_decoder":
        try:
            decoder, _ = load_part(path, "decoder")
        except WeightsError as err:
            raise WeightsError(
                f"transfer encoder_decoder: {err}; exports hold the encoder alone: "
                "give the run folder of a segresnet3d, swin3d or resenc3d, or set transfer: encoder"
            ) from err
    return Pretrained(state, manifest, decoder)


@dataclass
class _Run:
    """The moving parts of one run, so that the steps below stay small functions."""

    settings: FinetuneSettings
    network: nn.Module
    device: torch.device
    seed: int
    structures: dict[int, str]
    reader: CaseReader


def finetune(
    cohort: Cohort,
    settings: FinetuneSettings,
    out: Path,
    *,
    labels: int | None = None,
    seed: int = 0,
    weights: Pretrained | None = None,
    arm: str | None = None,
    reader: CaseReader | None = None,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> FinetuneResult:
    """Train on the first labelled cases, score all test cases with the last state, and write everything to a folder.

    Test labels are read after the last step. Validation labels draw the curve and choose nothing.

    Args:
        cohort: The labelled set.
        settings: See there.
        out: Folder for the results, created when missing.
        labels: Number of training cases in few-label order; None takes all.
        seed: Seed of start weights and draws. Equal seeds pair a pretrained run with its scratch twin.
        weights: Pretrained weights; None is the scratch twin.
        arm: Name in the results; None is `pretrained` or `scratch`.
        reader: To share loaded volumes between runs.
        on_step: Called with (step, steps, values) at every log point.

    Raises:
        RequestError: Settings, cohort and weights do not go together; nothing was trained.
        TrainingStopped: The loss stopped being a number.
    """
    train_cases, test_cases = cohort.first(labels), cohort.split("test")
    if not test_cases:
        raise RequestError(f"cohort {cohort.name}: no labelled test cases; mark some as test in its table")
    settings = with_encoder(settings, weights)
    if settings.dicom_seg:
        check_dicom_seg(test_cases)
    reader = reader or CaseReader(settings.domain, settings.domain_args)
    structures = structures_of(cohort, reader)
    device = torch.device(settings.device)
    network = build_network(settings, n_classes=1 + max(structures), seed=seed)
    loaded = load(network, weights) if weights is not None else None
    if settings.head_prior:
        set_head_prior(network, class_frequencies([reader(case) for case in train_cases], 1 + max(structures)))
    run = _Run(settings, network.to(device), device, seed, structures, reader)
    log.info("fine-tuning on %d volumes, %d steps", len(train_cases), settings.steps)
    out = Path(out)
    write_atomic(out / "curve.jsonl", b"")  # a folder that cannot be written says so now, not after the last step
    encoder = start_encoder(settings, weights, seed).to(device)
    span = training_range([look_at(encoder, reader(case), case, settings) for case in train_cases])
    curve, seconds = _train(run, train_cases, cohort.split("val")[: settings.val_cases], out, weights is not None, on_step)
    flags = {case.id: outside(look_at(encoder, reader(case), case, settings), span) for case in test_cases}
    scores = [replace(score, outside=flags[score.id]) for score in _test(run, test_cases, out)]
    result = FinetuneResult(
        arm=arm or ("scratch" if weights is None else "pretrained"),
        labels=len(train_cases),
        seed=seed,
        structures=list(structures.values()),
        cases=scores,
        curve=curve,
        loaded=None if loaded is None else asdict(loaded),
        choice="last state; validation labels chose nothing",
        seconds=seconds,
        settings=asdict(settings),
        training_range=span.facts(),
    )
    _write(run, result, out, weights, data_cards(cohort, weights))
    write_label_counts(out, reader, cohort)
    return result


def with_encoder(settings: FinetuneSettings, weights: Pretrained | None) -> FinetuneSettings:
    """Return the settings with the encoder filled in from the weights, after checking that they go together.

    Raises:
        RequestError: Neither names an encoder, or the images would be normalised otherwise than in pretraining.
        WeightsError: Settings and weights name different encoders.
    """
    if weights is None:
        if settings.encoder is None:
            raise RequestError(
                "fine-tuning from scratch: no encoder is named; weights would name one; set encoder to "
                '{"name": "segresnet3d", "args": {...}}'
            )
        return settings
    manifest = weights.manifest
    encoder = manifest["encoder"]
    if settings.encoder is not None and settings.encoder.get("name") != encoder.get("name"):
        raise WeightsError(
            f"the weights are of encoder {encoder.get('name')}, the settings name {settings.encoder.get('name')}; "
            "leave encoder out of the settings to take it from the weights"
        )
    how = dict(manifest.get("intensity") or {}).get("normalize")
    if how is not None and _plain_normalize(how) != _plain_normalize(settings.normalize):
        raise RequestError(
            f"the weights were pretrained with normalize {how}, the settings say {settings.normalize}; features would "
            f"meet other intensities; set normalize: {how}"
        )
    return replace(settings, encoder=encoder)


def _plain_normalize(how: Any) -> Any:
    return json.loads(json.dumps(dict(how) if isinstance(how, Mapping) else how))


def build_network(settings: FinetuneSettings, *, n_classes: int, seed: int) -> nn.Module:
    """Build the network with start weights that depend on the seed alone; the global generator is left as it was."""
    builder = lookup("network", settings.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "finetune", "network"))
        network: nn.Module = builder(
            encoder=settings.encoder, out_channels=n_classes, image_size=settings.crop, **settings.network_args
        )
    return network


def start_encoder(settings: FinetuneSettings, weights: Pretrained | None, seed: int) -> Any:
    """Return the encoder as it is before the first step, in eval mode: what cases are compared by.

    A fine-tuned one has been fitted to the training cases, so that every other case would look far away.
    """
    assert settings.encoder is not None
    args = dict(settings.encoder.get("args") or {})
    if "image_size" in args:
        args["image_size"] = settings.crop
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "finetune", "look"))
        encoder = lookup("encoder", settings.encoder["name"])(**args)
    if weights is not None:
        load_into(encoder, weights.state, {"part": "encoder", **weights.manifest})
    return encoder.eval()


@torch.no_grad()
def look_at(encoder: Any, volume: Volume, case: Case, settings: FinetuneSettings) -> Look:
    """Return voxel size, vendor and encoder feature of a case: the mean over the middle crop, as the network sees it."""
    device = next(encoder.parameters()).device
    image, padding = whole_image(volume, settings.normalize, settings.spacing_mm, device)
    for axis, size in enumerate(settings.crop, start=2):
        spare = image.shape[axis] - size
        if spare > 0:
            image = image.narrow(axis, spare // 2, size)
        elif spare < 0:
            before = torch.full_like(image.narrow(axis, 0, 1), padding).repeat_interleave(-spare // 2, dim=axis)
            after = torch.full_like(image.narrow(axis, 0, 1), padding).repeat_interleave(-spare - (-spare // 2), dim=axis)
            image = torch.cat([before, image, after], dim=axis)
    channels = encoder.config()["args"].get("in_channels", 1)
    feature = encode(encoder, image.expand(-1, channels, -1, -1, -1)).pooled[0].float().cpu().numpy()
    return Look(tuple(volume.spacing_mm), case.facts.get("vendor"), feature, case.patient)


def load(network: nn.Module, weights: Pretrained) -> LoadReport:
    """Load the weights into the network, see `medssl.networks.segmentation.load_pretrained`."""
    return load_pretrained(network, weights.state, weights.manifest, decoder_state=weights.decoder_state)


def structures_of(cohort: Cohort, reader: CaseReader) -> dict[int, str]:
    """Return label value to name: from the cohort, else the values in the training labels, however few are used.

    Raises:
        RequestError: The training labels hold no structure.
    """
    if cohort.structures:
        return dict(cohort.structures)
    values: set[int] = set()
    for case in cohort.split("train"):
        values.update(reader(case).points)
    if not values:
        raise RequestError(f"cohort {cohort.name}: its training label maps hold background only; label values are 1, 2, 3 ...")
    return {value: f"structure_{value}" for value in sorted(values)}


def class_frequencies(volumes: Sequence[Volume], n_classes: int) -> list[float]:
    """Return the share of sure voxels of each class, mean over the volumes that label it.

    Background is what remains where some volumes label a structure and some do not.
    """
    shares = np.zeros((len(volumes), n_classes))
    asked = np.array([[k == 0 or volume.labels(k) for k in range(n_classes)] for volume in volumes])
    for row, volume in zip(shares, volumes):
        assert volume.label is not None
        sure = volume.label[volume.label >= 0]
        row += np.bincount(sure.ravel(), minlength=n_classes)[:n_classes] / max(1, sure.size)
    means = shares.sum(axis=0, where=asked) / np.maximum(asked.sum(axis=0), 1)
    if not asked.all():
        means[0] = max(0.0, 1.0 - means[1:].sum())
    return [float(share) for share in means]


def learning_rates(step: int, settings: FinetuneSettings, *, pretrained: bool) -> tuple[float, float]:
    """Return the learning rates of encoder and rest at a step.

    Linear warm-up and cosine decay to 0. With `freeze_steps` a pretrained encoder has 0 first while the rest warms up;
    then both warm up from 0 ("sawtooth", OpenMind benchmark, arXiv 2412.17041).
    """
    freeze = settings.freeze_steps if pretrained else 0
    rise = max(1, settings.warmup_steps)
    if step < freeze:
        return 0.0, settings.lr * min(1.0, (step + 1) / rise)
    start = freeze + settings.warmup_steps
    if step < start:
        factor = (step - freeze + 1) / rise
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, settings.steps - start)))
    return settings.lr * factor * (settings.encoder_lr_scale if pretrained else 1.0), settings.lr * factor


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups: encoder and rest, each with and without decay (none on norms and biases)."""
    encoder = encoder_parameters(network)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in encoder, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "encoder": is_encoder, "weight_decay": weight_decay if decays else 0.0}
        for (is_encoder, decays), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_loss(settings: FinetuneSettings) -> Callable[..., Tensor]:
    """Return Dice plus cross-entropy on logits (B, K, *size) in float32 and labels (B, 1, *size), -1 uncertain.

    A third argument, (B, K) bool, says which classes each sample labels (see `labelled_classes`); None stands for all classes and
    no uncertain voxel, and is MONAI's own `DiceCELoss`. Otherwise:

    - A sample's classes that it does not label are merged with its background: their probabilities are added, as nobody said
      which of them a background voxel is. No gradient tells them from background.
    - Uncertain voxels count in neither term.
    - A class enters the mean of the Dice terms with the samples that label it; a class that none labels does not enter.

    Reference:
        Shi et al. 2021, "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", section 3.2 (marginal
        cross-entropy and Dice).
    """
    from monai.losses import DiceCELoss

    loss = DiceCELoss(
        include_background=settings.include_background,
        to_onehot_y=True,
        softmax=True,
        batch=settings.batch_dice,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_dice=settings.dice_weight,
        lambda_ce=settings.ce_weight,
    )

    def loss_of(logits: Tensor, labels: Tensor, labelled: Tensor | None = None) -> Tensor:
        whole: Tensor = loss(logits.float(), labels) if labelled is None else partial_loss(logits, labels, labelled, settings)
        return whole

    return loss_of


def partial_loss(logits: Tensor, labels: Tensor, labelled: Tensor, settings: FinetuneSettings) -> Tensor:
    """Return the loss of samples that label some of the classes, see `build_loss`.

    Args:
        logits: (B, K, *size).
        labels: (B, 1, *size) int64; -1 uncertain, and no class that its sample does not label.
        labelled: (B, K) bool, background True.
        settings: Weights of the terms.
    """
    from monai.losses import DiceLoss

    labelled = labelled.to(logits.device)
    open_classes = labelled.view(*labelled.shape, *[1] * (logits.ndim - 2))
    scores = logits.float().log_softmax(dim=1)
    hidden = scores.masked_fill(open_classes, -math.inf)
    background = torch.cat([scores[:, :1], hidden[:, 1:]], dim=1).logsumexp(dim=1, keepdim=True)
    scores = torch.cat([background, scores[:, 1:].masked_fill(~open_classes[:, 1:], -1e4)], dim=1)  # exp(-1e4) is 0
    sure = labels >= 0
    target = labels.clamp(min=0)
    entropy = -scores.gather(1, target)[sure].sum() / sure.sum().clamp(min=1)
    onehot = torch.zeros_like(scores).scatter_(1, target, 1.0)
    terms: Tensor = DiceLoss(include_background=True, batch=settings.batch_dice, smooth_nr=1e-5, smooth_dr=1e-5, reduction="none")(
        scores.exp() * sure, onehot * sure
    )
    counted = labelled.any(dim=0) if settings.batch_dice else labelled  # (K,) or (B, K)
    terms = terms.reshape(counted.shape)
    if not settings.include_background:
        terms, counted = terms[..., 1:], counted[..., 1:]
    dice_term: Tensor = terms[counted].sum() / counted.sum().clamp(min=1)
    return settings.dice_weight * dice_term + settings.ce_weight * entropy


def case_order(n_cases: int, seed: int) -> Iterator[int]:
    """Yield case numbers for ever: one shuffled pass over all cases after another, so each is seen equally often."""
    epoch = 0
    while True:
        yield from (int(i) for i in counter_rng(seed, "finetune", "order", epoch).permutation(n_cases))
        epoch += 1


def _train(
    run: _Run,
    cases: Sequence[Case],
    val_cases: Sequence[Case],
    out: Path,
    pretrained: bool,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run all steps; return the curve and the seconds taken."""
    settings, network = run.settings, run.network
    if run.device.type == "cpu":
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # 1.1 to 1.5x on CPU
    crops = TrainingCrops(
        size=settings.crop,
        spacing_mm=settings.spacing_mm,
        normalize=settings.normalize,
        augment=settings.augment,
        foreground=settings.foreground,
        seed=run.seed,
        device=run.device,
        raters=settings.raters,
    )
    volumes = [run.reader(case) for case in cases]
    order = case_order(len(cases), run.seed)
    loss_of = build_loss(settings)
    optimizer = torch.optim.AdamW(parameter_groups(network, settings.weight_decay), lr=settings.lr)
    curve: list[dict[str, Any]] = []
    times: list[float] = []
    losses: list[float] = []
    start = time.perf_counter()
    network.train()
    for step in range(settings.steps):
        began = time.perf_counter()
        encoder_lr, lr = learning_rates(step, settings, pretrained=pretrained)
        for group in optimizer.param_groups:
            group["lr"] = encoder_lr if group["encoder"] else lr
        chosen = [volumes[next(order)] for _ in range(settings.batch)]
        images, labels = crops.batch(chosen, step)
        labelled = labelled_classes(chosen, 1 + max(run.structures))
        losses.append(train_step(network, optimizer, loss_of, (images, labels, labelled), settings))
        times.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            raise TrainingStopped(
                f"fine-tuning: the loss is {losses[-1]} at step {step}; it must stay a number; "
                f"lower lr (now {settings.lr}), lengthen warmup_steps, or use precision fp32"
            )
        done = step + 1
        validate = bool(settings.val_every and val_cases and (done % settings.val_every == 0 or done == settings.steps))
        if validate or done % settings.log_every == 0 or done == settings.steps:
            line: dict[str, Any] = {"step": done, "loss": float(np.mean(losses)), "lr": lr, "encoder_lr": encoder_lr}
            losses.clear()
            if validate:
                line["val_dice"] = _validation_dice(run, val_cases)
            curve.append(line)
            if validate or done == settings.steps:
                write_atomic(out / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in curve).encode())
            if on_step is not None:
                on_step(done, settings.steps, {"loss": line["loss"]})
    return curve, {"train": time.perf_counter() - start, "per_step": float(np.median(times))}


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[..., Tensor],
    batch: tuple[Tensor, Tensor, Tensor | None],
    settings: FinetuneSettings,
) -> float:
    """Do one optimiser step and return its loss.

    Args:
        network: In training mode.
        optimizer: Of its parameters, learning rates set.
        loss_of: See `build_loss`.
        batch: Images (B, C, *size), labels (B, 1, *size), and which classes each labels.
        settings: Precision and largest gradient norm.
    """
    images, labels, labelled = batch
    with autocast(settings, images.device):
        logits = network(images)
    loss = loss_of(logits, labels, labelled)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    optimizer.step()
    return float(loss.detach())


def autocast(settings: FinetuneSettings, device: torch.device) -> torch.autocast:
    """Return the autocast context of the settings; a no-op with fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


@torch.no_grad()
def predict(network: nn.Module, volume: Volume, settings: FinetuneSettings) -> np.ndarray:
    """Segment a whole volume with MONAI's sliding window.

    Args:
        network: In any mode; it is left in eval mode.
        volume: As `CaseReader` returns it.
        settings: Crop, overlap, normalisation, spacing and precision.

    Returns:
        (X, Y, Z) int16 label map on the grid of the volume.
    """
    from monai.inferers import sliding_window_inference

    network.eval()
    device = next(network.parameters()).device
    image, padding = whole_image(volume, settings.normalize, settings.spacing_mm, device)  # (1, C, *resampled)
    with autocast(settings, device):
        logits = sliding_window_inference(
            image, settings.crop, settings.batch, network, overlap=settings.overlap, mode="gaussian", cval=padding
        )
    assert isinstance(logits, Tensor)
    logits = logits.float()
    shape = volume.image.shape[1:]
    if tuple(logits.shape[2:]) != tuple(shape):
        logits = nn.functional.interpolate(logits, size=tuple(shape), mode="trilinear", align_corners=False)
    label: np.ndarray = logits[0].argmax(dim=0).to(torch.int16).cpu().numpy()
    return label


def _validation_dice(run: _Run, cases: Sequence[Case]) -> dict[str, float | None]:
    """Mean Dice per structure; training mode is restored."""
    scores = []
    for case in cases:
        volume = run.reader(case)
        known_values(volume, run.structures, case)
        found, label, scored = comparable(predict(run.network, volume, run.settings), volume, run.structures)
        scores.append(dice(found, label, scored))
    run.network.train()
    means = {}
    for value, name in run.structures.items():
        kept = [score[value] for score in scores if not np.isnan(score.get(value, math.nan))]
        means[name] = float(np.mean(kept)) if kept else None
    return means


def _test(run: _Run, cases: Sequence[Case], out: Path) -> list[CaseScore]:
    """Score every test case on its own grid; write pictures and, when asked, predictions.

    A structure that a case does not label has no score there, as one that is in neither map.
    """
    scores, pictures, worst = [], [], WorstCases()
    for number, case in enumerate(cases):
        volume = run.reader(case)
        known_values(volume, run.structures, case)
        found = predict(run.network, volume, run.settings)
        sure, label, scored = comparable(found, volume, run.structures)
        overlap = dice(sure, label, scored)
        distance = hd95_mm(sure, label, scored, volume.spacing_mm)
        scores.append(
            CaseScore(
                id=case.id,
                patient=case.patient_id,
                dice={name: _plain(overlap.get(value, math.nan)) for value, name in run.structures.items()},
                hd95_mm={name: _plain(distance.get(value, math.nan)) for value, name in run.structures.items()},
                volume_ml={run.structures[k]: ml for k, ml in volumes_ml(sure, scored, volume.affine).items()},
                reference_ml={run.structures[k]: ml for k, ml in volumes_ml(label, scored, volume.affine).items()},
                facts=dict(case.facts),
            )
        )
        if run.settings.figures:
            worst.show(case.id, scores[-1].mean_dice, volume.image[0], label, sure, volume.spacing_mm)
        if number < run.settings.figures:
            pictures.append((volume, found, scores[-1].mean_dice))
        if run.settings.predictions:
            write_prediction(out / "predictions" / f"{case.id}.nii.gz", found, volume, case)
        if run.settings.dicom_seg:
            write_dicom_prediction(out / "private" / "predictions" / f"{case.id}.dcm", found, volume, case, run.structures)
    write_case_names(out / "private" / "cases.csv", cases)
    if pictures:
        write_figures(out / "figures" / "segmentation.npz", pictures, run.structures)
    if worst.kept:
        write_atomic(out / "figures" / "worst.npz", worst.to_npz(run.structures))
    return scores


def check_dicom_seg(cases: Sequence[Case]) -> None:
    """Refuse a run that could not write its predictions as DICOM-SEG, before the first step.

    Raises:
        RequestError: highdicom is missing, or an image is no DICOM series of single slices.
    """
    need_highdicom()
    for case in cases:
        try:
            check_source(case.image_files)
        except RequestError as err:
            raise RequestError(f"case {case.id}: {err}") from None


def write_dicom_prediction(path: Path, label: np.ndarray, volume: Volume, case: Case, structures: Mapping[int, str]) -> None:
    """Write a label map as DICOM-SEG on the slices of its series, for the owner alone; see `label_files.write.write_dicom_seg`."""
    from medssl import __version__

    x, y, z = label.shape
    write_dicom_seg(path, label, Grid(volume.affine, (x, y, z)), case.image_files, structures, version=__version__)


def write_prediction(path: Path, label: np.ndarray, volume: Volume, case: Case) -> None:
    """Write a label map as NIfTI on the grid of its image, atomically.

    Where the image is one file, axes run as they do in the file; for a DICOM series they are canonical (RAS).
    """
    import gzip

    import nibabel

    image = nibabel.Nifti1Image(*in_file_axes(label, volume.affine, case.image_files))
    image.header.set_xyzt_units("mm")
    write_atomic(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_case_names(path: Path, cases: Sequence[Case]) -> None:
    """Write case id, image name and patient for the owner alone (mode 0600 in a folder of mode 0700)."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["case", "image", "patient"])
    writer.writerows([case.id, case.series_id or case.image.name, case.patient] for case in cases)
    write_private(path, text.getvalue().encode())


def write_label_counts(out: Path, reader: CaseReader, cohort: Cohort) -> None:
    """Write what the label readers counted, and for the owner alone the structure names of files where the cohort lists none."""
    rows = {case.id: reader.label_facts[case.id] for case in cohort.cases if case.id in reader.label_facts}
    if rows:
        content = {"overlap": "the higher value has the voxel", "cases": rows}
        write_atomic(out / "labels.json", json.dumps(content, indent=1).encode())
    if cohort.file_names:
        import csv
        import io

        text = io.StringIO()
        csv.writer(text).writerows([["value", "name"], *([str(value), name] for value, name in cohort.file_names.items())])
        write_private(out / "private" / "structures.csv", text.getvalue().encode())


def write_figures(path: Path, pictures: Sequence[tuple[Volume, np.ndarray, float]], structures: Mapping[int, str]) -> None:
    """Write a few cases as `segmentation.npz`, cut around their structures to one common size.

    `image` (N, X, Y, Z) float32, `label` and `prediction` (N, X, Y, Z) uint8 with structure k as k-th name,
    `spacing_mm` (N, 3), `dice` (N,), `structures` (K,) str.
    """
    import io

    shapes = np.array([volume.image.shape[1:] for volume, _, _ in pictures])
    size = np.minimum(shapes.max(axis=0), FIGURE_SIZE)
    rank = np.zeros(max(structures) + 1, dtype=np.uint8)
    rank[list(structures)] = np.arange(1, len(structures) + 1)
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for volume, found, _ in pictures:
        assert volume.label is not None
        where = np.argwhere(volume.label > 0)
        shape = np.array(volume.label.shape)
        centre = where.mean(axis=0).round().astype(int) if len(where) else shape // 2
        low = np.where(shape <= size, -((size - shape) // 2), np.clip(centre - size // 2, 0, np.maximum(shape - size, 0)))
        darkest = np.float32(volume.image.min())
        images.append(cut(volume.image[0].astype(np.float32) - darkest, low, low + size) + darkest)
        for kept, array in ((labels, volume.label), (predictions, found)):
            values = cut(array, low, low + size)
            kept.append(rank[np.where((values >= 0) & (values < len(rank)), values, 0)])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        image=np.stack(images),
        label=np.stack(labels),
        prediction=np.stack(predictions),
        spacing_mm=np.array([volume.spacing_mm for volume, _, _ in pictures]),
        dice=np.array([score for _, _, score in pictures]),
        structures=np.array(list(structures.values())),
    )
    write_atomic(path, buffer.getvalue())


def data_cards(cohort: Cohort, weights: Pretrained | None) -> list[dict[str, Any]]:
    """Return the cards of all that a fine-tuned network has seen: those of its pretraining, then the cohort's."""
    cards = [] if weights is None else [dict(card) for card in weights.manifest.get("data_cards") or []]
    known = {card["card_hash"] for card in cards}
    return cards + ([dict(cohort.card)] if cohort.card is not None and cohort.card["card_hash"] not in known else [])


def _write(run: _Run, result: FinetuneResult, out: Path, weights: Pretrained | None, cards: list[dict[str, Any]]) -> None:
    manifest = {
        "encoder": dict(run.settings.encoder or {}),
        "library": library_of(run.network),
        "network": run.settings.network,
        "network_args": dict(run.settings.network_args),
        "out_channels": 1 + max(run.structures),
        "structures": {str(value): name for value, name in run.structures.items()},
        "axis_order": "XYZ-RAS",
        "channels": 1,
        "crop": list(run.settings.crop),
        "spacing_mm": run.settings.spacing_mm,
        "intensity": {"normalize": run.settings.normalize},
        "pretrained": None if weights is None else weights.manifest.get("weights_hash"),
        "data_cards": cards,
    }
    save_part(out, "network", run.network.state_dict(), manifest)
    write_atomic(out / "results.json", json.dumps(result.to_json(), indent=1, allow_nan=False).encode())


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
