from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.seeding import counter_rng
from medssl.views.masks import block_mask, upsample_mask


@pytest.mark.parametrize("grid", [(6, 6, 6), (4, 6, 8), (1, 5, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.9])
def test_block_mask__hides_exactly_int_ratio_n(grid: tuple[int, int, int], ratio: float) -> None:
    for seed in range(5):
        mask = block_mask(grid, ratio, counter_rng(seed))
        assert mask.shape == grid and mask.dtype == bool
        assert mask.sum() == int(ratio * np.prod(grid))  # True = hidden


def test_block_mask__same_key_same_mask_and_every_cell_is_hidden_equally_often() -> None:
    assert np.array_equal(block_mask((4, 6, 8), 0.75, counter_rng(7)), block_mask((4, 6, 8), 0.75, counter_rng(7)))
    share = np.mean([block_mask((2, 3, 4), 0.5, counter_rng(seed)) for seed in range(600)], axis=0)
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / 600)


def test_block_mask__refuses_ratio_one() -> None:
    with pytest.raises(RequestError, match=r"mask ratio 1.*accepted is 0 <= ratio < 1.*set"):
        block_mask((2, 2, 2), 1, counter_rng(0))


def test_upsample_mask__repeats_cells_like_kron() -> None:
    mask = torch.from_numpy(np.stack([block_mask((2, 3, 4), 0.5, counter_rng(seed)) for seed in range(2)]))
    large = upsample_mask(mask, (8, 6, 4))
    for b in range(2):
        assert np.array_equal(large[b].numpy(), np.kron(mask[b].numpy(), np.ones((4, 2, 1), dtype=bool)))
    assert upsample_mask(mask[None], (8, 6, 4)).shape == (1, 2, 8, 6, 4)


def test_upsample_mask__refuses_a_size_that_is_no_multiple() -> None:
    with pytest.raises(RequestError, match="multiples of the grid"):
        upsample_mask(torch.zeros(1, 2, 3, 4, dtype=torch.bool), (8, 7, 4))
