"""Exports in environments of other libraries. `prepare` of each script runs where medssl is; what follows runs where it is not."""

from __future__ import annotations

import json
from pathlib import Path

FACTS = "made_by.json"


def leave_facts(folder: Path) -> None:
    """Write into `folder` which commit and versions made the exports, and on which machine, for the record of the other side."""
    from medssl.training.run_folder import facts_of_machine

    found = facts_of_machine()
    (folder / FACTS).write_text(json.dumps({key: found[key] for key in ("hardware", "versions", "git")}))
