"""What a fine-tuning run for segmentation depends on besides cohort, number of labels, seed and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medssl.errors import RequestError
from medssl.evaluation.settings import refuse_settings, settings_of
from medssl.registry import lookup


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that a fine-tuning run depends on besides cohort, number of labels, seed and weights.

    Args:
        network: Registered network: `segresnet`, `unetr`, `swin_unetr`, `resenc_unet`, `pyramid` or `flexible_unet`.
        network_args: Further arguments of its builder.
        encoder: `{"name": ..., "args": {...}}`. Weights, where given, decide the arguments; a scratch run alone has no
            other source.
        domain: Registered domain that reads the images.
        domain_args: Its arguments.
        normalize: As in `VolumeViews`; must be what the encoder was pretrained with.
        spacing_mm: Voxel size to train at, one number per axis of the crop; None keeps each volume's own.
        crop: Training crop and inference window: (X, Y, Z) in voxels, or (H, W) in pixels, which says that the cohort is of pictures.
        steps: Optimiser steps.
        batch: Crops per step.
        lr: Peak learning rate (AdamW).
        encoder_lr_scale: Factor on the learning rate of a pretrained encoder; the scratch twin always has 1.
        layer_decay: Factor from block to block of a pretrained encoder, counted from the decoder (`learning_rates.layer_scales`); the
            scratch twin has 1.
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
        class_weights: Of the cross-entropy; Dice counts every structure alike already. `none`, `balanced` (one over the share of voxels
            of the class in the training labels, mean 1 over the voxels), or one number per class, background first.
        head_prior: Whether the head starts at the class frequencies of the training labels, see `set_head_prior`:
            without it a seed may lose a small structure for good.
        foreground: Share of crops centred on a voxel of a structure, each structure equally often.
        raters: What to learn from where a case has label maps of several raters: `majority`, or `draw`, one rater's map at random
            for each crop. Scores always take the majority.
        augment: Geometric and intensity operations of `VolumeViews`. Flips are absent on purpose: mirrored anatomy
            turns left into right, which is a wrong label for every paired organ.
        precision: `fp32`, or `bf16` autocast.
        log_every: Steps between lines of the curve.
        val_every: Steps between scores on validation cases; 0 has none. Without `patience` they choose nothing: tables use the last state.
        val_cases: Validation cases scored for the curve.
        patience: Validations without a better mean Dice after which training stops; the best state is then scored, and the result says
            that validation labels chose it. Those of the frozen steps do not count, but may hold the best state. None scores the last state.
        overlap: Overlap of inference windows, 0 to below 1.
        flips: Axes (0 is X, or H) along which a volume is also shown mirrored when it is segmented; the class probabilities are averaged. None by
            default: mirrored anatomy is a wrong label for everything that has a side.
        predictions: Whether to write predictions, as NIfTI, of pictures as PNG.
        dicom_seg: Whether to write predictions as DICOM-SEG; images must be DICOM series, and highdicom installed (extra `seg`).
        figures: Test cases pictured.
        device: Torch device.
        force: Fine-tune weights on other intensities, voxel sizes or axes than they were pretrained with; the result says so.
    """

    network: str = "segresnet"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] | None = None
    domain: str = "mri"
    domain_args: Mapping[str, Any] = field(default_factory=dict)
    normalize: str | Mapping[str, Any] = "zscore"
    spacing_mm: tuple[float, float, float] | tuple[float, float] | None = None
    crop: tuple[int, int, int] | tuple[int, int] = (96, 96, 96)
    steps: int = 2000
    batch: int = 2
    lr: float = 3e-3
    encoder_lr_scale: float = 1.0
    layer_decay: float = 1.0
    freeze_steps: int = 0
    transfer: str = "encoder"
    weight_decay: float = 1e-2
    clip: float = 1.0
    warmup_steps: int = 50
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    batch_dice: bool = True
    include_background: bool = False
    class_weights: str | Sequence[float] = "none"
    head_prior: bool = True
    foreground: float = 0.67
    raters: str = "majority"
    augment: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    log_every: int = 10
    val_every: int = 0
    val_cases: int = 8
    patience: int | None = None
    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    predictions: bool = False
    dicom_seg: bool = False
    figures: int = 3
    device: str = "cpu"
    force: bool = False

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
                ("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, at most 1"),
                (
                    "class_weights",
                    self.class_weights,
                    self.class_weights in ("none", "balanced")
                    or (
                        isinstance(self.class_weights, list | tuple)
                        and min(self.class_weights, default=-1) >= 0 < sum(self.class_weights)
                    ),
                    "none, balanced, or one number per class, 0 or more and not all 0",
                ),
                (
                    "patience",
                    self.patience,
                    self.patience is None or (self.patience >= 1 and self.val_every > 0 and self.val_cases > 0),
                    "1 or more, with val_every and val_cases above 0",
                ),
                (
                    "flips",
                    self.flips,
                    set(self.flips) <= set(range(len(self.crop))) and len(set(self.flips)) == len(self.flips),
                    f"axes 0 to {len(self.crop) - 1}, none twice",
                ),
                (
                    "freeze_steps",
                    self.freeze_steps,
                    0 <= self.freeze_steps < self.steps,
                    f"0 to below steps, which is {self.steps}",
                ),
                (
                    "warmup_steps",
                    self.warmup_steps,
                    0 <= self.warmup_steps < self.steps,
                    f"0 to below steps, which is {self.steps}",
                ),
                ("foreground", self.foreground, 0 <= self.foreground <= 1, "0 to 1"),
                ("overlap", self.overlap, 0 <= self.overlap < 1, "0 to below 1"),
                (
                    "dice_weight + ce_weight",
                    self.dice_weight + self.ce_weight,
                    self.dice_weight + self.ce_weight > 0,
                    "above 0",
                ),
                (
                    "crop",
                    self.crop,
                    len(self.crop) in (2, 3) and min(self.crop) >= 1,
                    "three positive numbers, for pictures two",
                ),
                (
                    "spacing_mm",
                    self.spacing_mm,
                    self.spacing_mm is None or (len(self.spacing_mm) == len(self.crop) and min(self.spacing_mm) > 0),
                    "one number above 0 for each axis of the crop, or null",
                ),
                (
                    "dicom_seg",
                    self.dicom_seg,
                    not (self.dicom_seg and self.pictures),
                    "false for pictures, whose predictions are written as PNG",
                ),
            )
            if not good
        ]
        refuse_settings(faults)

    @property
    def pictures(self) -> bool:
        """Whether the cohort is of pictures."""
        return len(self.crop) == 2

    @property
    def in_channels(self) -> int:
        """Channels of the images that the encoder takes; 1 where nothing says otherwise."""
        return int(dict((self.encoder or {}).get("args") or {}).get("in_channels", 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """Build settings from a recipe section or a results file; lists become tuples.

        Raises:
            RequestError: A key is unknown.
        """
        return settings_of(cls, values)


def refuse_dimensions(settings: FinetuneSettings) -> None:
    """Refuse a domain whose images have other axes than the crop.

    Raises:
        RequestError: They differ.
    """
    kinds = getattr(lookup("domain", settings.domain), "kinds", ("volume",))
    if settings.pictures and "image" not in kinds:
        raise RequestError(
            f"crop {list(settings.crop)} is of pictures, and the domain {settings.domain} reads volumes; give crop: [X, Y, Z], or a domain "
            "of pictures (xray, ultrasound, microscopy)"
        )
    if not settings.pictures and "volume" not in kinds:
        raise RequestError(
            f"crop {list(settings.crop)} is of volumes, and the domain {settings.domain} reads pictures; give crop: [H, W] and a network of "
            "images (pyramid, flexible_unet), or a domain of volumes (mri, ct)"
        )
