"""The loop in one process: resume, stages, guards, callbacks. Killing and distributing are in test_processes.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medssl.encoders.image2d import Image2D
from medssl.encoders.slice_volume import SliceVolumeEncoder
from medssl.errors import CheckpointError, RequestError, StoreError, TrainingStopped
from medssl.training import checkpoint
from medssl.training.distributed import drops_at_random
from medssl.training.loop import Callback
from medssl.training.optim import OptimSettings
from medssl.training.prefetch import pick_source
from medssl.training.settings import LoopSettings, Stage
from medssl.weights import load_part
from tests.training.toy import ToySource, run, stage


def metrics(out: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights" / "last" / "encoder.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("step", [7, 2])
def test_interrupted_run__resumes_to_the_same_bits(tmp_path: Path, step: int) -> None:
    """Also before the first checkpoint: the lines of the steps that are done again go."""

    class Stops(ToySource):
        def fetch(self, keys: list[Any]) -> list[Any]:
            if keys[0].step == step:
                raise StoreError("the disk went away")
            return super().fetch(keys)

    assert run(tmp_path / "a", 10) == "finished"
    with pytest.raises(StoreError):
        run(tmp_path / "b", 10, sources={"toy": Stops()})
    assert run(tmp_path / "b", 10, resume=True) == "finished"
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_micro_steps__give_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    run(tmp_path / "whole", 6)
    run(tmp_path / "split", 6, micro_batch=1)
    assert metrics(tmp_path / "split") == pytest.approx(metrics(tmp_path / "whole"), rel=1e-4)


def test_loss__falls(tmp_path: Path) -> None:
    run(tmp_path / "a", 60, checkpoint_every=100, kind="cnn")
    losses = metrics(tmp_path / "a")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_stages__freeze_and_carry_moments(tmp_path: Path) -> None:
    optim = OptimSettings(lr=1e-3)
    stages = [Stage("decoder", 3, optim, train=("embed*", "decoder*", "head*", "norm*", "mask_token")), Stage("all", 3, optim)]
    snapshots: dict[int, dict[str, torch.Tensor]] = {}

    def look(step: int, parts: Any) -> dict[str, float]:
        snapshots[step] = {k: v.clone() for k, v in parts["encoder"].state_dict().items()}
        return {}

    run(tmp_path / "a", 6, stages=stages, callbacks=[Callback(1, look)])
    assert same(snapshots[1], snapshots[3])
    assert not same(snapshots[3], snapshots[6])
    run(tmp_path / "b", 6, stages=stages, checkpoint_every=1)
    # resume inside the second stage
    for folder in checkpoint.step_folders(tmp_path / "b" / "checkpoints")[1:]:
        assert json.loads((folder / "meta.json").read_text())["stage_name"] == "all"
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_resume__in_the_second_stage_gives_the_same_bits(tmp_path: Path) -> None:
    optim = OptimSettings(lr=1e-3)
    stages = [Stage("first", 3, optim, train=("embed*", "decoder*", "head*", "norm*", "mask_token")), Stage("second", 5, optim)]

    class Stops(ToySource):
        def fetch(self, keys: list[Any]) -> list[Any]:
            if keys[0].step == 6:
                raise StoreError("the disk went away")
            return super().fetch(keys)

    run(tmp_path / "a", 8, stages=stages, checkpoint_every=1)
    with pytest.raises(StoreError):
        run(tmp_path / "b", 8, stages=stages, checkpoint_every=1, sources={"toy": Stops()})
    run(tmp_path / "b", 8, stages=stages, checkpoint_every=1, resume=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(("dropout", "before"), [(0.1, 1), (0.1, 2), (0.0, 2)])
def test_resume_on_other_processes__is_said_where_there_is_dropout(
    dropout: float, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.training import toy

    original = toy.make_objective

    def dropping(kind: str = "vit", seed: int = 0) -> Any:
        objective, encoder = original(kind, seed)
        for module in objective.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return objective, encoder

    monkeypatch.setattr(toy, "make_objective", dropping)
    run(tmp_path / "a", 4)
    (meta,) = (tmp_path / "a" / "checkpoints").glob("step_*/meta.json")
    facts = json.loads(meta.read_text())
    assert facts["world_size"] == 1
    meta.write_text(json.dumps({**facts, "world_size": before}))
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "a", 6, resume=True) == "finished"
    said = json.loads((tmp_path / "a" / "run.json").read_text()).get("notes", [])
    assert [record.message for record in caplog.records if record.name == "medssl.training.loop"] == said
    assert len(said) == (dropout > 0 and before == 2)
    assert all(note.startswith("step 4: resumed on 1 process(es) after 2; dropout and drop path") for note in said)


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout2d(0.1)), True),
        (torch.nn.Dropout(0.0), False),
        (torch.nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (torch.nn.TransformerEncoderLayer(4, 2, dropout=0.0), False),
        (Image2D(model="test_resnet", model_args={"drop_path_rate": 0.1}), True),
        (Image2D(model="test_resnet"), False),
        (SliceVolumeEncoder(slice_encoder={"model": "test_resnet"}, dim=16), True),
        (SliceVolumeEncoder(slice_encoder={"model": "test_resnet"}, dim=16, aggregator={"dropout": 0.0}), False),
    ],
)
def test_drops_at_random__finds_dropout_and_drop_path(module: torch.nn.Module, drops: bool) -> None:
    assert drops_at_random(module) == drops


def test_lr_scale_zero__freezes_while_gradients_flow(tmp_path: Path) -> None:
    stages = [Stage("main", 3, OptimSettings(lr=1e-2, weight_decay=0.1, lr_scales={"encoder.*": 0.0}))]
    first: dict[str, Any] = {}

    def look(step: int, parts: Any) -> dict[str, float]:
        first.setdefault("state", {k: v.clone() for k, v in parts["encoder"].state_dict().items()})
        return {}

    run(tmp_path / "a", 3, stages=stages, callbacks=[Callback(1, look)])
    ours = {k.removeprefix("net."): v for k, v in first["state"].items()}
    assert same({k: ours[k] for k in weights(tmp_path / "a")}, weights(tmp_path / "a"))


def test_parameter_without_gradient__stops_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training import toy

    original = toy.make_objective

    def with_orphan(kind: str = "vit", seed: int = 0) -> Any:
        objective, encoder = original(kind, seed)
        objective.orphan = torch.nn.Linear(2, 2)
        return objective, encoder

    monkeypatch.setattr(toy, "make_objective", with_orphan)
    with pytest.raises(TrainingStopped, match=r"2 trainable parameter\(s\) got no gradient from any source, first orphan.bias"):
        run(tmp_path / "a", 3)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "failed"


def test_nan__stops_the_run_and_says_what_to_try(tmp_path: Path) -> None:
    class Broken(ToySource):
        def fetch(self, keys: list[Any]) -> list[Any]:
            rows = super().fetch(keys)
            if keys[0].step == 5:
                rows[0][0][:] = float("nan")
            return rows

    with pytest.raises(TrainingStopped, match=r"Try a lower optim\.lr"):
        run(tmp_path / "a", 10, sources={"toy": Broken()})
    steps = [path.name for path in checkpoint.step_folders(tmp_path / "a" / "checkpoints")]
    assert steps == ["step_000000004"]


def test_callback__may_stop_the_run_after_saving(tmp_path: Path) -> None:
    def collapse(step: int, parts: Any) -> dict[str, float]:
        if step == 3:
            raise TrainingStopped("features have collapsed")
        return {"monitor/x": 1.0}

    with pytest.raises(TrainingStopped, match="collapsed"):
        run(tmp_path / "a", 10, callbacks=[Callback(1, collapse)])
    assert checkpoint.step_folders(tmp_path / "a" / "checkpoints")[-1].name == "step_000000003"
    assert metrics(tmp_path / "a", "monitor/x") == [1.0, 1.0]


def test_callback__does_not_change_training(tmp_path: Path) -> None:
    def greedy(step: int, parts: Any) -> dict[str, float]:
        torch.rand(7)
        parts["encoder"].train()
        return {"probe/x": float(step)}

    run(tmp_path / "a", 6)
    run(tmp_path / "b", 6, callbacks=[Callback(2, greedy)])
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_resume__refuses_another_items_table(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    meta = tmp_path / "a" / "checkpoints" / "step_000000004" / "meta.json"
    meta.write_text(meta.read_text().replace('"toy"', '"other"'))
    with pytest.raises(CheckpointError, match="another items table"):
        run(tmp_path / "a", 8, resume=True)


def test_resume__refuses_another_seed(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    with pytest.raises(CheckpointError, match=r"made with train\.seed=0, now 1"):
        run(tmp_path / "a", 8, resume=True, seed=1)


def test_checkpoint_cut_short__says_what_to_delete(tmp_path: Path) -> None:
    run(tmp_path / "a", 8)
    newest = checkpoint.step_folders(tmp_path / "a" / "checkpoints")[-1]
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"step_000000008 cannot be read .* delete that folder and resume again"):
        run(tmp_path / "a", 12, resume=True)
    import shutil

    shutil.rmtree(newest)
    assert run(tmp_path / "a", 12, resume=True) == "finished"


def test_checkpoints__keep_the_newest(tmp_path: Path) -> None:
    run(tmp_path / "a", 12, checkpoint_every=2, keep_checkpoints=3)
    names = [path.name for path in checkpoint.step_folders(tmp_path / "a" / "checkpoints")]
    assert names == ["step_000000008", "step_000000010", "step_000000012"]


def test_disk_full_while_saving__keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint._write

    def full(aside: Path, *args: Any) -> None:
        if "8" in aside.name:
            aside.mkdir()
            (aside / "half").write_bytes(b"x")
            raise OSError(28, "No space left on device")
        original(aside, *args)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(StoreError, match="checkpoint at step 8 not saved: the disk is full"):
        run(tmp_path / "a", 12)
    left = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert left == ["step_000000004"]
    monkeypatch.setattr(checkpoint, "_write", original)
    assert run(tmp_path / "a", 12, resume=True) == "finished"


def test_two_sources__share_steps_by_weight_and_rank_free() -> None:
    sources = {"a": ToySource("a", 3.0), "b": ToySource("b", 1.0)}
    picks = [pick_source(sources, 0, step).name for step in range(2000)]
    assert picks == [pick_source(sources, 0, step).name for step in range(2000)]
    assert 0.70 < picks.count("a") / 2000 < 0.80


def test_two_sources__train_in_one_run(tmp_path: Path) -> None:
    sources = {"a": ToySource("a"), "b": ToySource("b")}
    assert run(tmp_path / "a", 6, sources=sources) == "finished"


def test_batch__must_be_shared_out_evenly() -> None:
    with pytest.raises(RequestError, match="choose a batch that is a multiple of 6"):
        LoopSettings(batch=4, micro_batch=3).micro_steps(2)
    assert LoopSettings(batch=8, micro_batch=2).micro_steps(2) == (2, 2)
    assert LoopSettings(batch=8).micro_steps(4) == (1, 2)


def test_ema_after_step_and_epoch_hooks__are_called(tmp_path: Path) -> None:
    import copy

    from medssl.objectives.mae import MAE
    from tests.training import toy

    calls: list[Any] = []

    class WithTeacher(MAE):
        def ema_pairs(self) -> list[Any]:
            return [(self.encoder, self.teacher, "momentum")]

        def schedules(self, step: int, total: int) -> dict[str, float]:
            return {"momentum": 0.5}

        def after_step(self, ctx: Any) -> None:
            calls.append(("after", ctx.step, ctx.schedules["momentum"]))

        def on_epoch(self, ctx: Any, embed: Any) -> None:
            ids, features = embed("toy")
            calls.append(("epoch", ctx.epoch, len(ids), features.shape[0]))

    def make(kind: str = "vit", seed: int = 0) -> Any:
        objective, encoder = original(kind, seed)
        objective.__class__ = WithTeacher
        objective.teacher = copy.deepcopy(encoder).requires_grad_(False)
        return objective, encoder

    original = toy.make_objective
    objective, encoder = make()
    before = [p.clone() for p in objective.teacher.parameters()]
    from medssl.training import distributed
    from medssl.training.loop import train
    from medssl.training.run_folder import RunFolder

    folder = RunFolder(tmp_path / "a")
    folder.create("kind: toy\n", {})
    train(
        objective,
        {"toy": ToySource(items=8)},
        stages=[stage(4)],
        settings=LoopSettings(batch=4, checkpoint_every=4, log_every=1),
        run=folder,
        world=distributed.start(),
        encoders=[encoder],
        embedder=lambda parts, name: (torch.arange(8), torch.zeros(8, 3)),
    )
    assert [call for call in calls if call[0] == "epoch"] == [("epoch", 0, 8, 8), ("epoch", 1, 8, 8)]
    assert [call[1] for call in calls if call[0] == "after"] == [0, 1, 2, 3]
    moved = [not torch.equal(a, b) for a, b in zip(before, objective.teacher.parameters())]
    assert any(moved)


def test_epoch_hook__runs_without_an_embedder_until_it_asks_for_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training import toy

    original = toy.make_objective
    epochs: list[int] = []
    asks = False

    def make(kind: str = "vit", seed: int = 0) -> Any:
        objective, encoder = original(kind, seed)

        def on_epoch(ctx: Any, embed: Any) -> None:
            epochs.append(ctx.step)
            if asks:
                embed("toy")

        objective.on_epoch = on_epoch
        return objective, encoder

    monkeypatch.setattr(toy, "make_objective", make)
    run(tmp_path / "a", 5, sources={"toy": ToySource(items=10)})
    assert epochs == [0, 3]  # batches of 4: items 10 to 19 begin within step 2, so step 3 is the first of the second epoch
    asks = True
    with pytest.raises(RequestError, match=r"features of source toy.*give `train` an embedder"):
        run(tmp_path / "b", 5, sources={"toy": ToySource(items=10)})


def test_best_weights__are_those_of_the_highest_probe_and_say_what_chose_them(tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.5, 6: float("nan"), 8: 0.3}
    snapshots: dict[int, dict[str, torch.Tensor]] = {}

    def probe(step: int, parts: Any) -> dict[str, float]:
        snapshots[step] = {k.removeprefix("net."): v.clone() for k, v in parts["encoder"].state_dict().items()}
        return {"probe/x/linear_r2": scores[step]}

    callbacks = [Callback(2, probe, best_by="probe/x/linear_r2", labels=7)]
    run(tmp_path / "a", 8, callbacks=callbacks, checkpoint_every=3)
    state, manifest = load_part(tmp_path / "a", tag="best")
    assert manifest["step"] == 4 and manifest["chosen_by"] == {"metric": "probe/x/linear_r2", "value": 0.5, "labels": 7}
    assert same(state, {key: snapshots[4][key] for key in state})
    assert "chosen_by" not in load_part(tmp_path / "a")[1]
    scores.update({10: 0.2, 12: 0.4})  # a resumed run still knows
    run(tmp_path / "b", 8, callbacks=callbacks, checkpoint_every=4)
    run(tmp_path / "b", 12, callbacks=callbacks, checkpoint_every=4, resume=True)
    assert load_part(tmp_path / "b", tag="best")[1]["step"] == 4
