"""Runs in a process of its own: commands of medssl one after the other, with faults and kills where the test asks for them.

    python -m tests.privacy.child JOB.json

JOB.json is a list of {argv, fault, kill, set}; the exit status of each is appended as a line to JOB.json.status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

MARK = "\x1e"
HEAVY = {
    "index": ("duckdb", "numpy", "medssl.archive.index"),
    "pretrain": ("medssl.api", "monai.networks.nets", "medssl.objectives.mae_cnn"),
}


def raising(text: str) -> Any:
    def fault(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(text)

    return fault


def run(step: dict[str, Any]) -> int:
    """Run one command with attributes replaced, in this process."""
    from medssl.cli.main import main

    kept = []
    for place, value in step.get("set", {}).items():
        module, _, name = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, raising(value["raise"]) if isinstance(value, dict) else value)
    try:
        main(step["argv"])
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
    return 0


def run_and_kill(step: dict[str, Any]) -> int:
    """Run one command in a fork that ends itself at the moment asked for; its status is negative then."""
    import sitecustomize

    for module in HEAVY[step["argv"][0]]:
        importlib.import_module(module)  # once, and not in every fork
    child = os.fork()
    if child == 0:
        sitecustomize.arm(*step["kill"])
        status = run(step)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(path: str) -> None:
    with open(path) as handle:
        steps = json.load(handle)
    for step in steps:
        for stream in (sys.stdout, sys.stderr):  # what comes now belongs to this step
            stream.write(MARK)
            stream.flush()
        status = run_and_kill(step) if "kill" in step else run(step)
        sys.stdout.flush()
        sys.stderr.flush()
        with open(f"{path}.status", "a") as handle:
            handle.write(f"{status}\n")


if __name__ == "__main__":
    main(sys.argv[1])
