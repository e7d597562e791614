from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.errors import RequestError
from medssl.evaluation.controls import control_features, intensity_statistics, random_init, small_images
from medssl.evaluation.features import probe_table


def build() -> SegResNet3D:
    return SegResNet3D(init_filters=8, blocks_down=(1, 1), blocks_up=(1,))


def test_random_init__depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_init(build, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(10)
    again, other = random_init(build, seed=4).state_dict(), random_init(build, seed=5).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["net.convInit.conv.weight"], other["net.convInit.conv.weight"])


def test_small_images__are_block_means():
    x = torch.randn(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    rows = small_images(x, size=2)
    expected = [
        x[b, c, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 4 * k : 4 * k + 4].mean().item()
        for b in range(2) for c in range(3) for i in range(2) for j in range(2) for k in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(rows.flatten().numpy(), expected, atol=1e-6)
    assert small_images(x[:, :, 0], size=2).shape == (2, 12)
    with pytest.raises(RequestError, match="takes"):
        small_images(x[0, 0])


def test_intensity_statistics__equal_numpy_and_know_nothing_of_places():
    x = torch.randn(2, 2, 5, 5, 4, generator=torch.Generator().manual_seed(1))
    rows = intensity_statistics(x).numpy()
    voxels = x[1, 0].flatten().double().numpy()
    levels = np.percentile(voxels, [1, 5, 25, 50, 75, 95, 99], method="nearest")
    expected = [voxels.mean(), voxels.std(), voxels.min(), voxels.max(), *levels]
    np.testing.assert_allclose(rows[1, 0::2], expected, rtol=1e-12)
    shuffled = x.flatten(2)[..., torch.randperm(100, generator=torch.Generator().manual_seed(2))].reshape(x.shape)
    np.testing.assert_allclose(intensity_statistics(shuffled).numpy(), rows, rtol=1e-12)


def test_control_features__feed_the_probe_table_and_find_what_is_in_the_pixels():
    generator = torch.Generator().manual_seed(3)
    brightness = torch.linspace(-1, 1, 24)
    x = torch.randn(24, 1, 8, 8, 8, generator=generator) + brightness[:, None, None, None, None]
    passes = []

    def batches():
        passes.append(1)
        return [(x[i : i + 8], list(range(i, i + 8))) for i in range(0, 24, 8)]

    found = control_features(build, batches, seed=1, size=4)
    assert {name: values.shape for name, values in found.items()} == {
        "random_init": (24, 16),
        "raw_pixels": (24, 64),
        "intensity_statistics": (24, 11),
    }
    groups = [f"p{i % 12}" for i in range(24)]
    rows = probe_table(np.random.default_rng(4).normal(size=(24, 3)), found, brightness.numpy(), groups, task="regression")
    value = {row["name"]: row["value"] for row in rows if row["probe"] == "linear" and row["metric"] == "r2"}
    assert value["intensity_statistics"] > 0.95 and value["raw_pixels"] > 0.9
    assert value["encoder"] < 0.2
    again = control_features(build, batches, seed=1, size=4)
    assert all((found[name] == again[name]).all() for name in found)
