from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.layers.pos_embed import resize_positions, sincos_positions
from medssl.layers.tokens import (
    flatten_tokens,
    gather_tokens,
    patchify,
    scatter_tokens,
    unflatten_tokens,
    unpatchify,
    visible_indices,
)

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(GRIDS)
@settings(max_examples=30, deadline=None)
def test_flatten_tokens__follows_the_documented_order(grid: tuple[int, int, int]) -> None:
    x = torch.arange(2 * 3 * grid[0] * grid[1] * grid[2]).reshape(2, 3, *grid)
    tokens = flatten_tokens(x)
    for a in range(grid[0]):
        for b in range(grid[1]):
            for c in range(grid[2]):
                n = (a * grid[1] + b) * grid[2] + c
                assert torch.equal(tokens[:, n], x[:, :, a, b, c])
    assert torch.equal(unflatten_tokens(tokens, grid), x)


@given(GRIDS, st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_patchify__cuts_the_cells_of_a_non_cubic_grid(grid: tuple[int, ...], patch: tuple[int, ...], channels: int) -> None:
    size = [g * p for g, p in zip(grid, patch)]
    x = torch.randn(2, channels, *size)
    rows = patchify(x, patch)
    for a in range(grid[0]):
        for b in range(grid[1]):
            for c in range(grid[2]):
                cell = x[
                    :, :, a * patch[0] : (a + 1) * patch[0], b * patch[1] : (b + 1) * patch[1], c * patch[2] : (c + 1) * patch[2]
                ]
                assert torch.equal(rows[:, (a * grid[1] + b) * grid[2] + c], cell.flatten(1))
    assert torch.equal(unpatchify(rows, grid, patch, channels), x)


def test_patchify__agrees_with_a_strided_convolution() -> None:
    x = torch.randn(1, 1, 8, 12, 4, dtype=torch.float64)
    conv = torch.nn.Conv3d(1, 5, 4, stride=4, bias=False).double()
    expected = flatten_tokens(conv(x))
    assert torch.allclose(patchify(x, (4, 4, 4)) @ conv.weight.flatten(1).T, expected)


def test_visible_indices__and_scatter_invert_each_other() -> None:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(12)[:9]] = True
    mask = mask.reshape(2, 2, 3, 2)
    keep = visible_indices(mask)
    tokens = torch.randn(2, 12, 4)
    fill = torch.zeros(2, 12, 4)
    back = scatter_tokens(gather_tokens(tokens, keep), keep, fill)
    hidden = flatten_tokens(mask[:, None])[..., 0]
    assert torch.equal(back[~hidden], tokens[~hidden])
    assert (back[hidden] == 0).all()


def test_visible_indices__refuses_uneven_counts() -> None:
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    with pytest.raises(ValueError, match="equal counts per sample"):
        visible_indices(mask)


def test_unflatten_tokens__refuses_a_wrong_grid() -> None:
    with pytest.raises(ValueError, match="do not fill the grid"):
        unflatten_tokens(torch.zeros(1, 6, 2), (2, 2, 2))


def test_sincos_positions__are_distinct_and_match_the_formula() -> None:
    grid = (3, 4, 2)
    table = sincos_positions(grid, 26)[0].double()
    assert len({tuple(row.tolist()) for row in table.round(decimals=6)}) == 24
    per_axis = 26 // 6
    x, y, z = 2, 1, 1
    expected = []
    for value in (x, y, z):
        angles = [value * 10000 ** (-i / per_axis) for i in range(per_axis)]
        expected += [torch.tensor(a).sin().item() for a in angles] + [torch.tensor(a).cos().item() for a in angles]
    row = table[(x * 4 + y) * 2 + z]
    assert torch.allclose(row[:24], torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    assert (row[24:] == 0).all()


def test_resize_positions__keeps_a_ramp_along_each_axis() -> None:
    old, new = (4, 6, 3), (8, 12, 6)
    maps = torch.stack(torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in old], indexing="ij"))[None]
    resized = unflatten_tokens(resize_positions(flatten_tokens(maps), old, new), new)
    wanted = torch.stack(torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in new], indexing="ij"))[None]
    assert torch.allclose(resized[..., 1:-1, 1:-1, 1:-1], wanted[..., 1:-1, 1:-1, 1:-1], atol=1e-6)
    table = torch.randn(1, 72, 5)
    assert resize_positions(table, old, old) is table
