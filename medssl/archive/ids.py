"""Pseudonymous ids: keyed hashes that cannot be undone without the owner's key."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from medssl.errors import RequestError

KEY_BYTES = 32
PLACEHOLDERS = frozenset(
    [
        "NA", "N/A", "NONE", "NULL", "NIL", "NOID", "NOTSET", "NOT_SET", "UNKNOWN", "UNSPECIFIED", "ANON",
        "ANONYMOUS", "ANONYMIZED", "ANONYMISED", "ANONYM", "DEID", "DEIDENTIFIED", "REMOVED", "DELETED",
        "EMPTY", "DEV", "TEST", "TESTING", "DEMO", "DUMMY", "PHANTOM", "QA", "QC", "PATIENT", "PATIENTID", "ID",
        "DEFAULT", "NOBODY", "SUBJECT",
    ]
)  # fmt: skip
"""PatientIDs that many people share; compared without case, spaces and punctuation at the ends."""


class IdKey:
    """The owner's key and the ids made with it.

    Args:
        secret: At least 16 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:
            raise RequestError(f"id key of {len(secret)} bytes; 16 or more are needed: make one with `openssl rand -hex 32`")
        self._keyed = hmac.new(secret, digestmod=hashlib.sha256)  # copied for each id: the key is hashed once

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the key without giving it away."""
        return self.make("fingerprint", "", "")[:16]

    def make(self, field: str, issuer: str, value: str) -> str:
        """Return 32 hex digits: HMAC-SHA256 over field, issuer and normalised value, cut to 128 bits."""
        message = "\x1f".join((field, normalise(issuer), normalise(value)))
        digest = self._keyed.copy()
        digest.update(message.encode())
        return digest.hexdigest()[:32]


def normalise(value: str) -> str:
    """Return the text without padding (spaces, nulls) and with runs of white space reduced to one space."""
    return " ".join(value.replace("\0", " ").split())


def file_id(key: IdKey, path: str, digest: str) -> str:
    """Return the id of a file with this content at this place."""
    return key.make("file", "", f"{digest} {path}")


def source_tag(key: IdKey, fold: int) -> str:
    """Return what stands for the content of files in their order, from `source_fold`: another value means that they may have changed."""
    return key.make("source", "", f"{fold:016x}")


def source_fold(files: Iterable[tuple[str, int]]) -> int:
    """Return 64 bits of files in order: the exclusive or of hashes of place, digest and time of change (`changed.SOURCE_FOLD` in SQL).

    The time counts because digests of large files do not cover all of them.

    Args:
        files: Digest and time of change in nanoseconds of each.
    """
    fold = 0
    for place, (digest, mtime_ns) in enumerate(files):
        text = f"{place} {digest} {mtime_ns}".encode()
        fold ^= int(hashlib.md5(text, usedforsecurity=False).hexdigest()[:16], 16)
    return fold


def is_placeholder(patient_id: str) -> bool:
    """Return whether a PatientID names nobody in particular: empty, one repeated character, or a known stand-in."""
    text = normalise(patient_id).strip(" .-_*#?").upper()
    return len(set(text)) <= 1 or text in PLACEHOLDERS


def load_key(path: Path) -> IdKey:
    """Read the owner's key file.

    Raises:
        RequestError: It is absent, unreadable, too short, or open to other users.
    """
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes().strip()
    except OSError as err:
        raise RequestError(
            f"id key {path}: {err.strerror}; give the path of an existing key, or leave the option out to have one made"
        ) from err
    if stat.S_IMODE(mode) & 0o077:
        raise RequestError(f"id key {path}: mode {stat.S_IMODE(mode):04o}; only the owner may read it: run `chmod 600` on it")
    return IdKey(secret)


def make_key(path: Path) -> IdKey:
    """Write a new random key, mode 0600, and return it; an existing file is never replaced."""
    secret = secrets.token_hex(KEY_BYTES).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(secret + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    return IdKey(secret)
