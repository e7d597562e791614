"""The parts of a training step for segmentation: factors of the encoder, order of cases, loss, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import MedsslError, RequestError
from medssl.evaluation.learning_rates import encoder_factors
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import Volume
from medssl.networks.segmentation import encoder_tensors
from medssl.seeding import counter_rng


def encoder_scales(network: nn.Module, encoder: nn.Module, settings: FinetuneSettings, *, pretrained: bool) -> dict[str, float]:
    """Return the factor on the learning rate of every trainable parameter of the encoder, by name in the network.

    Args:
        network: Result of a builder of `networks`.
        encoder: An encoder of the same form, which says what its blocks are.
        settings: Decay from layer to layer and factor on the whole encoder, see `learning_rates.encoder_factors`.
        pretrained: Whether the encoder is.

    Raises:
        MedsslError: A parameter of the network's encoder is not in `encoder`.
    """
    factors = {name.removeprefix("net."): f for name, f in encoder_factors(encoder, settings, pretrained=pretrained).items()}
    names = {name: key for key, name in encoder_tensors(network).items()}
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad and name in names]
    absent = [name for name in trained if names[name] not in factors]
    if absent:
        raise MedsslError(
            f"{len(absent)} of {len(trained)} parameters of the encoder in this {type(network).__name__}, {absent[0]} the first, are not in "
            f"{type(encoder).__name__}, so that their learning rates are not known; both must have the same names; this is a fault of "
            "medssl, not of the request: report it with the settings"
        )
    return {name: factors[names[name]] for name in trained}


def class_weights(settings: FinetuneSettings, frequencies: Sequence[float]) -> Tensor | None:
    """Return one weight per class, or None for equal ones.

    Args:
        settings: `class_weights`: `none`, `balanced` or numbers.
        frequencies: Share of voxels per class, background first; shares under 1e-4 count as 1e-4, and a class without any voxel as well.

    Raises:
        RequestError: There are more or fewer weights than classes.
    """
    if settings.class_weights == "none":
        return None
    if settings.class_weights == "balanced":
        shares = torch.tensor([max(float(f), 1e-4) for f in frequencies], dtype=torch.float64)
        return (1 / (len(shares) * shares)).float()
    given = [float(w) for w in settings.class_weights]
    if len(given) != len(frequencies):
        raise RequestError(
            f"class_weights: {len(given)} numbers for {len(frequencies)} classes, background included; give one per class, background first"
        )
    return torch.tensor(given)


def build_loss(settings: FinetuneSettings, weights: Tensor | None = None) -> Callable[..., Tensor]:
    """Return Dice plus cross-entropy on logits (B, K, *size) in float32 and labels (B, 1, *size), -1 uncertain.

    A third argument, (B, K) bool, says which classes each sample labels (see `labelled_classes`); None stands for all classes and
    no uncertain voxel, and is MONAI's `DiceCELoss`. Otherwise:

    - A sample's classes that it does not label are merged with its background: their probabilities are added, as nobody said
      which of them a background voxel is. No gradient tells them from background.
    - Uncertain voxels count in neither term.
    - A class enters the mean of the Dice terms with the samples that label it; a class that none labels does not enter.

    Args:
        settings: See there.
        weights: (K,) weights of the classes in the cross-entropy, which is divided by the sum of the weights of its voxels.

    Reference:
        Shi et al. 2021, "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", section 3.2 (marginal
        cross-entropy and Dice).
    """
    from monai.losses import DiceLoss

    dice = DiceLoss(
        include_background=settings.include_background,
        to_onehot_y=True,
        softmax=True,
        batch=settings.batch_dice,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )

    def loss_of(logits: Tensor, labels: Tensor, labelled: Tensor | None = None) -> Tensor:
        own = None if weights is None else weights.to(logits.device)
        if labelled is not None:
            return partial_loss(logits, labels, labelled, settings, own)
        logits = logits.float()
        if own is None:
            entropy = functional.cross_entropy(logits, labels[:, 0])
        else:  # a batch may hold classes of weight 0 alone
            terms = functional.cross_entropy(logits, labels[:, 0], weight=own, reduction="sum")
            entropy = terms / own[labels].sum().clamp(min=1e-6)
        whole: Tensor = settings.dice_weight * dice(logits, labels) + settings.ce_weight * entropy
        return whole

    return loss_of


def partial_loss(
    logits: Tensor, labels: Tensor, labelled: Tensor, settings: FinetuneSettings, weights: Tensor | None = None
) -> Tensor:
    """Return the loss of samples that label some of the classes, see `build_loss`.

    Args:
        logits: (B, K, *size).
        labels: (B, 1, *size) int64; -1 uncertain, and no class that its sample does not label.
        labelled: (B, K) bool, background True.
        settings: Weights of the terms.
        weights: (K,) weights of the classes in the cross-entropy.
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
    counts = sure.float() if weights is None else weights[target] * sure
    entropy = -(scores.gather(1, target) * counts).sum() / counts.sum().clamp(min=1e-6)
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


def class_frequencies(volumes: Sequence[Volume], values: Sequence[int]) -> list[float]:
    """Return the share of sure voxels of each class, mean over the volumes that label it.

    Background is what remains where some volumes label a structure and some do not.

    Args:
        volumes: With label maps.
        values: What each class is in these maps; 0, background, first.
    """
    shares = np.zeros((len(volumes), len(values)))
    asked = np.array([[k == 0 or volume.labels(k) for k in values] for volume in volumes])
    for row, volume in zip(shares, volumes):
        assert volume.label is not None
        sure = volume.label[volume.label >= 0]
        row += np.bincount(sure.ravel(), minlength=max(values) + 1)[list(values)] / max(1, sure.size)
    means = shares.sum(axis=0, where=asked) / np.maximum(asked.sum(axis=0), 1)
    if not asked.all():
        means[0] = max(0.0, 1.0 - means[1:].sum())
    return [float(share) for share in means]


def as_classes(labels: Tensor, values: Sequence[int]) -> Tensor:
    """Return label maps of whole numbers as numbers of classes; -1, uncertain, stays.

    Args:
        labels: Any shape, int64, values of `values` and -1.
        values: What each class is in the maps; 0, background, first.
    """
    if list(values) == list(range(len(values))):
        return labels
    table = torch.full((max(values) + 2,), -1, dtype=torch.int64, device=labels.device)
    table[torch.tensor(values, device=labels.device) + 1] = torch.arange(len(values), device=labels.device)
    return table[labels + 1]


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
