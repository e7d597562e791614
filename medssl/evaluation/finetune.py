"""Fine-tuning a MONAI segmentation network on few labelled volumes or pictures, pretrained or from scratch, all else equal.

A run is a function of (cohort, settings, labels, seed, weights). The pretrained network and its scratch twin see the
same cases in the same order, the same crops and the same augmentation, and start from the same decoder and head: draws
are keyed by (seed, step, position), and the network is built from the seed before pretrained tensors replace its
encoder.

    out/results.json                 scores of every test case, curve, settings, what was loaded
    out/curve.jsonl                  one line per log point: step, loss, learning rates, validation Dice
    out/network.safetensors, .json   the last state, under the stock network's keys
    out/figures/segmentation.npz     slices, labels and predictions of a few test cases
    out/figures/worst.npz            the slices of the worst test cases where prediction and label differ most
    out/predictions/<case>.nii.gz    optional, on the grid of the image, axes in the order of its file; <case>.png of a picture
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.encoders.loading import load_into, refuse_foreign
from medssl.errors import GeometryError, RequestError, TrainingStopped, WeightsError
from medssl.evaluation.best_state import BestState
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.features import encode
from medssl.evaluation.learning_rates import hold_norms, parameter_groups, set_learning_rates
from medssl.evaluation.metrics import dice
from medssl.evaluation.outside import Look, outside, training_range
from medssl.evaluation.pretrained_views import refuse_unlike, unlike_axes, unlike_intensities, unlike_spacing
from medssl.evaluation.segmentation_checks import look_through, refuse_unlearnable, refuse_unscorable
from medssl.evaluation.segmentation_results import (
    CaseScore,
    FinetuneResult,
    check_dicom_seg,
    score_case,
    write_case_names,
    write_dicom_prediction,
    write_figures,
    write_label_counts,
    write_prediction,
)
from medssl.evaluation.segmentation_settings import FinetuneSettings, refuse_dimensions
from medssl.evaluation.segmentation_training import (
    as_classes,
    autocast,
    build_loss,
    case_order,
    class_frequencies,
    class_weights,
    encoder_scales,
    train_step,
)
from medssl.evaluation.volumes import (
    CaseReader,
    TrainingCrops,
    Volume,
    as_seen,
    comparable,
    known_values,
    labelled_classes,
    padded,
    structure_values,
    whole_channels,
)
from medssl.evaluation.worst import WorstCases
from medssl.networks.segmentation import LoadReport, adapt_inputs, library_of, load_pretrained, set_head_prior
from medssl.registry import argument_faults, lookup
from medssl.seeding import derive_seed
from medssl.weights import load_part, save_part, write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """Weights as `open_weights` read them.

    Args:
        state: Encoder tensors.
        manifest: Their manifest.
        decoder_state: Decoder tensors; None transfers the encoder alone.
        adapted: What was changed of the tensors for the channels of the images.
    """

    state: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    decoder_state: Mapping[str, Tensor] | None = None
    adapted: tuple[str, ...] = ()


def open_weights(path: Path | str, *, transfer: str = "encoder") -> Pretrained:
    """Read an encoder, and with `encoder_decoder` its decoder, from a run folder, weights folder or safetensors file.

    Raises:
        WeightsError: They are missing or damaged, of a fine-tuned network, an export for another library, or there is no decoder.
    """
    state, manifest = load_part(path)
    if manifest["part"] == "network":
        raise WeightsError(
            f"{path} is a fine-tuned network with its head; fine-tuning starts from an encoder: give the run folder of the pretraining"
        )
    refuse_foreign(manifest, lookup("encoder", manifest["encoder"]["name"]).key_groups)
    decoder = None
    if transfer == "encoder_decoder":
        inside = tuple(dict(manifest.get("key_groups") or {}).get("decoder", ()))
        decoder = {key: value for key, value in state.items() if inside and key.startswith(inside)}  # of an export with --decoder
    if transfer == "encoder_decoder" and not decoder:
        try:
            decoder, _ = load_part(path, "decoder")
        except WeightsError as err:
            raise WeightsError(
                f"transfer encoder_decoder: {err}; exports hold the encoder alone unless written with --decoder: "
                "give the run folder of a segresnet3d, swin3d or resenc3d, or set transfer: encoder"
            ) from err
    return Pretrained(state, manifest, decoder)


@dataclass
class _Run:
    """The moving parts of one run, so that the steps below stay small functions."""

    settings: FinetuneSettings
    channel_names: tuple[str, ...]
    network: nn.Module
    device: torch.device
    seed: int
    structures: dict[int, str]
    reader: CaseReader

    @property
    def values(self) -> list[int]:
        """What each class of the network is in label maps, background first: maps of 0 and 255 have two classes."""
        return [0, *sorted(self.structures)]

    def segment(self, volume: Volume) -> np.ndarray:
        """Return the label map that the network gives a volume, in the values of the label maps."""
        found: np.ndarray = np.array(self.values, dtype=np.int16)[predict(self.network, volume, self.settings)]
        return found


def finetune(
    cohort: Cohort,
    settings: FinetuneSettings,
    out: Path,
    *,
    labels: int | None = None,
    seed: int = 0,
    weights: Pretrained | None = None,
    arm: str | None = None,
    fold: tuple[int | None, int | None] = (None, None),
    forced: Sequence[str] | None = None,
    reader: CaseReader | None = None,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> FinetuneResult:
    """Train on the first labelled cases, score all test cases, and write everything to a folder.

    Test labels are looked through for faults before the first step and scored after the last. Validation labels draw the curve; with
    `patience` they choose the state that is scored.

    Args:
        cohort: The labelled set.
        settings: See there.
        out: Folder for the results, created when missing.
        labels: Number of training cases in few-label order; None takes all.
        seed: Seed of start weights and draws. Equal seeds pair a pretrained run with its scratch twin.
        weights: Pretrained weights; None is the scratch twin.
        arm: Name in the results; None is `pretrained` or `scratch`.
        fold: Tested fold and number of folds, for the results, where the splits of the cohort were dealt.
        forced: How the images differ from those of the pretraining, where a curve has asked that of all its cases; None asks here.
        reader: To share loaded volumes between runs.
        on_step: Called with (step, steps, values) at every log point.

    Raises:
        RequestError: Settings, cohort and weights do not go together, or a structure cannot be learnt or none scored; nothing was trained.
        WeightsError: The weights are of several channels and the images of other several.
        ImageError: Images or label maps cannot be used; nothing was trained.
        TrainingStopped: The loss stopped being a number.
    """
    weights = for_channels(weights, cohort)
    settings = with_channels(with_encoder(settings, weights), cohort)
    reader = reader or reader_of(settings)
    train_cases, val_cases, test_cases = cases_of_run(cohort, settings, labels)
    if forced is None:
        forced = [] if weights is None else unlike_pretraining(weights.manifest, settings, train_cases, reader)
    structures = check_cases(cohort, settings, labels, reader, one_fold=fold[0] is not None)
    device = device_of(settings)
    network, loaded = network_of(settings, structures, seed, weights)
    crops = training_crops(settings, seed, device)
    frequencies = class_frequencies([reader(case) for case in train_cases], [0, *sorted(structures)])
    if settings.head_prior:
        set_head_prior(network, frequencies)
    loss_of = build_loss(settings, class_weights(settings, frequencies))
    encoder = start_encoder(settings, weights, seed).to(device)
    factors = encoder_scales(network, encoder, settings, pretrained=weights is not None)
    run = _Run(settings, cohort.channel_names, network.to(device), device, seed, structures, reader)
    for note in () if weights is None else weights.adapted:
        log.info("weights adapted: %s", note)
    log.info("fine-tuning on %d volumes, %d steps", len(train_cases), settings.steps)
    out = Path(out)
    write_atomic(out / "curve.jsonl", b"")  # a folder that cannot be written says so now, not after the last step
    span = training_range([look_at(encoder, reader(case), case, settings) for case in train_cases])
    optimizer = torch.optim.AdamW(parameter_groups(network, factors, settings.weight_decay), lr=settings.lr)
    curve, choice, seconds = _train(run, crops, optimizer, loss_of, train_cases, val_cases, out, weights is not None, on_step)
    save_part(out, "network", network.state_dict(), _manifest(run, weights, data_cards(cohort, weights), list(forced)))
    flags = {case.id: outside(look_at(encoder, reader(case), case, settings), span) for case in test_cases}
    scores, resampled = _test(run, test_cases, out)
    result = FinetuneResult(
        arm=arm or ("scratch" if weights is None else "pretrained"),
        labels=len(train_cases),
        seed=seed,
        structures=list(structures.values()),
        cases=[replace(score, outside=flags[score.id]) for score in scores],
        curve=curve,
        loaded=None if loaded is None else asdict(loaded),
        choice=choice,
        seconds=seconds,
        settings=asdict(settings),
        training_range=span.facts(),
        forced=list(forced),
        adapted=[] if weights is None else list(weights.adapted),
        channel_names=list(cohort.channel_names),
        fold=fold[0],
        of_folds=fold[1],
        without_dicom_seg=resampled,
    )
    write_label_counts(out, reader, replace(cohort, structures=structures), [*train_cases, *val_cases, *test_cases])
    write_atomic(out / "results.json", json.dumps(result.to_json(), indent=1, allow_nan=False).encode())
    return result


def cases_of_run(cohort: Cohort, settings: FinetuneSettings, labels: int | None) -> tuple[list[Case], list[Case], list[Case]]:
    """Return training, validation and test cases of a run.

    Raises:
        RequestError: There are fewer training cases, or none to be tested or, with `patience`, to choose by.
    """
    train, test = cohort.first(labels), cohort.split("test")
    val = cohort.split("val")[: settings.val_cases]
    if not test:
        raise RequestError(
            f"cohort {cohort.name}: no labelled test cases; mark some as test in its table, or have every patient tested once with folds: 5"
        )
    if settings.patience is not None and not val:
        raise RequestError(
            f"cohort {cohort.name}: patience needs labelled validation cases, it has none; mark some as val, or set patience: null"
        )
    return train, val, test


def check_cases(
    cohort: Cohort, settings: FinetuneSettings, labels: int | None, reader: CaseReader, *, one_fold: bool
) -> dict[int, str]:
    """Look through the cases of a run for what would end it, and return the structures.

    Raises:
        RequestError: A structure cannot be learnt or none scored, or images and settings do not go together.
        ImageError: Images or label maps cannot be used.
    """
    train, val, test = cases_of_run(cohort, settings, labels)
    refuse_settings(settings)
    if settings.dicom_seg:
        check_dicom_seg(test)
    structures = structures_of(cohort, reader)
    drawn = look_through(reader, train, structures, settings.raters)  # first, so that these stay in memory
    refuse_unlearnable(cohort.name, drawn, structures, one_fold=one_fold)
    tested = look_through(reader, [*val, *test], structures)[len(val) :]
    if not one_fold:
        refuse_unscorable(cohort.name, tested)
    shown = [*train, *val, *test] if settings.pictures else train  # volumes have the channels of their cohort and a size
    refuse_images([reader(case) for case in shown], settings)
    class_weights(settings, [1.0] * (1 + len(structures)))  # as many as there are classes
    return structures


def refuse_settings(settings: FinetuneSettings) -> None:
    """Refuse what no image needs to be read for: axes, views of the crops, the device.

    Raises:
        RequestError: One of them cannot be had.
    """
    refuse_dimensions(settings)
    training_crops(settings, 0, device_of(settings))


def device_of(settings: FinetuneSettings) -> torch.device:
    """Return the device of a run, after a tensor was made on it: its name alone does not say that it is there.

    Raises:
        RequestError: PyTorch knows no such device, or the machine has none.
    """
    try:
        device = torch.device(settings.device)
    except RuntimeError as err:
        raise RequestError(
            f'device "{settings.device}" is none of PyTorch; accepted are cpu, cuda, cuda:1 and the like; leave it out to take what is there'
        ) from err
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as err:  # without CUDA, with fewer devices, without a backend
        raise RequestError(
            f'device "{settings.device}" is not on this machine; accepted are cpu and what `medssl doctor` finds; leave it out to take what is there'
        ) from err
    return device


def network_of(
    settings: FinetuneSettings, structures: Mapping[int, str], seed: int, weights: Pretrained | None
) -> tuple[nn.Module, LoadReport | None]:
    """Return the network of a run before its first step, and what was loaded into it.

    Raises:
        RequestError: Settings and weights do not go together.
    """
    network = build_network(settings, n_classes=1 + len(structures), seed=seed)
    return network, None if weights is None else load(network, weights)


def reader_of(settings: FinetuneSettings) -> CaseReader:
    """Return a reader of the images that the settings are for."""
    channels = settings.in_channels if settings.pictures else None
    return CaseReader(settings.domain, settings.domain_args, channels=channels)


def training_crops(settings: FinetuneSettings, seed: int, device: torch.device) -> TrainingCrops:
    """Return the training crops of a run."""
    return TrainingCrops(
        size=settings.crop,
        spacing_mm=settings.spacing_mm,
        normalize=settings.normalize,
        augment=settings.augment,
        foreground=settings.foreground,
        seed=seed,
        device=device,
        raters=settings.raters,
    )


def with_encoder(settings: FinetuneSettings, weights: Pretrained | None) -> FinetuneSettings:
    """Return the settings with the encoder filled in from the weights, after checking that they go together.

    Raises:
        RequestError: Neither names an encoder.
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
    return replace(settings, encoder=encoder)


def for_channels(weights: Pretrained | None, cohort: Cohort) -> Pretrained | None:
    """Return weights for the channels of the volumes of a cohort: weights of one channel are spread over several (`networks.adapt_inputs`).

    Raises:
        WeightsError: The weights take several channels and the volumes have other several.
    """
    if (
        weights is None or cohort.channels == 1
    ):  # pictures, and volumes of one channel: those of the weights are compared with the images
        return weights
    manifest, n = weights.manifest, cohort.channels
    encoder = dict(manifest["encoder"])
    args = dict(encoder.get("args") or {})
    if args.get("in_channels", 1) == n:
        return weights
    state, decoder, notes = adapt_inputs(weights.state, weights.decoder_state, n)
    encoder["args"] = {**args, "in_channels": n}
    return Pretrained(state, {**manifest, "encoder": encoder, "channels": n}, decoder, (*weights.adapted, *notes))


def with_channels(settings: FinetuneSettings, cohort: Cohort) -> FinetuneSettings:
    """Return settings whose encoder takes the channels of the volumes of a cohort, where nothing says how many it takes.

    Raises:
        RequestError: The volumes have several channels, and the settings name another number.
    """
    encoder, n = dict(settings.encoder or {}), cohort.channels
    args = dict(encoder.get("args") or {})
    if n == 1 or args.get("in_channels") == n:
        return settings
    if "in_channels" in args:
        raise RequestError(
            f"cohort {cohort.name}: its volumes have {n} channels ({', '.join(cohort.channel_names)}), encoder.in_channels is "
            f"{args['in_channels']}; leave it out, and the encoder is built for {n}"
        )
    return replace(settings, encoder={**encoder, "args": {**args, "in_channels": n}})


def refuse_images(volumes: Sequence[Volume], settings: FinetuneSettings) -> None:
    """Refuse images that the encoder cannot see, or that cannot be brought to the voxel size asked for.

    Raises:
        RequestError: They have other channels than the encoder takes, or no spacing where one is asked for.
    """
    wanted = settings.in_channels
    stored = [1 if volume.repeated else len(volume.image) for volume in volumes]
    others = sum(channels != wanted for channels in stored)
    # grey pictures among those of a colour set are right, and were given its channels; a set of grey pictures alone is not
    if others == len(volumes) or any(len(volume.image) != wanted for volume in volumes):
        found = sorted(set(stored))
        raise RequestError(
            f"{others} of {len(volumes)} images have {' or '.join(map(str, found))} channel(s), the encoder takes {wanted}; read them "
            "with that many (domain xray has colour: true, which gives grey), or take an encoder with that in_channels"
        )
    unmeasured = sum(not volume.measured for volume in volumes)
    if unmeasured and settings.spacing_mm is not None:
        raise RequestError(
            f"spacing_mm: {unmeasured} of {len(volumes)} pictures do not say how large their pixels are; set spacing_mm: null"
        )


def unlike_pretraining(
    manifest: Mapping[str, Any], settings: FinetuneSettings, cases: Sequence[Case], reader: CaseReader
) -> list[str]:
    """Return how the images of the task differ from those of the pretraining, where that is forced.

    Images are read only where their own voxel size is what the network will see.

    Raises:
        RequestError: They differ, and nobody forced it.
    """
    early = refuse_unlike([unlike_axes(manifest), unlike_intensities(manifest, settings.normalize)], settings.force)
    seen = settings.spacing_mm
    if seen is None and manifest.get("spacing_source") == "views":
        sizes = [volume.spacing_mm[: len(settings.crop)] for volume in map(reader, cases) if volume.measured]
        seen = tuple(np.median(sizes, axis=0).tolist()) if sizes else None
    return early + refuse_unlike([unlike_spacing(manifest, seen, settings.spacing_mm is not None)], settings.force)


def build_network(settings: FinetuneSettings, *, n_classes: int, seed: int) -> nn.Module:
    """Build the network with start weights that depend on the seed alone; the global generator is left as it was."""
    builder = lookup("network", settings.network)
    given = ("encoder", "out_channels", "image_size")
    if faults := argument_faults("settings.network_args", builder, settings.network_args, given):
        raise RequestError("; ".join(faults))
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
    kind = lookup("encoder", settings.encoder["name"])
    if "image_size" in args and not settings.pictures:  # networks of timm resize their table themselves
        args["image_size"] = settings.crop
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "finetune", "look"))
        encoder = kind(**args)
    if weights is not None:
        load_into(encoder, weights.state, {"part": "encoder", **weights.manifest})
    return encoder.eval()


@torch.no_grad()
def look_at(encoder: Any, volume: Volume, case: Case, settings: FinetuneSettings) -> Look:
    """Return voxel size, vendor and encoder feature of a case: the mean over the middle crop, as the network sees it."""
    device = next(encoder.parameters()).device
    image, padding = whole_channels(volume, settings.normalize, settings.spacing_mm, device)
    image, _ = padded(as_seen(image, len(settings.crop)), settings.crop, padding)
    for axis, size in enumerate(settings.crop, start=2):
        image = image.narrow(axis, (image.shape[axis] - size) // 2, size)
    channels = encoder.config()["args"].get("in_channels", 1)
    feature = encode(encoder, image.expand(-1, channels, *[-1] * len(settings.crop))).pooled[0].float().cpu().numpy()
    spacing = tuple(volume.spacing_mm[: len(settings.crop)]) if volume.measured else None
    return Look(spacing, case.facts.get("vendor"), feature, case.patient if case.patient_known else None)


def load(network: nn.Module, weights: Pretrained) -> LoadReport:
    """Load the weights into the network, see `medssl.networks.segmentation.load_pretrained`."""
    return load_pretrained(network, weights.state, weights.manifest, decoder_state=weights.decoder_state)


def structures_of(cohort: Cohort, reader: CaseReader, *, every: bool = False) -> dict[int, str]:
    """Return label value to name: from the cohort, else the values in the training labels, however few are used.

    Args:
        cohort: The labelled set.
        reader: Of its cases.
        every: Look at all labels instead of those for training, as where folds are dealt: all folds are to have the same classes.

    Raises:
        RequestError: These labels hold no structure.
    """
    if cohort.structures:
        return dict(cohort.structures)
    values: set[int] = set()
    for case in cohort.labelled() if every else cohort.split("train"):
        values |= structure_values(reader(case))
    if not values:
        raise RequestError(f"cohort {cohort.name}: its training label maps hold background only; label values are 1, 2, 3 ...")
    return {value: f"structure_{value}" for value in sorted(values)}


def _train(
    run: _Run,
    crops: TrainingCrops,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[..., Tensor],
    cases: Sequence[Case],
    val_cases: Sequence[Case],
    out: Path,
    pretrained: bool,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None,
) -> tuple[list[dict[str, Any]], str, dict[str, float]]:
    """Run all steps, or until validation stops; return the curve, which state is left to be scored, and the seconds taken."""
    settings, network = run.settings, run.network
    if run.device.type == "cpu":
        memory = torch.channels_last if settings.pictures else torch.channels_last_3d
        network.to(memory_format=memory)  # type: ignore[call-overload]  # volumes: 1.1 to 1.5x on CPU
    volumes = [run.reader(case) for case in cases]
    order = case_order(len(cases), run.seed)
    best = BestState(settings.patience, settings.freeze_steps if pretrained else 0)
    curve: list[dict[str, Any]] = []
    times: list[float] = []
    losses: list[float] = []
    start = time.perf_counter()
    network.train()
    for step in range(settings.steps):
        began = time.perf_counter()
        encoder_lr, lr = set_learning_rates(optimizer, step, settings, pretrained=pretrained)
        hold_norms(network, optimizer, step, settings, pretrained=pretrained)
        chosen = [volumes[next(order)] for _ in range(settings.batch)]
        images, labels = crops.batch(chosen, step)
        labels, labelled = as_classes(labels, run.values), labelled_classes(chosen, run.values)
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(run.seed, "finetune", "step", step))  # dropout, equal for both arms
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
            stop = False
            if validate:
                line["val_dice"] = _validation_dice(run, val_cases)
                found = [value for value in line["val_dice"].values() if value is not None]
                stop = best.seen(float(np.mean(found)) if found else None, done, network)
            curve.append(line)
            if validate or done == settings.steps:
                write_atomic(out / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in curve).encode())
            if on_step is not None:
                on_step(done, settings.steps, {"loss": line["loss"]})
            if stop:
                break
    choice = best.restore(network, len(val_cases))
    return curve, choice, {"train": time.perf_counter() - start, "per_step": float(np.median(times))}


@torch.no_grad()
def predict(network: nn.Module, volume: Volume, settings: FinetuneSettings) -> np.ndarray:
    """Segment a whole volume with MONAI's sliding window, and its mirrored views where asked.

    Args:
        network: In any mode; it is left in eval mode.
        volume: As `CaseReader` returns it.
        settings: Crop, overlap, flips, normalisation, spacing and precision.

    Returns:
        (X, Y, Z) int16, the class of each voxel on the grid of the volume; of a picture (H, W, 1).
    """
    from monai.inferers import sliding_window_inference

    network.eval()
    device = next(network.parameters()).device
    image, padding = whole_channels(volume, settings.normalize, settings.spacing_mm, device)  # (1, C, *resampled)
    axes = len(settings.crop)
    image, inside = as_seen(image, axes), (slice(None),) * axes
    if len(padding) > 1:  # MONAI pads all channels with one value
        image, inside = padded(image, settings.crop, padding)

    def look(shown: Tensor) -> Tensor:
        with autocast(settings, device):
            logits = sliding_window_inference(
                shown, settings.crop, settings.batch, network, overlap=settings.overlap, mode="gaussian", cval=padding[0]
            )
        assert isinstance(logits, Tensor)
        return logits.float()

    logits = look(image)
    if settings.flips:
        logits = logits.softmax(dim=1)  # sums of probabilities, one view in memory at a time
        for axis in settings.flips:
            logits += look(image.flip(2 + axis)).softmax(dim=1).flip(2 + axis)
    at: tuple[Any, ...] = (..., *inside)
    logits = logits[at]
    shape = tuple(volume.image.shape[1 : 1 + axes])
    if tuple(logits.shape[2:]) != shape:
        mode = "bilinear" if axes == 2 else "trilinear"
        logits = nn.functional.interpolate(logits, size=shape, mode=mode, align_corners=False)
    label: np.ndarray = logits[0].argmax(dim=0).to(torch.int16).cpu().numpy()
    return label[..., None] if axes == 2 else label


def _validation_dice(run: _Run, cases: Sequence[Case]) -> dict[str, float | None]:
    """Mean Dice per structure; training mode is restored."""
    scores = []
    for case in cases:
        volume = run.reader(case)
        known_values(volume, run.structures, case)
        found, label, scored = comparable(run.segment(volume), volume, run.structures)
        scores.append(dice(found, label, scored))
    run.network.train()
    means = {}
    for value, name in run.structures.items():
        kept = [score[value] for score in scores if not np.isnan(score.get(value, math.nan))]
        means[name] = float(np.mean(kept)) if kept else None
    return means


def _test(run: _Run, cases: Sequence[Case], out: Path) -> tuple[list[CaseScore], list[str]]:
    """Score every test case on its own grid; write pictures and, when asked, predictions.

    A structure that a case does not label has no score there, as one that is in neither map.

    Returns:
        Scores, and the ids of cases that have NIfTI for DICOM-SEG, as their series was resampled.
    """
    scores, pictures, worst = [], [], WorstCases(picture=run.settings.pictures)
    resampled: list[str] = []
    for number, case in enumerate(cases):
        volume = run.reader(case)
        known_values(volume, run.structures, case)
        found = run.segment(volume)
        sure, label, scored = comparable(found, volume, run.structures)
        scores.append(score_case(case, volume, sure, label, {k: run.structures[k] for k in scored}, run.structures.values()))
        if run.settings.figures:
            worst.show(case.id, scores[-1].mean_dice, volume.image[0], label, sure, volume.spacing_mm)
        if number < run.settings.figures:
            pictures.append((volume, found, scores[-1].mean_dice))
        if run.settings.dicom_seg:
            try:
                write_dicom_prediction(out / "private" / "predictions" / f"{case.id}.dcm", found, volume, case, run.structures)
            except GeometryError:
                resampled.append(case.id)
        if run.settings.predictions or case.id in resampled:
            suffix = "png" if volume.picture else "nii.gz"
            write_prediction(out / "predictions" / f"{case.id}.{suffix}", found, volume, case)
    write_case_names(out / "private" / "cases.csv", cases)
    if pictures:
        write_figures(out / "figures" / "segmentation.npz", pictures, run.structures)
    if worst.kept:
        write_atomic(out / "figures" / "worst.npz", worst.to_npz(run.structures))
    return scores, resampled


def data_cards(cohort: Cohort, weights: Pretrained | None) -> list[dict[str, Any]]:
    """Return the cards of all that a fine-tuned network has seen: those of its pretraining, then the cohort's."""
    cards = [] if weights is None else [dict(card) for card in weights.manifest.get("data_cards") or []]
    known = {card["card_hash"] for card in cards}
    return cards + ([dict(cohort.card)] if cohort.card is not None and cohort.card["card_hash"] not in known else [])


def _manifest(run: _Run, weights: Pretrained | None, cards: list[dict[str, Any]], forced: Sequence[str]) -> dict[str, Any]:
    return {
        "encoder": dict(run.settings.encoder or {}),
        "library": library_of(run.network),
        "network": run.settings.network,
        "network_args": dict(run.settings.network_args),
        "out_channels": len(run.values),
        "label_values": run.values,
        "structures": {str(value): name for value, name in run.structures.items()},
        "axis_order": "HW" if run.settings.pictures else "XYZ-RAS",
        "channels": run.settings.in_channels,
        "channel_names": list(run.channel_names),
        "crop": list(run.settings.crop),
        "spacing_mm": run.settings.spacing_mm,
        "intensity": {"normalize": run.settings.normalize},
        "overlap": run.settings.overlap,
        "flips": list(run.settings.flips),
        "domains": [run.settings.domain],
        "domain_args": dict(run.settings.domain_args),
        "forced": list(forced),
        "adapted": [] if weights is None else list(weights.adapted),
        "pretrained": None if weights is None else weights.manifest.get("weights_hash"),
        "pretrained_licence": None if weights is None else weights.manifest.get("licence", "unknown"),
        "data_cards": cards,
    }
