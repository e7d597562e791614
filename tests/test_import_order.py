"""Imports run one way: the road of DESIGN section 1."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "medssl"
OPEN = {"errors", "types", "registry", "seeding", "weights", "yaml_models", "feature_statistics", "locks", "_compat", ""}
MAY_IMPORT = {
    "archive": set(),
    "cards": {"archive"},
    "domains": {"archive"},
    "store": {"archive", "domains"},
    "sampling": {"archive", "domains", "store"},
    "views": set(),
    "layers": set(),
    "encoders": {"layers"},
    "networks": {"layers", "encoders"},
    "objectives": {"layers"},
    "training": set(),
    "evaluation": {"layers", "encoders", "networks", "domains", "store", "views"},
    "matching": {"layers", "encoders", "store", "views"},
    "export": {"layers", "encoders", "networks", "evaluation"},
    "importing": {"layers", "encoders", "export"},
    "report": set(),
    "phantoms": set(),
}
ARCHIVE_MAY_IMPORT = {
    "headers": set(),
    "rows": {"headers"},
    "scanning": {"headers", "rows"},
    "pixels": {"scanning"},
    "operations": {"headers", "pixels"},
}
TOP = {
    "recipe",
    "build",
    "recipe_checks",
    "data_sources",
    "label_tables",
    "correspondence",
    "target_tasks",
    "finetune_cells",
    "box_pictures",
    "box_volumes",
    "membership",
    "bag_tasks",
    "box_tasks",
    "clip_tasks",
    "suite",
    "suite_tiers",
    "leakage",
    "probe_tasks",
    "pretraining",
    "api",
    "cli",
    "demo",
    "doctor",
    "testing",
    "__main__",
}


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "medssl":
                found |= {f"medssl.{alias.name}" for alias in node.names}
    return {name for name in found if name == "medssl" or name.startswith("medssl.")}


def test_imports__run_one_way() -> None:
    wrong = []
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    for path in files:
        relative = path.relative_to(ROOT)
        package = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        if package in TOP or package == "__init__":
            continue
        allowed = OPEN | {package} | MAY_IMPORT.get(package, set())
        wrong += [
            f"{relative}: {module}"
            for module in imports_of(path)
            if package_of(module) not in allowed and package_of(module) != "__version__"
        ]
    assert wrong == []


def test_imports_within_archive__run_one_way() -> None:
    folders = {path.name for path in (ROOT / "archive").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ARCHIVE_MAY_IMPORT)
    wrong = []
    for folder, others in ARCHIVE_MAY_IMPORT.items():
        for path in (ROOT / "archive" / folder).rglob("*.py"):
            used = {module.split(".")[2] for module in imports_of(path) if module.startswith("medssl.archive.")}
            wrong += [f"{folder}/{path.name}: {name}" for name in (used & folders) - others - {folder}]
            wrong += [f"{folder}/{path.name}: {name}" for name in used & {"index", "grouping"}]
    assert wrong == []


def test_every_package__is_named_in_the_table() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert packages - {"_compat", "cli", "suite_tiers"} == set(MAY_IMPORT)


def test_import_medssl__loads_nothing_heavy() -> None:
    heavy = ("torch", "monai", "timm", "pydicom", "nibabel", "SimpleITK", "duckdb", "matplotlib")
    code = f"import sys, medssl, medssl.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_medssl__takes_under_0_3_s() -> None:
    code = "import time; t = time.perf_counter(); import medssl; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)
    ]
    assert min(times) < 0.3


def test_only_cli__prints() -> None:
    prints = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "cli" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []
