"""The masked autoencoders: formulas, and the sanity experiments A10.1 to A10.3 of the method card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.vit3d import ViT3D
from medssl.layers.tokens import flatten_tokens, patchify, scatter_tokens, unpatchify, visible_indices
from medssl.objectives.mae import MAE, loss_weights, normalise_patches
from medssl.objectives.mae_cnn import MAECNN, repeat_mask
from medssl.registry import OBJECTIVES
from medssl.testing import check_objective, toy_views
from medssl.types import StepContext, Views

SIZE = (16, 24, 8)
GRID = (4, 6, 2)


def vit_mae(patch: int = 4, **changes: Any) -> MAE:
    torch.manual_seed(0)
    encoder = ViT3D(image_size=SIZE, patch_size=patch, hidden_size=24, num_layers=2, num_heads=2)
    return MAE(encoder, image_size=SIZE, decoder_dim=24, decoder_depth=1, decoder_heads=2, **changes)


def cnn_mae(**changes: Any) -> MAECNN:
    torch.manual_seed(0)
    return MAECNN(SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), image_size=SIZE, **changes)


BUILDERS = {"mae": vit_mae, "mae_cnn": cnn_mae}


def with_views(views: Views, **data: Tensor) -> Views:
    return Views({**views.data, **data}, views.meta)


def hidden_voxels(views: Views) -> Tensor:
    return repeat_mask(views["volume_mask"][:, 0], SIZE)


def test_builders__cover_the_registry() -> None:
    elsewhere = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(BUILDERS) | (elsewhere - {"mae"}) >= set(OBJECTIVES)
    assert set(BUILDERS) <= set(OBJECTIVES)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_objective__keeps_the_contract(name: str) -> None:
    objective = BUILDERS[name]()
    check_objective(objective, toy_views(objective), steps=15)


class LocalMean(MAE):
    """Divides by the count of its own micro-batch."""

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        return super().forward(views, replace(ctx, totals={}))


class WrongName(MAE):
    """Gives its count a name that `forward` does not use."""

    def denominators(self, views: Views) -> dict[str, Tensor]:
        return {"patches": super().denominators(views)["voxels"]}


class Share(MAE):
    """Takes a share for a count."""

    def denominators(self, views: Views) -> dict[str, Tensor]:
        return {"voxels": super().denominators(views)["voxels"] / len(views["volume"])}


class Items(MAE):
    """Counts items although voxels are scored."""

    def denominators(self, views: Views) -> dict[str, Tensor]:
        return {"voxels": torch.tensor(float(len(views["volume"])))}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (LocalMean, "micro-steps must average to the loss of the whole batch: it is"),
        (WrongName, "under the names that `denominators` returns"),
        (Share, "a count must add up"),
        (Items, "both micro-steps have the same counts"),
    ],
)
def test_contract__catches_wrong_denominators(wrong: type[MAE], text: str) -> None:
    torch.manual_seed(0)
    encoder = ViT3D(image_size=SIZE, patch_size=4, hidden_size=24, num_layers=2, num_heads=2)
    objective = wrong(encoder, image_size=SIZE, decoder_dim=24, decoder_depth=1, decoder_heads=2)
    with pytest.raises(AssertionError, match=text):
        check_objective(objective, toy_views(objective), steps=1)


def test_mask_and_tokens__agree_on_a_non_cubic_grid() -> None:
    """Card A10.1: a constant per patch goes through patchify, mask and unpatchify; zeros stand exactly at hidden patches."""
    patch = (4, 4, 4)
    constants = 1 + torch.arange(48, dtype=torch.float32).reshape(1, 1, *GRID)
    x = constants
    for axis in (2, 3, 4):
        x = x.repeat_interleave(4, dim=axis)
    mask = torch.zeros(48, dtype=torch.bool)
    mask[torch.randperm(48, generator=torch.Generator().manual_seed(1))[:36]] = True
    mask = mask.reshape(1, *GRID)
    keep = visible_indices(mask)
    rows = patchify(x, patch)
    kept = rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[2]))
    back = unpatchify(scatter_tokens(kept, keep, torch.zeros_like(rows)), GRID, patch)
    hidden = repeat_mask(mask, SIZE)
    assert torch.equal(back, torch.where(hidden, torch.zeros(()), x))
    assert int(hidden.sum()) == 36 * 64


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_gradient__stays_where_it_belongs(name: str) -> None:
    """Card A10.2: no gradient on predictions at visible voxels, none from hidden input voxels, some from visible ones."""
    objective = BUILDERS[name]()
    views = toy_views(objective)
    views.meta.valid["volume"][:] = True
    hidden = hidden_voxels(views)
    x = views["volume"][:, 0].clone().requires_grad_(True)
    argument = views["volume_mask"][:, 0] if name == "mae" else hidden
    prediction = objective.predict(x, argument)
    prediction.retain_grad()
    target = patchify(x.detach(), (4, 4, 4)) if name == "mae" else x.detach()
    weights = (
        loss_weights(flatten_tokens(argument[:, None])[..., 0], torch.ones_like(target, dtype=torch.bool), "masked")
        if name == "mae"
        else hidden.float()
    )
    ((prediction - target).square() * weights).sum().backward()
    expected = objective(views, StepContext())["loss"] * weights.sum()
    assert torch.allclose(expected, ((prediction - target).square() * weights).sum(), rtol=1e-5)
    assert x.grad is not None and prediction.grad is not None
    assert (x.grad[hidden] == 0).all()
    assert (x.grad[~hidden] != 0).any()
    on_prediction = unpatchify(prediction.grad, GRID, (4, 4, 4)) if name == "mae" else prediction.grad
    assert (on_prediction[~hidden] == 0).all()
    assert (on_prediction[hidden] != 0).all()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_hidden_voxels__cannot_leak_into_the_output(name: str) -> None:
    """Card A10.3: noise in hidden voxels leaves the output unchanged bit for bit."""
    objective = BUILDERS[name]().eval()
    views = toy_views(objective)
    hidden = hidden_voxels(views)
    argument = views["volume_mask"][:, 0] if name == "mae" else hidden
    x = views["volume"][:, 0]
    noisy = torch.where(hidden, 100 * torch.randn_like(x), x)
    with torch.no_grad():
        assert torch.equal(objective.predict(x, argument), objective.predict(noisy, argument))
        changed = torch.where(hidden, x, x + 1)
        assert not torch.equal(objective.predict(x, argument), objective.predict(changed, argument))


@pytest.mark.parametrize("region", ["masked", "all"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_loss__equals_a_plain_loop(name: str, region: str) -> None:
    objective = BUILDERS[name](recon_region=region)
    views = toy_views(objective)
    hidden = hidden_voxels(views)
    argument = views["volume_mask"][:, 0] if name == "mae" else hidden
    x = views["volume"][:, 0]
    with torch.no_grad():
        predicted = objective.predict(x, argument)
        output = unpatchify(predicted, GRID, (4, 4, 4)) if name == "mae" else predicted
        loss = float(objective(views, StepContext())["loss"])
    valid = views.meta.valid["volume"][:, 0]
    total, count = 0.0, 0
    for b in range(2):
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                for k in range(SIZE[2]):
                    if valid[b, i, j, k] and (region == "all" or hidden[b, 0, i, j, k]):
                        total += float((output[b, 0, i, j, k] - x[b, 0, i, j, k]) ** 2)
                        count += 1
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert float(objective.denominators(views)["voxels"]) == count


def test_normalise_patches__matches_the_formula() -> None:
    rows = torch.randn(2, 3, 8, dtype=torch.float64)
    result = normalise_patches(rows)
    for b in range(2):
        for n in range(3):
            patch = rows[b, n]
            mean = sum(float(v) for v in patch) / 8
            variance = sum((float(v) - mean) ** 2 for v in patch) / 8
            expected = [(float(v) - mean) / (variance + 1e-6) ** 0.5 for v in patch]
            assert result[b, n].tolist() == pytest.approx(expected)
    assert torch.isfinite(normalise_patches(torch.ones(1, 1, 8))).all()


def test_excluded_voxels__do_not_enter_the_loss() -> None:
    objective = vit_mae()
    views = toy_views(objective)
    before = float(objective(views, StepContext())["loss"].detach())
    excluded = ~views.meta.valid["volume"]
    far = torch.where(excluded[:, :, None] & hidden_voxels(views)[:, None], torch.tensor(1e3), views["volume"])
    assert float(objective(with_views(views, volume=far), StepContext())["loss"].detach()) == pytest.approx(before, rel=1e-5)


def test_mask_channel__is_dropped_at_export_and_tells_mask_from_mean() -> None:
    objective = cnn_mae(mask_channel=True)
    assert objective.mask_stem is not None
    state = objective.exported()["encoder"].module.state_dict()
    assert state["net.convInit.conv.weight"].shape[1] == 1
    x = torch.zeros(1, 1, *SIZE)
    none, some = torch.zeros(1, 1, *SIZE, dtype=torch.bool), torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    some[:, :, :8] = True
    with torch.no_grad():
        assert not torch.equal(objective.predict(x, none), objective.predict(x, some))
        blind = cnn_mae(mask_channel=False)
        assert torch.equal(blind.predict(x, none), blind.predict(x, some))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_reconstruct__shows_input_where_visible(name: str) -> None:
    objective = BUILDERS[name]()
    views = toy_views(objective)
    pictures = objective.reconstruct(views)
    hidden = hidden_voxels(views)
    assert torch.equal(pictures["output"][~hidden], views["volume"][:, 0][~hidden])
    assert torch.equal(pictures["mask"], hidden[:, 0])
    assert not torch.equal(pictures["output"][hidden], views["volume"][:, 0][hidden])


def test_recon_region__is_checked() -> None:
    with pytest.raises(ValueError, match='accepted: "masked"'):
        vit_mae(recon_region="visible")
