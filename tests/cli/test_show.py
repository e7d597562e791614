from __future__ import annotations

import pytest

from medssl.cli import show
from medssl.cli.info import first_sentence


def test_speed__starts_over_with_the_next_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 100.0, 110.0])
    monkeypatch.setattr(show.time, "perf_counter", lambda: next(clock))
    speed = show._Speed()
    assert [speed(1), speed(21)] == [0.0, 2.0]
    assert [speed(1), speed(11)] == [0.0, 1.0]  # not (11 - 1) / 110


def test_lines__say_the_end_once_and_that_of_the_next_cell_too(capsys: pytest.CaptureFixture[str]) -> None:
    update = show._lines("pretrain")
    for done in (2, 2, 1, 2):
        update(done, 2, {"loss": 0.5})
    assert capsys.readouterr().err.splitlines() == ["pretrain: 2/2, loss 0.5"] * 2


def test_first_sentence__is_whole_over_several_lines() -> None:
    text = "# How unlike a clip is: mean distance,\n# scored by the area. The second sentence.\n#\n# medssl index\nkind: evaluate\n"
    assert first_sentence(text) == "How unlike a clip is: mean distance, scored by the area."
    assert first_sentence("# One line without a stop\nkind: pretrain\n") == "One line without a stop"
    assert first_sentence("kind: pretrain\n") == ""
