from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from medssl.data_sources import select_rows
from medssl.errors import RequestError


def test_empty_selection__says_which_views_show_what_is_there() -> None:
    rows = [SimpleNamespace(domain="microscopy", kind="image", status="ok", series_id=name) for name in "ab"]
    archive: Any = SimpleNamespace(select=lambda _where: rows)
    source: Any = SimpleNamespace(index="archive", where="true", views={})
    with pytest.raises(
        RequestError, match=r"none of them a usable microscopy volume; 2 are of kind image, which views\.kind: image shows"
    ):
        select_rows(source, "microscopy", archive)
    source.views = {"kind": "image"}
    assert select_rows(source, "microscopy", archive) == rows
