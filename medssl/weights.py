"""Weights on disk: one safetensors file per part and a JSON manifest beside it. Nothing here reads a pickle.

weights/index.json                      {"default": "encoder", "parts": [...]}
weights/last/encoder.safetensors        tensors under the stock network's own keys
weights/last/encoder.json               the manifest, see `REQUIRED`
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.errors import StoreError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
REQUIRED = ("format_version", "part", "encoder", "library", "axis_order", "channels", "weights_hash")


def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """Return a hex digest of names, dtypes, shapes and bytes, independent of the file format and of the order of keys."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(dtype=_byte_type()).numpy().tobytes())
    return digest.hexdigest()


def _byte_type() -> Any:
    import torch

    return torch.uint8


def write_atomic(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file aside, flush it to disk and rename it into place; on failure nothing is left behind.

    Args:
        path: File to write.
        content: Its bytes.
        mode: Rights of the file from its first byte on, less what the user's umask takes away.

    Raises:
        StoreError: The disk is full or the folder cannot be written; what was there before is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        private_folder(path.parent)
        aside.unlink(missing_ok=True)  # of a killed process with this number: it would keep its rights
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as err:
        aside.unlink(missing_ok=True)
        raise disk_error(err, path) from err


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read (0600), atomically, into a folder that only its owner may enter (0700).

    Raises:
        StoreError: As `write_atomic`.
    """
    try:
        private_folder(path.parent)
        path.parent.chmod(0o700)
    except OSError as err:
        raise disk_error(err, path) from err
    write_atomic(path, content, mode=0o600)


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter; a folder that exists keeps its mode."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out` that takes its name when the block ends well; else nothing is left behind.

    Args:
        out: Folder to be; must not exist, or be empty.

    Raises:
        StoreError: The disk is full or the folder cannot be written.
    """
    aside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process with this number
        aside.mkdir()
        yield aside
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except StoreError:
        raise
    except OSError as err:
        raise disk_error(err, out) from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def process_lives(pid: int) -> bool:
    """Tell whether a process of this machine still runs: the one that a temporary file or a lock names."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def disk_error(err: OSError, path: Path) -> StoreError:
    """Turn an OSError met while writing `path` into a sentence that says what to do."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"the disk is full while writing {path.name} in {path.parent}; what was written before is complete and safe; "
            "free some space (or raise the quota) and run the same command again"
        )
    if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(
            f"no permission to write {path.name} in {path.parent}; nothing was written there; "
            "choose another folder or change its permissions"
        )
    return StoreError(f"cannot write {path.name} in {path.parent} ({err.strerror}); nothing was left half-written")


def save_part(
    folder: Path, name: str, state: Mapping[str, Tensor], manifest: Mapping[str, Any], *, part: str | None = None
) -> Path:
    """Write `<name>.safetensors` and `<name>.json` into a folder, each atomically, tensors first.

    Args:
        folder: Created when missing.
        name: Part name, for instance `encoder`.
        state: Tensors under the stock network's keys; shared storages are copied.
        manifest: See `REQUIRED`; `format_version`, `part` and `weights_hash` are filled in here.
        part: What the tensors are, where the file has another name.

    Returns:
        Path of the safetensors file.
    """
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    full = {**manifest, "format_version": FORMAT_VERSION, "part": part or name, "weights_hash": tensors_hash(tensors)}
    text = json.dumps(full, indent=2, sort_keys=True)
    path = Path(folder) / f"{name}.safetensors"
    write_atomic(path, _sorted_header(save(tensors, metadata={"format": "pt", "medssl": json.dumps(full, sort_keys=True)})))
    write_atomic(path.with_suffix(".json"), text.encode())
    return path


def _sorted_header(data: bytes) -> bytes:
    """Return safetensors bytes with the metadata in order of their keys: the library writes them in an order that changes by process."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[end:]


def find_part(path: Path | str, part: str | None = None, tag: str = "last") -> Path:
    """Return the safetensors file that a user's path means.

    Args:
        path: A `.safetensors` file, a run folder, its `weights` folder, or the folder of an export to `hf`.
        part: Part name; None takes the default that `weights/index.json` names.
        tag: `last` or `best`.

    Raises:
        WeightsError: There are no such weights.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is not a safetensors file; medssl opens no pickles (.pt, .pth, .ckpt): "
                "give a .safetensors file or a run folder"
            )
        return path.with_name(f"{part}.safetensors") if part and path.stem != part else path
    for folder in (path / "weights", path):
        index = folder / "index.json"
        if index.is_file():
            name = part or json.loads(index.read_text())["default"]
            found = folder / tag / f"{name}.safetensors"
            if found.is_file():
                return found
            have = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*.safetensors"))
            raise WeightsError(f"{folder} has no {tag}/{name}.safetensors; it has {', '.join(have) or 'no weights'}")
    if part is None and _is_own_hub_folder(path):
        return path / "model.safetensors"
    files = sorted(file.name for file in path.glob("*.safetensors")) if path.is_dir() else []
    raise WeightsError(
        f"no weights at {path}: expected a .safetensors file or a run folder that holds weights/index.json"
        + (
            f"; this folder holds {', '.join(files)}: give one of these"
            if files
            else " (a run writes them when it saves its first checkpoint)"
        )
    )


def _is_own_hub_folder(folder: Path) -> bool:
    """Whether a folder in the Hugging Face layout holds tensors under our names, and not under those of transformers or timm."""
    config = folder / "config.json"
    try:
        return (folder / "model.safetensors").is_file() and json.loads(config.read_text()).get("model_type") == "medssl"
    except (OSError, ValueError, AttributeError):
        return False


def load_part(path: Path | str, part: str | None = None, tag: str = "last") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and manifest; the tensors are checked against the hash in the manifest.

    Args:
        path: See `find_part`.
        part: See `find_part`.
        tag: See `find_part`.

    Raises:
        WeightsError: The file is missing, cut short, has no manifest, or does not match its manifest.
    """
    from safetensors import SafetensorError, safe_open

    file = find_part(path, part, tag)
    try:
        with safe_open(str(file), framework="pt") as stream:
            state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as err:
        raise _unreadable(file, err) from err
    manifest = read_manifest(path, part, tag)
    if tensors_hash(state) != manifest["weights_hash"]:
        raise WeightsError(f"{file} does not match the hash in its manifest: one of the two was changed; copy both again")
    return state, manifest


def read_manifest(path: Path | str, part: str | None = None, tag: str = "last") -> dict[str, Any]:
    """Read the manifest alone; the tensors are not looked at.

    Args:
        path: See `find_part`.
        part: See `find_part`.
        tag: See `find_part`.

    Raises:
        WeightsError: There are no such weights, or their manifest is absent, incomplete or of a newer medssl.
    """
    file = find_part(path, part, tag)
    sidecar = file.with_suffix(".json")
    text = sidecar.read_text() if sidecar.is_file() else _metadata(file).get("medssl", "")
    try:
        manifest: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as err:
        raise WeightsError(
            f"{file} has no readable manifest; expected {sidecar.name} beside it, as every medssl run and export writes; "
            "weights of other projects come in through an import"
        ) from err
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise WeightsError(f"the manifest of {file} lacks {', '.join(missing)}; save the weights again with this medssl")
    if manifest["format_version"] > FORMAT_VERSION:
        raise WeightsError(
            f"{file} has format version {manifest['format_version']}, this medssl reads up to {FORMAT_VERSION}: update medssl"
        )
    return manifest


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as stream:
            return dict(stream.metadata() or {})
    except (SafetensorError, OSError) as err:
        raise _unreadable(file, err) from err


def _unreadable(file: Path, err: Exception) -> WeightsError:
    return WeightsError(
        f"{file} cannot be read ({err}): it is cut short or not safetensors; copy it again, or save it again from its run"
    )


def card_lines(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per data card of a manifest (its `data_cards`), for people."""
    return [f"{card['name']}, version {card['version']}, {card['licence']}, card {card['card_hash']}" for card in cards]


def forced_lines(forced: Mapping[str, Sequence[str]] | Iterable[str] | None) -> list[str]:
    """Return a sentence for tables and pages per difference that was forced, each once.

    Args:
        forced: Differences, or those of each arm.
    """
    return [f"Forced, images differ from those of the pretraining: {difference}." for difference in forced_differences(forced)]


def adapted_lines(adapted: Mapping[str, Sequence[str]] | Iterable[str] | None) -> list[str]:
    """Return a sentence for tables and pages per tensor that was changed for the channels of the images, each once.

    Args:
        adapted: Changes, or those of each arm.
    """
    return [f"Weights adapted to the channels of the images: {change}." for change in forced_differences(adapted)]


def stated_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences of what a result, or what cells share, has `forced` and `adapted`."""
    return [*forced_lines(result.get("forced")), *adapted_lines(result.get("adapted"))]


def forced_differences(forced: Mapping[str, Sequence[str]] | Iterable[str] | None) -> list[str]:
    """Return each forced difference once, whichever arms have it."""
    every = [one for arm in forced.values() for one in arm] if isinstance(forced, Mapping) else forced or ()
    return list(dict.fromkeys(every))
