"""Scores of clips: formulas against SciPy and plain loops; nothing here needs an encoder but the last tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.domains.ultrasound import Ultrasound
from medssl.encoders.video_vit import VideoViT
from medssl.errors import RequestError
from medssl.evaluation.clips import (
    IGNORED,
    ClipFeatures,
    FrameHead,
    HeadSettings,
    PixelTokens,
    anomaly_probe,
    anomaly_scores,
    embed_clips,
    fit_head,
    labels_in_view,
    mark_error,
    motion,
    motion_of,
    phase_retrieval,
    phase_targets,
    segmentation_probe,
    step_means,
)
from medssl.evaluation.features import embed, probe_table
from medssl.evaluation.linear_probe import fit_linear, linear_predict
from medssl.evaluation.metrics import dice
from medssl.evaluation.scores import patient_folds
from medssl.layers.tokens import flatten_tokens
from medssl.sampling.clips import pick_frames
from medssl.types import ClipBatch, DrawKey, EncoderOutput, Views, ViewsMeta
from medssl.views.clips import ClipFrames, ClipViews


def test_phase_targets__linear_between_marks_and_nothing_outside() -> None:
    found = phase_targets(12, ed=[2, 10], es=[5])
    assert np.isnan(found[[0, 1, 11]]).all()
    np.testing.assert_allclose(found[2:11], [0, 1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert np.isnan(phase_targets(4, [], [])).all()


def test_mark_error__nearest_mark_and_chance() -> None:
    score = np.array([0.0, 1, 5, 2, np.nan, 3])
    assert mark_error(score, [3]) == (1.0, pytest.approx((3 + 2 + 1 + 0 + 2) / 5))
    assert mark_error(score, [5, 2])[0] == 0
    with pytest.raises(ValueError, match="All-NaN"):
        mark_error(np.full(3, np.nan), [0])


def beats(n_clips: int = 12, frames: int = 40, period: float = 16.0, noise: float = 0.05) -> tuple[Any, ...]:
    """Features in which one direction is the phase, hidden under a look that is each clip's own."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=8)
    features, ed, es, groups = [], [], [], []
    for k in range(n_clips):
        start = rng.uniform(0, period)
        phase = (start + np.arange(frames)) / period * 2 * np.pi
        look = rng.normal(size=8) * 20
        features.append(look + np.outer(0.5 - 0.5 * np.cos(phase), direction) + rng.normal(0, noise, (frames, 8)))
        ed.append([f for f in range(frames) if abs((start + f + period / 2) % period - period / 2) <= 0.5])
        es.append([f for f in range(frames) if abs((start + f) % period - period / 2) <= 0.5])
        groups.append(f"p{k // 2}")
    return features, ed, es, groups


def test_phase_retrieval__finds_marks_across_patients_and_not_in_noise() -> None:
    features, ed, es, groups = beats()
    rows = {row["metric"]: row for row in phase_retrieval(features, ed, es, groups, frame_ms=[20.0] * 12, draws=200)}
    assert rows["ed_frames"]["value"] <= 1 and rows["es_frames"]["value"] <= 1
    assert rows["es_ms"]["value"] == pytest.approx(20 * rows["es_frames"]["value"])
    assert 2.5 < rows["es_frames_chance"]["value"] < 6
    assert rows["ed_frames"]["n_images"] == 12 and rows["ed_frames"]["n_patients"] == 6
    noise = [np.random.default_rng(k).normal(size=one.shape) for k, one in enumerate(features)]
    blind = {row["metric"]: row["value"] for row in phase_retrieval(noise, ed, es, groups, draws=200)}
    assert blind["es_frames"] > 1.5


def test_phase_retrieval__leaves_out_clips_without_marks_and_rows_without_features() -> None:
    features, ed, es, groups = beats()
    es[3], features[4] = [], features[4].copy()
    features[4][5] = np.nan
    rows = phase_retrieval(features, ed, es, groups, draws=50)
    assert rows[0]["n_images"] == 11
    with pytest.raises(RequestError, match="no clip has a frame"):
        phase_retrieval(features, [[]] * 12, es, groups)


def test_anomaly_scores__by_a_plain_loop_over_other_patients() -> None:
    rng = np.random.default_rng(1)
    features, groups = rng.normal(size=(40, 6)), [f"p{k // 3}" for k in range(40)]
    normal = rng.random(40) < 0.6
    found = anomaly_scores(features, normal, groups, k=4)
    for k in range(40):
        others = [j for j in range(40) if normal[j] and groups[j] != groups[k]]
        cosines = [features[k] @ features[j] / np.linalg.norm(features[k]) / np.linalg.norm(features[j]) for j in others]
        assert found[k] == pytest.approx(np.mean(sorted(1 - c for c in cosines)[:4]))


def test_anomaly_probe__is_the_mann_whitney_statistic_of_scipy() -> None:
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(2)
    abnormal = np.arange(60) % 3 == 0
    features = rng.normal(size=(60, 5)) + np.array([3, 0, 0, 0, 0]) + np.outer(abnormal, [0, 2, 0, 0, 0])
    groups = [f"p{k}" for k in range(60)]
    (row,) = anomaly_probe(features, abnormal, groups, draws=200)
    scores = anomaly_scores(features, ~abnormal, groups)
    wanted = mannwhitneyu(scores[abnormal], scores[~abnormal]).statistic / (abnormal.sum() * (~abnormal).sum())
    assert row["metric"] == "auroc" and row["value"] == pytest.approx(wanted) and row["value"] > 0.6
    assert row["low"] < row["value"] < row["high"] and row["n_patients"] == 60
    with pytest.raises(RequestError, match="no normal clip of another patient"):
        anomaly_scores(features[:4], np.array([True, True, False, False]), ["a", "a", "a", "b"])


def test_ejection_fraction__is_the_normal_equation_across_patients() -> None:
    """MAE in points of `probe_table`, folds by patient, against ridge regression solved by hand on the same folds."""
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(20), 2)
    ef = np.repeat(rng.uniform(20, 70, 20), 2)
    features = np.outer((ef - 45) / 15, rng.normal(size=7)) + rng.normal(0, 0.5, (40, 7))
    groups = [f"p{k}" for k in patients]
    controls = {name: rng.normal(size=(40, 3)) for name in ("random_init", "raw_pixels", "intensity_statistics")}
    table = probe_table(features, controls, ef, groups, task="regression", draws=100)
    found = next(row for row in table if (row["name"], row["probe"], row["metric"]) == ("encoder", "linear", "mae"))
    fold = patient_folds(ef, groups, folds=5, seed=0)
    predicted = np.empty(40)
    for held in range(5):
        fit = fold != held
        assert not set(patients[fit]) & set(patients[~fit])
        alpha = fit_linear(features[fit], ef[fit], [groups[k] for k in np.flatnonzero(fit)], task="regression").alpha
        mean, scale = features[fit].mean(0), features[fit].std(0)
        x = (features[fit] - mean) / scale
        weight = np.linalg.solve(x.T @ x + alpha * fit.sum() * np.eye(7), x.T @ (ef[fit] - ef[fit].mean()))
        predicted[~fit] = (features[~fit] - mean) / scale @ weight + ef[fit].mean()
    np.testing.assert_allclose(linear_predict(features, ef, groups, task="regression"), predicted, rtol=1e-6)
    assert found["value"] == pytest.approx(np.abs(predicted - ef).mean()) and found["value"] < 5


def test_labels_in_view__follow_the_picture() -> None:
    """Labels drawn as a picture and shown by the view itself agree with labels taken through its map."""
    labels = np.zeros((3, 60, 80), np.uint8)
    labels[:, 20:40, 30:55] = 1
    labels[1, 42:50, 10:30] = 2
    sector = np.zeros((60, 80), bool)
    sector[5:55, 8:72] = True
    views = ClipViews(size=32, frames=3, fps=25, normalize="none", scales=[0.8], tilt_deg=15, depth=(0.9, 1.1))
    stats = {"mean": 0.0, "std": 1.0, "p00_5": 0.0, "min": 0.0, "max": 2.0}
    order = np.arange(3)[None]
    item = ClipFrames(labels[:, None], sector, None, order, order >= 0, order * 0.04, order, np.ones(1), stats, DrawKey(0, 5, 0), 0)
    data, _, _ = views.batch([item], "cpu")
    inside = data["clip_sector"][0, 0, 0].numpy()
    shown = labels_in_view(labels, data["clip_frame"][0, 0].tolist(), data["clip_map"][0, 0].numpy(), (32, 32), inside)
    pictured = data["clip"][0, 0, :, 0].numpy()
    assert (shown[:, ~inside] == IGNORED).all() and {0, 1, 2} <= set(np.unique(shown))
    assert (np.abs(shown - pictured) < 0.5)[:, inside].mean() > 0.95


@pytest.mark.parametrize(("width", "scale"), [(0, 4), (0, 16), (16, 4), (8, 1)])
def test_head__has_the_size_of_the_labels(width: int, scale: int) -> None:
    head = FrameHead(6, 3, scale, width)
    assert head(torch.zeros(2, 3, 5, 6)).shape == (2, 3, 3 * scale, 5 * scale)


def test_linear_head__is_one_matrix_per_token() -> None:
    head = FrameHead(5, 2, 4, 0)
    tokens = torch.randn(1, 2, 3, 5)
    out = head(tokens)
    weight, bias = head.net[0].conv.weight[:, :, 0, 0], head.net[0].conv.bias  # type: ignore[index,union-attr]
    one = (weight @ tokens[0, 1, 2] + bias).reshape(2, 4, 4)
    torch.testing.assert_close(out[0, :, 4:8, 8:12], one)
    with pytest.raises(RequestError, match="power of two"):
        FrameHead(5, 2, 12, 0)


def squares(n: int = 24) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens that say which of their 4 x 4 pixels belong to a square, in a random basis."""
    rng = np.random.default_rng(5)
    labels = np.zeros((n, 16, 16), np.int64)
    for one in labels:
        row, column, size = *rng.integers(1, 9, 2), rng.integers(3, 7)
        one[row : row + size, column : column + size] = 1
    cells = labels.reshape(n, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(n, 4, 4, 16)
    tokens = (cells @ rng.normal(size=(16, 16)) + rng.normal(0, 0.01, (n, 4, 4, 16))).astype(np.float32)
    return tokens, labels, [f"p{k // 2}" for k in range(n)]


def test_segmentation_probe__reads_what_tokens_hold_and_nothing_from_noise() -> None:
    tokens, labels, groups = squares()
    settings = HeadSettings(steps=120, lr=4e-2, folds=2)
    labels[:, 0] = IGNORED
    rows, predicted = segmentation_probe(tokens, labels, groups, {1: "square"}, settings=settings, draws=100)
    assert [row["metric"] for row in rows] == ["dice_square"] and rows[0]["value"] > 0.9
    assert rows[0]["probe"] == "linear_head" and rows[0]["n_patients"] == 12 and not predicted[:, 0].any()
    p, t = predicted == 1, labels == 1
    assert rows[0]["value"] == pytest.approx(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(p, t)]))
    noise = np.random.default_rng(6).normal(size=tokens.shape).astype(np.float32)
    blind, _ = segmentation_probe(noise, labels, groups, {1: "square"}, settings=settings, draws=100)
    assert blind[0]["value"] < 0.6
    with pytest.raises(RequestError, match="name all of them"):
        segmentation_probe(tokens, labels + 1, groups, {1: "square"})


def test_linear_head__reads_tokens_that_lie_along_few_directions() -> None:
    """Of an untrained video ViT, 10 of 96 directions hold nearly all variance: a fit that is cut short does not say what is there."""
    tokens, labels, _ = squares()
    rng = np.random.default_rng(8)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    narrow = ((tokens @ rotation) * np.geomspace(1, 0.03, 16) @ rng.normal(size=(16, 16))).astype(np.float32)

    def right(settings: HeadSettings) -> float:
        drawn = fit_head(narrow / narrow.std(), labels, classes=2, settings=settings, seed=0)(
            torch.from_numpy(narrow / narrow.std())
        )
        return float(np.mean([dice(one, truth, [1])[1] for one, truth in zip(drawn.argmax(1).numpy(), labels)]))

    assert right(HeadSettings()) > 0.95 > 0.92 > right(HeadSettings(steps=300, lr=3e-3))


def test_fit_head__same_seed_same_head_and_global_generator_untouched() -> None:
    tokens, labels, _ = squares(8)
    settings = HeadSettings(width=8, steps=4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (fit_head(tokens, labels, classes=2, settings=settings, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())]
    assert all(same) and not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    with pytest.raises(RequestError, match="multiple of the token grid"):
        fit_head(tokens, labels[:, :15], classes=2, settings=settings, seed=0)


class TinyVideo(nn.Module):
    """Means of tubelets of 2 x 8 x 8, zero where less than half is valid."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward_features(self, x: Tensor, valid: Tensor | None = None) -> EncoderOutput:
        assert valid is not None and valid.shape == (len(x), *x.shape[2:])
        means = nn.functional.avg_pool3d(x, (2, 8, 8)) * self.scale
        seen = nn.functional.avg_pool3d(valid[:, None].float(), (2, 8, 8)) >= 0.5
        cells = torch.cat([means, means**2], dim=1) * seen
        tokens = flatten_tokens(cells)
        return EncoderOutput(tokens=tokens, grid=tuple(means.shape[2:]), pooled=tokens.sum(1))


def test_embed_clips__gives_what_the_encoder_gives() -> None:
    rng = torch.Generator().manual_seed(0)
    video = torch.rand(5, 1, 4, 16, 24, generator=rng) + 1
    sector = torch.ones(5, 1, 16, 24, dtype=torch.bool)
    sector[:, :, :, :8] = False
    valid = torch.ones(5, 4, dtype=torch.bool)
    valid[3, 2:] = False
    batch = ClipBatch(video, valid, sector, torch.zeros(5, 4))
    parts = [
        (ClipBatch(video[a:b], valid[a:b], sector[a:b], torch.zeros(b - a, 4)), list(range(a, b))) for a, b in ((0, 2), (2, 5))
    ]
    found: ClipFeatures = embed_clips(TinyVideo(), parts, tokens=True)
    assert found.ids == [0, 1, 2, 3, 4] and found.tokens is not None
    assert found.tokens.shape == (5, 2, 2, 3, 2) and found.steps.shape == (5, 2, 2) and found.pooled.shape == (5, 2)
    block = video[1, 0, 2:4, 8:16, 16:24].mean()
    assert found.tokens[1, 1, 1, 2, 0] == pytest.approx(float(block)) and found.tokens[1, 1, 1, 2, 1] == pytest.approx(
        float(block**2)
    )
    assert not found.token_valid[:, :, :, 0].any() and not found.token_valid[3, 1].any() and found.token_valid[1, :, :, 1:].all()
    assert np.isnan(found.steps[3, 1]).all() and np.isfinite(found.steps[:3]).all()
    np.testing.assert_allclose(found.steps[1, 0], found.tokens[1, 0, :, 1:].mean(axis=(0, 1)), rtol=1e-5)
    assert torch.equal(batch.pixels[3, 2], torch.zeros(16, 24, dtype=torch.bool))
    with pytest.raises(RequestError, match="no clips"):
        embed_clips(TinyVideo(), [])


def test_embed__frames_one_by_one_for_an_encoder_of_single_frames() -> None:
    """Against a loop; frames that are filled in count for nothing."""
    torch.manual_seed(0)
    encoder = VideoViT(image_size=(1, 16, 24), tubelet=1, patch_size=8, hidden_size=24, num_layers=1, num_heads=2)
    sector = torch.ones(2, 1, 16, 24, dtype=torch.bool)
    sector[:, :, :, :8] = False
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1, 3:] = False
    clips = ClipBatch(torch.randn(2, 1, 4, 16, 24), valid, sector, torch.zeros(2, 4))
    found = embed_clips(encoder, [(clips, ["a", "b"])], tokens=True)
    pooled, _ = embed(encoder, [(clips, ["a", "b"])])
    assert found.tokens is not None and found.tokens.shape == (2, 4, 2, 3, 24)
    for b, frames in ((0, 4), (1, 3)):
        alone = [encoder.forward_features(clips.video[b : b + 1, :, t : t + 1], valid=sector[b : b + 1]) for t in range(frames)]
        mean = torch.stack([one.pooled[0] for one in alone]).mean(dim=0).detach()
        np.testing.assert_allclose(pooled[b], mean, atol=1e-5)
        np.testing.assert_allclose(found.pooled[b], mean, atol=1e-5)
        for t, one in enumerate(alone):
            np.testing.assert_allclose(found.tokens[b, t].reshape(6, 24), one.tokens[0].detach(), atol=1e-5)
    assert not found.tokens[1, 3].any() and not found.token_valid[1, 3].any() and not found.token_valid[:, :, :, 0].any()


def test_real_echo_loop__is_read_masked_and_embedded(shared_data: Path) -> None:
    """Ten frames, 76 ms apart, colour Doppler in the middle: its tokens are never computed, and four frames are filled in."""
    path = shared_data / "dicom_multiframe" / "us_echo_10frames_palette_rle.dcm"
    sample = Ultrasound().read([path], series_id="0" * 32)
    assert sample.valid is not None and sample.meta.frame_times_ms is not None
    picked = pick_frames(sample.meta.frame_times_ms, 1000 / 76, 14)
    assert picked.valid.sum() == 10 and picked.frames.tolist() == [*range(10), 8, 7, 6, 5]
    order = picked.frames[None]
    item = ClipFrames(
        sample.image, sample.valid, None, order, picked.valid[None], picked.time_s[None], order, np.ones(1), sample.meta.stats,
        DrawKey(0, 0, 0), 0,
    )  # fmt: skip
    data, valid, spacing = ClipViews(size=64, frames=14, fps=1000 / 76).batch([item], "cpu")
    views = Views(data, ViewsMeta("a", "ultrasound", torch.zeros(1), spacing, {}, valid, (item.key,)))
    found = embed_clips(TinyVideo(), [(ClipBatch.of(views), ["echo"])], tokens=True)
    assert found.token_valid[0, :5].any() and not found.token_valid[0, 5:].any()
    assert 0.05 < found.token_valid[0, 0].mean() < 0.6 and np.isfinite(found.pooled).all()
    inside = data["clip"][0, 0, :, 0][:, data["clip_sector"][0, 0, 0]]
    assert abs(float(inside.mean())) < 0.5 and 0.5 < float(inside.std()) < 2


def test_motion__by_plain_loops() -> None:
    rng = torch.Generator().manual_seed(2)
    tokens, valid = torch.rand(3, 4, 2, 2, 5, generator=rng), torch.rand(3, 4, 2, 2, generator=rng) < 0.7
    valid[0, :, 0] = True
    valid[1, 2] = False  # a step without a token
    valid[2] = False  # a clip without any
    found = motion_of(tokens, valid)
    for b in range(2):
        steps = [
            torch.stack([x for x, ok in zip(tokens[b, t].flatten(0, 1), valid[b, t].flatten()) if ok]).mean(0)
            for t in range(4)
            if valid[b, t].any()
        ]
        places = [tokens[b, :, i, j].std(dim=0, correction=0) for i in range(2) for j in range(2) if valid[b, :, i, j].all()]
        moved = torch.stack(places).mean(0) if places else torch.zeros(5)
        wanted = torch.cat([torch.stack(steps).mean(0), torch.stack(steps).std(dim=0, correction=0), moved])
        torch.testing.assert_close(found[b], wanted)
    assert torch.equal(found[2], torch.zeros(15))
    still = motion_of(tokens[:1, :1].expand(-1, 4, -1, -1, -1), valid[:1, :1].expand(-1, 4, -1, -1))
    assert (still[:, 5:] < 1e-6).all()


def test_motion__is_read_off_the_encoder() -> None:
    clips = ClipBatch(
        torch.rand(2, 1, 4, 16, 24) + 1,
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(2, 1, 16, 24, dtype=torch.bool),
        torch.zeros(2, 4),
    )
    found, ids = embed(TinyVideo(), [(clips, ["a", "b"])], motion)
    whole = embed_clips(TinyVideo(), [(clips, ["a", "b"])], tokens=True)
    assert ids == ["a", "b"] and whole.tokens is not None
    np.testing.assert_allclose(found, motion_of(torch.from_numpy(whole.tokens), torch.from_numpy(whole.token_valid)), rtol=1e-6)


def test_step_means__by_a_plain_loop() -> None:
    rng = torch.Generator().manual_seed(1)
    tokens, valid = torch.rand(2, 3, 2, 2, 4, generator=rng), torch.rand(2, 3, 2, 2, generator=rng) < 0.6
    valid[0, 0] = False
    found = step_means(tokens, valid)
    for b in range(2):
        for t in range(3):
            chosen = [tokens[b, t, i, j] for i in range(2) for j in range(2) if valid[b, t, i, j]]
            if chosen:
                torch.testing.assert_close(found[b, t], torch.stack(chosen).mean(0))
            else:
                assert torch.isnan(found[b, t]).all()


def test_pixel_tokens__are_the_pixels_of_each_place_and_zero_where_not_valid() -> None:
    video = torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    valid = torch.ones(2, 4, 8, 8, dtype=torch.bool)
    valid[0, 2:] = False
    valid[1, :, :, 4:] = False
    batch = ClipBatch(video, torch.tensor([[True, True, False, False], [True] * 4]), valid[:, :1].clone(), torch.zeros(2, 4))
    found = embed_clips(PixelTokens((2, 4, 4)), [(batch, ["a", "b"])], tokens=True)
    assert found.tokens is not None and found.tokens.shape == (2, 2, 2, 2, 32) and found.pooled.shape == (2, 512)
    np.testing.assert_allclose(found.tokens[0, 0, 1, 0], video[0, 0, :2, 4:, :4].flatten())
    assert not found.token_valid[0, 1].any() and found.token_valid[0, 0].all() and not found.token_valid[1, :, :, 1].any()
    np.testing.assert_allclose(found.pooled[1].reshape(8, 8, 8)[0], video[1, 0, 0])
