"""Embeddings on disk: round trip, resuming, and every way in which they can be the wrong ones."""

from __future__ import annotations

import json
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from medssl.correspondence import embed_store
from medssl.domains.statistics import foreground
from medssl.errors import RequestError, StoreError, WeightsError
from medssl.matching import store as embeddings
from medssl.matching.base import MatchVolume
from medssl.matching.embedding import EmbeddingMatcher
from medssl.matching.network import MatcherNetwork, pooling, tile_starts, tile_weight
from medssl.matching.store import EmbeddingReader, read_manifest
from medssl.store.reader import StoreReader
from medssl.store.writer import write_item
from medssl.types import Sample
from tests.matching import toy


@pytest.fixture
def store(tmp_path: Path, phantoms: Path) -> StoreReader:
    shutil.copytree(phantoms, tmp_path / "store")
    return StoreReader(tmp_path / "store")


def test_round_trip__bytes_modes_and_what_the_manifest_says(store: StoreReader, untrained: Path) -> None:
    network = MatcherNetwork(untrained)
    first = store.series_ids()[:1]
    done = embed_store(network, store, first)
    assert (done.written, done.present, done.failed) == (1, 0, {})
    manifest = read_manifest(done.folder)
    assert manifest is not None
    assert (
        manifest.spacing_mm == (2.0, 2.0, 2.0)
        and manifest.step_mm == (4.0, 4.0, 4.0)
        and manifest.coarse_step_mm == (16.0, 16.0, 16.0)
    )
    assert manifest.channels == 16 and manifest.store_key == store.key and manifest.weights_hash == network.weights_hash
    files = sorted(done.folder.iterdir())
    assert [path.name for path in files] == sorted(
        [f"{first[0]}.b2nd", f"{first[0]}.coarse.b2nd", f"{first[0]}.json", "manifest.json"]
    )
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(done.folder.stat().st_mode) == 0o700
    assert done.bytes_per_volume == done.largest == sum(path.stat().st_size for path in files if path.suffix == ".b2nd")

    reader = pickle.loads(pickle.dumps(EmbeddingReader(done.folder)))
    found, made = reader.read(first[0]), network.embed(MatchVolume.of_store(store, first[0]), store.key)
    assert found.key == made.key == manifest.key
    for level in ("fine", "coarse"):
        a, b = getattr(found, level), getattr(made, level)
        np.testing.assert_array_equal(a.vectors, b.vectors)
        assert a.vectors.dtype == np.int8
        np.testing.assert_array_equal(a.origin_mm, b.origin_mm)
        np.testing.assert_array_equal(a.step_mm, b.step_mm)
    np.testing.assert_array_equal(reader.read_box(first[0], (2, 3, 4), (5, 6, 7)), found.fine.vectors[2:7, 3:9, 4:11])


def test_resuming__writes_what_is_missing_or_stale_and_nothing_else(store: StoreReader, untrained: Path) -> None:
    network = MatcherNetwork(untrained, step_mm=8)
    series = store.series_ids()
    assert embed_store(network, store, series[:2]).written == 2
    again = embed_store(network, store, series)
    assert (again.written, again.present) == (2, 2)
    (again.folder / f"{series[0]}.json").unlink()  # as a kill between maps and record leaves it
    (again.folder / f".{series[0]}.b2nd.999999999.tmp").write_bytes(b"half")
    sample, _ = toy.phantom(77, spacing=4.0)
    sample.meta.__dict__["series_id"] = series[1]
    write_item(sample, store.store, patient_id="0" * 32, mask=foreground(sample.image[0]))
    fresh = StoreReader(store.store)
    assert (done := embed_store(network, fresh, series)).written == 2 and done.present == 2
    assert not list(done.folder.glob("*.tmp")) and not list(done.folder.glob(".*.tmp"))


def test_missing_and_stale_embeddings__are_counted(store: StoreReader, untrained: Path) -> None:
    series = store.series_ids()
    done = embed_store(MatcherNetwork(untrained), store, series[:3])
    matcher = EmbeddingMatcher(untrained, store=store.store)
    versions = {name: store.record(name).checksum for name in series}
    matcher.require({name: versions[name] for name in series[:3]})
    with pytest.raises(
        RequestError, match=rf"of 4 volumes 1 have no embedding and 1 one of older voxels \(first: series {series[3]}\)"
    ):
        matcher.require({**versions, series[0]: "another"})
    (done.folder / f"{series[0]}.b2nd").write_bytes(b"short")
    with pytest.raises(RequestError, match="of 1 volumes 1 have no embedding"):
        matcher.require({series[0]: versions[series[0]]})
    with pytest.raises(
        RequestError, match=f"series {series[3]} has no embedding in .*; run `medssl embed` with these weights again"
    ):
        EmbeddingReader(done.folder).read(series[3])


def test_damaged_maps__are_named(store: StoreReader, untrained: Path) -> None:
    series = store.series_ids()[:1]
    done = embed_store(MatcherNetwork(untrained), store, series)
    path = done.folder / f"{series[0]}.b2nd"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(StoreError, match=f"the embedding of series {series[0]} in .* is damaged; delete {series[0]}.json"):
        EmbeddingReader(done.folder).read(series[0])


def test_no_embeddings__say_what_to_run(store: StoreReader, untrained: Path) -> None:
    with pytest.raises(RequestError, match="holds no embeddings; run `medssl embed` with these weights again"):
        EmbeddingMatcher(untrained, store=store.store)


def test_other_weights__are_stale(store: StoreReader, untrained: Path, tmp_path: Path) -> None:
    embed_store(MatcherNetwork(untrained), store, store.series_ids()[:1])
    other = toy.save(toy.make_objective(dim=16, seed=1), tmp_path / "other", size=64)
    with pytest.raises(RequestError, match=r"were made with weights [0-9a-f]{32} where [0-9a-f]{32} is wanted; run `medssl embed`"):
        EmbeddingMatcher(other, store=store.store)


def test_another_step__is_refused_with_both(store: StoreReader, untrained: Path) -> None:
    embed_store(MatcherNetwork(untrained, step_mm=8), store, store.series_ids()[:1])
    with pytest.raises(RequestError, match="were made with step_mm 8 where 4 is wanted"):
        EmbeddingMatcher(untrained, store=store.store)
    assert EmbeddingMatcher(untrained, store=store.store, step_mm=8).reader is not None


def test_mixed_spacing__a_manifest_that_was_changed_is_refused(store: StoreReader, untrained: Path) -> None:
    network = MatcherNetwork(untrained)
    done = embed_store(network, store, store.series_ids()[:1])
    path = done.folder / embeddings.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "spacing_mm": [1.0, 1.0, 1.0]}))
    with pytest.raises(RequestError, match="were made with spacing_mm 1 where 2 is wanted"):
        EmbeddingMatcher(untrained, store=store.store)
    with pytest.raises(RequestError, match="holds embeddings with spacing_mm 1 where 2 is wanted; delete the folder"):
        embed_store(network, store, store.series_ids()[:1])
    path.write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json cannot be read \(JSONDecodeError\)"):
        EmbeddingMatcher(untrained, store=store.store)


def test_matcher_trained_at_another_spacing__is_refused(untrained: Path) -> None:
    with pytest.raises(RequestError, match="the matcher was trained at a spacing of 2x2x2 mm and 1x1x1 mm is asked for"):
        MatcherNetwork(untrained, spacing_mm=1)
    assert MatcherNetwork(untrained, spacing_mm=2.0).spacing_mm == (2.0, 2.0, 2.0)


def test_step__must_be_a_multiple() -> None:
    assert [pooling((2.0, 2.0, 2.0), 2, step) for step in (None, 4, 8, 16)] == [1, 1, 2, 4]
    with pytest.raises(RequestError, match="step_mm is 6; accepted with these weights: 4, 8 or 16"):
        pooling((2.0, 2.0, 2.0), 2, 6)


def test_weights_that_are_no_matcher__say_how_to_train_one(tmp_path: Path) -> None:
    model = toy.make_objective(dim=16)
    run = toy.save(model, tmp_path / "run")
    (run / "weights" / "last" / "embedding.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no matcher .* train one with the objective anatomical_embedding"):
        MatcherNetwork(run)


def test_tiles__cover_every_cell_and_weigh_more_than_nothing() -> None:
    starts = tile_starts((64, 40, 32), (32, 32, 32), 8)
    seen = np.zeros((64, 40, 32), dtype=int)
    for x, y, z in starts:
        assert x % 8 == y % 8 == z % 8 == 0
        seen[x : x + 32, y : y + 32, z : z + 32] += 1
    assert seen.min() >= 1 and seen[24:40, :, :].min() >= 2
    assert float(tile_weight((32, 16, 8), 2).min()) > 0


def test_same_volume_at_another_voxel_size__has_nearly_the_same_embedding(untrained: Path) -> None:
    """Volumes of any spacing are put on the matcher's: voxels of 4 mm and the same cut into eight give the same cells."""
    network = MatcherNetwork(untrained)
    sample, _ = toy.phantom(3, spacing=4.0)
    assert sample.affine is not None
    affine = sample.affine @ np.diag([0.5, 0.5, 0.5, 1.0])
    affine[:3, 3] = sample.affine[:3, 3] - 1.0
    eighth = Sample(sample.image.repeat(2, 1).repeat(2, 2).repeat(2, 3), (2.0, 2.0, 2.0), affine, None, sample.meta)
    coarse, fine = (network.embed(MatchVolume.of_sample(one)) for one in (sample, eighth))
    assert fine.fine.grid == coarse.fine.grid
    a, b = (e.fine.vectors.reshape(-1, 16).astype(np.float64) for e in (fine, coarse))
    both = a.any(axis=1) & b.any(axis=1)
    assert both.sum() > 0.8 * a.any(axis=1).sum()
    cosine = (a[both] * b[both]).sum(axis=1) / np.linalg.norm(a[both], axis=1) / np.linalg.norm(b[both], axis=1)
    assert np.median(cosine) > 0.9


def test_withdrawal__deletes_embeddings_with_the_volume(store: StoreReader, untrained: Path) -> None:
    from medssl.archive.operations.withdraw import delete_items

    series = store.series_ids()[:2]
    folder = embed_store(MatcherNetwork(untrained), store, series).folder
    delete_items(store.store, series[:1])
    assert [path.name for path in folder.iterdir() if series[0] in path.name] == []
    assert EmbeddingReader(folder).record(series[0]) is None and EmbeddingReader(folder).record(series[1]) is not None
    assert store.series_ids() == StoreReader(store.store).series_ids() and series[0] not in store.series_ids()
