"""Paths as text: bytes that are not UTF-8 (old file servers have them) must survive JSON and Parquet."""

from __future__ import annotations

_BASE = 0xF700
"""Start of the private-use characters that stand for single undecodable bytes."""


def to_text(path: str) -> str:
    """Return a path as valid Unicode; `to_path` undoes it."""
    if path.isascii() or not any("\udc80" <= char <= "\udcff" for char in path):
        return path
    return "".join(chr(_BASE + ord(char) - 0xDC00) if "\udc80" <= char <= "\udcff" else char for char in path)


def to_path(text: str) -> str:
    """Return the path as the operating system wants it."""
    if text.isascii():
        return text
    return "".join(chr(0xDC00 + ord(char) - _BASE) if _BASE + 0x80 <= ord(char) <= _BASE + 0xFF else char for char in text)
