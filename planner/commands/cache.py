"""`bitplan cache`: what the cache holds, and its pruning. May import: everything."""

import json
import re
import shutil
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bitplan.formats.errors import BitplanError, UsageError
from bitplan.formats.sizes import format_bytes
from bitplan.planner.commands.common import emit, seconds_in
from bitplan.planner.report.tables import table
from bitplan.sensitivity.store import cache_folder
from bitplan.sensitivity.weight_cache import MARKER

SHARED = ("text", "fingerprints")
"""Folders of all models together."""


@dataclass(frozen=True)
class Entry:
    """A file or folder that is deleted as one. `model` is None for what models share."""

    path: Path
    model: str | None
    kind: str
    bytes: int
    used: float
    """Seconds since 1970."""


def run(arguments: Namespace) -> None:
    if arguments.all and (arguments.older_than or arguments.model):
        raise UsageError("--all deletes everything: leave out --older-than and --model")
    before = time.time() - seconds_in("--older-than", arguments.older_than) if arguments.older_than else None
    found = list(entries(cache_folder()))
    pruning = bool(arguments.all or arguments.older_than or arguments.model)
    if pruning:
        found = [entry for entry in found if _is_meant(entry, arguments.model, before)]
        if arguments.model and not found and before is None:
            raise UsageError(f"the cache holds nothing of {arguments.model!r}: `bitplan cache` lists its models")
        for entry in found:
            _delete(entry.path)
        _sweep(cache_folder(), everything=arguments.all)
    rows = _rows(found)
    size = sum(entry.bytes for entry in found)
    data = {"folder": str(cache_folder()), "deleted": pruning, "bytes": size, "rows": rows}
    head = ("model", "kind", "entries", "bytes", "last use")
    lines = [(r["model"] or "–", r["kind"], str(r["entries"]), f"{r['bytes']:,}", r["last_use"]) for r in rows]
    total = f"{'deleted from ' if pruning else ''}{cache_folder()}: {format_bytes(size)}"
    emit(arguments, data, "\n\n".join([table(head, lines, left=2), total]) if rows else total)


def entries(folder: Path) -> Iterator[Entry]:
    """What lies in a cache. Only names that bitplan gives are looked at, whatever else the folder holds."""
    for kind in SHARED:
        for path in sorted((folder / kind).glob("*")):
            yield _entry(path, None, kind)
    for workspace in sorted(folder.glob("*")) if folder.is_dir() else []:
        if not _is_workspace(workspace):
            continue
        try:
            model = str(json.loads((workspace / MARKER).read_text(encoding="utf-8"))["model"])
        except (OSError, ValueError, KeyError, TypeError):
            model = "unknown"
        for path in sorted(workspace.iterdir()):
            if path.name == "plans":
                yield from (_entry(plan, model, "plans") for plan in sorted(path.iterdir()) if plan.is_dir())
            elif path.suffix != ".lock" and path.name not in (MARKER, "locks"):
                yield _entry(path, model, path.name.partition("-")[0])


def _is_workspace(path: Path) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{24}", path.name)) and path.is_dir()


def _entry(path: Path, model: str | None, kind: str) -> Entry:
    size, used = 0, 0.0
    for file in [path, *path.rglob("*")]:
        try:
            stat = file.stat()
        except FileNotFoundError:  # another process is at work
            continue
        if not file.is_dir():
            size, used = size + stat.st_size, max(used, stat.st_mtime)
    return Entry(path, model, kind, size, used)


def _is_meant(entry: Entry, model: str | None, before: float | None) -> bool:
    if model and (entry.model is None or model.rstrip("/") not in (entry.model.rstrip("/"), Path(entry.model).name)):
        return False
    return before is None or entry.used < before


def _delete(path: Path) -> None:
    """A folder is renamed first, so that another process finds it whole or not at all."""
    gone = path.with_name(f"{path.name}.deleted")
    try:
        path.rename(gone)
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BitplanError(f"cannot delete {path}: {error.strerror}") from None


def _sweep(folder: Path, everything: bool) -> None:
    """Delete workspaces in which nothing is left but locks and the model's name."""
    left = set() if everything else {entry.path for entry in entries(folder)}
    for workspace in list(folder.glob("*")) if folder.is_dir() else []:
        if _is_workspace(workspace) and not any(workspace in path.parents for path in left):
            _delete(workspace)


def _rows(found: list[Entry]) -> list[dict]:
    groups: dict[tuple[str | None, str], list[Entry]] = defaultdict(list)
    for entry in found:
        groups[entry.model, entry.kind].append(entry)
    return [
        {
            "model": model,
            "kind": kind,
            "entries": len(group),
            "bytes": sum(entry.bytes for entry in group),
            "last_use": datetime.fromtimestamp(max(entry.used for entry in group), UTC).strftime("%Y-%m-%d %H:%M"),
        }
        for (model, kind), group in sorted(groups.items(), key=lambda item: (item[0][0] or "", item[0][1]))
    ]
