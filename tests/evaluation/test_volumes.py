from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.volumes import CaseReader, TrainingCrops, Volume, structure_points, whole_image
from medssl.types import DrawKey
from tests.evaluation.tiny_cohort import write_cohort

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    cohort = Cohort.load(write_cohort(tmp_path_factory.mktemp("cohort"), train=1, val=0, test=0))
    return CaseReader("mri")(cohort.cases[0])


def crops(**changes: Any) -> TrainingCrops:
    values: dict[str, Any] = {"size": (8, 8, 8), "spacing_mm": None, "normalize": "zscore", "augment": {}}
    return TrainingCrops(**{**values, "foreground": 1.0, "seed": 0, "device": CPU, **changes})


def test_crops__without_augmentation_are_the_normalised_voxels(volume: Volume) -> None:
    maker = crops()
    whole, _ = whole_image(volume, "zscore", None, CPU)
    assert volume.label is not None
    for step in range(5):
        images, labels = maker.batch([volume, volume], step)
        for position in range(2):
            box = maker.draw_box(volume, DrawKey(0, step, position))
            start = np.rint(np.array(box.start_mm) / volume.spacing_mm).astype(int)
            window = tuple(slice(a, a + 8) for a in start)
            assert torch.equal(images[position, 0], whole[0, 0][window])
            assert np.array_equal(labels[position, 0].numpy(), volume.label[window])


def test_boxes__are_centred_on_each_structure_equally_often_and_lie_inside(volume: Volume) -> None:
    maker = crops(size=(4, 4, 4))
    assert volume.label is not None
    hits = {1: 0, 2: 0}
    for step in range(200):
        box = maker.draw_box(volume, DrawKey(0, step, 0))
        start = np.rint(np.array(box.start_mm) / volume.spacing_mm).astype(int)
        assert (start >= 0).all()
        assert (start + 4 <= np.array(volume.label.shape)).all()
        seen = volume.label[tuple(slice(a, a + 4) for a in start)]
        assert seen.max() > 0
        hits[int(seen.max())] += 1
    assert abs(hits[1] - hits[2]) < 50
    starts = [crops(size=(4, 4, 4), foreground=0.0).draw_box(volume, DrawKey(0, s, 0)).start_mm for s in range(200)]
    assert np.ptp(np.array(starts), axis=0) == pytest.approx([16, 14, 24])  # every place is reached, mm


def test_short_axes__hold_the_whole_volume_shifted_at_random(volume: Volume) -> None:
    maker = crops(size=(24, 8, 8))
    starts = np.array([maker.draw_box(volume, DrawKey(0, step, 0)).start_mm[0] for step in range(60)])
    assert set(starts) == {-4.0, -3.0, -2.0, -1.0, 0.0}
    images, labels = maker.batch([volume], 3)
    _, padding = whole_image(volume, "zscore", None, CPU)
    start = int(maker.draw_box(volume, DrawKey(0, 3, 0)).start_mm[0])
    outside = [i for i in range(24) if not 0 <= i + start < 20]
    assert len(outside) == 4
    assert np.all(images[0, 0, outside].numpy() == np.float32(padding))  # as at inference
    assert (labels[0, 0, outside] == 0).all()


def test_augmentation__moves_image_and_label_together(volume: Volume) -> None:
    maker = crops(size=(16, 16, 12), augment={"rotate_deg": 25, "scale": [0.9, 1.1]})
    plain = crops(size=(16, 16, 12))
    for step in range(4):
        image, label = maker.batch([volume], step)
        before_image, before_label = plain.batch([volume], step)
        assert not torch.equal(label, before_label)
        inside, outside = image[label == 2].mean(), image[label == 0].mean()
        reference = before_image[before_label == 2].mean() - before_image[before_label == 0].mean()
        assert inside - outside > 0.7 * reference


def test_unknown_augmentation__is_refused_with_a_near_match() -> None:
    with pytest.raises(RequestError, match=r'augment: unknown key rotate \(did you mean "rotate_deg"\?\)'):
        crops(augment={"rotate": 10})
    with pytest.raises(RequestError, match="unknown key mask"):
        crops(augment={"mask": None})


def test_structure_points__lie_in_their_structure_and_are_bounded() -> None:
    label = np.zeros((30, 30, 30), np.int16)
    label[2:20, 3:25, 4:28] = 3
    label[29, 29, 29] = 1
    points = structure_points(label)
    assert sorted(points) == [1, 3]
    assert len(points[3]) == 4096
    assert (label[tuple(points[3].T)] == 3).all()
    assert points[1].tolist() == [[29, 29, 29]]


def test_whole_image__is_resampled_to_the_spacing_asked_for(volume: Volume) -> None:
    image, _ = whole_image(volume, "none", (2.0, 2.0, 2.0), CPU)
    assert tuple(image.shape) == (1, 1, 10, 9, 16)
    same, _ = whole_image(volume, {"window": [0, 400]}, None, CPU)
    expected = np.clip(volume.image[0].astype(np.float32) / 400, 0, 1)
    np.testing.assert_allclose(same[0, 0].numpy(), expected, atol=1e-6)


def test_reader__keeps_volumes_up_to_its_budget(tmp_path: Path) -> None:
    cohort = Cohort.load(write_cohort(tmp_path, train=2, val=0, test=0))
    reader = CaseReader("mri", budget_bytes=40000)  # one volume: 20 * 18 * 16 * (2 + 1 + 2) bytes
    first = reader(cohort.cases[0])
    assert reader(cohort.cases[0]) is first
    assert reader(cohort.cases[1]) is not reader(cohort.cases[1])
