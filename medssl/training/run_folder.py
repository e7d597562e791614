"""The run folder: the only place a run writes to, and what it leaves for report, evaluation and export.

recipe.yaml run.json items.parquet metrics.jsonl lock checkpoints/ weights/{last,best}/ figures/ tensorboard/ report.html
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from medssl.errors import RequestError
from medssl.locks import hold_lock
from medssl.weights import disk_error, write_atomic


class RunFolder:
    """Paths and atomic writes of one run. Mode 0700: a run folder is pseudonymised personal data.

    Args:
        path: Created by `create`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of resumable state."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Folder of safetensors."""
        return self.path / "weights"

    @property
    def figures(self) -> Path:
        """Folder of `.npz` files that the report draws."""
        return self.path / "figures"

    @property
    def items(self) -> Path:
        """The frozen items table."""
        return self.path / "items.parquet"

    def exists(self) -> bool:
        """True when a run was started here."""
        return (self.path / "run.json").is_file()

    def create(self, recipe_yaml: str, facts: Mapping[str, Any]) -> None:
        """Make the folder and write recipe and run.json.

        Raises:
            RequestError: A run is already there, or the folder holds something else.
            StoreError: The folder cannot be written.
        """
        if self.exists():
            raise RequestError(f"{self.path} already holds a run; continue it with --resume, or give another folder with out=PATH")
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(self.path, 0o700)  # one that was there
            for folder in (self.checkpoints, self.weights, self.figures):
                folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as err:
            raise disk_error(err, self.path) from err
        write_atomic(self.path / "recipe.yaml", recipe_yaml.encode())
        self.update(status="created", started=now(), **facts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here.

        Raises:
            RequestError: One does.
        """
        busy = f"another process is training in {self.path}; wait until it has finished, or give another folder with out=PATH"
        with hold_lock(self.path / "lock", busy):
            yield

    def read(self) -> dict[str, Any]:
        """Return run.json."""
        path = self.path / "run.json"
        if not path.is_file():
            raise RequestError(f"{self.path} holds no run (no run.json); give the folder that `medssl pretrain` printed")
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def update(self, **facts: Any) -> None:
        """Merge facts into run.json."""
        content = self.read() if self.exists() else {}
        content.update(facts)
        write_atomic(self.path / "run.json", json.dumps(content, indent=2, default=str).encode())

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; NaN and infinity become null, which JSON can hold."""
        clean = {key: (value if math.isfinite(value) else None) for key, value in metrics.items()}
        try:
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(clean) + "\n")
        except OSError as err:
            raise disk_error(err, self.path / "metrics.jsonl") from err

    def truncate_metrics(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again, and a line cut short by a kill."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


def now() -> str:
    """UTC time in ISO format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def facts_of_machine() -> dict[str, Any]:
    """Versions, git commit and hardware, for run.json and manifests; no host name and no user name."""
    import torch

    import medssl

    return {
        "versions": {
            "medssl": medssl.__version__,
            "torch": torch.__version__,
            "monai": _version("monai"),
            "numpy": _version("numpy"),
            "python": platform.python_version(),
        },
        "git": _git(),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _git() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
