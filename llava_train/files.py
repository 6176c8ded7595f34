"""Folders that are complete or ignored: a manifest of sizes and checksums, written last."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "COMPLETE"


def write_manifest(folder: Path, **facts: Any) -> None:
    """Declares a folder complete: every file in it with its size and checksum, and `facts`.

    Call it on one rank, after all ranks have finished writing.
    """
    files = {
        str(path.relative_to(folder)): {"n_bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in _files(folder)
    }
    write_durably(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` was told, or None when the folder was never completed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def damage(folder: Path) -> str | None:
    """Why a folder must not be used, or None when every file is as its manifest says."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST} manifest"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["n_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['n_bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


def write_durably(path: Path, text: str) -> None:
    """Writes a file so that it is whole or absent, whenever the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
