"""Profiles that were made on this machine, in the cache, so that a plan finds the alternatives it was chosen from.

May import: sensitivity.profile/store/weight_cache.
"""

from contextlib import suppress
from pathlib import Path

from bitplan.formats.errors import FileInvalid
from bitplan.sensitivity.profile import Profile, Provenance, read, write
from bitplan.sensitivity.store import drop_damaged, sha256
from bitplan.sensitivity.weight_cache import workspace_of


def _folder(facts: Provenance) -> Path:
    return workspace_of(facts) / "profiles"


def _name(profile: Profile) -> str:
    """A checksum of what the profile holds."""
    return sha256(profile.model_dump_json())[:24]


def remember(profile: Profile) -> None:
    """Put a profile into the cache, under what it holds."""
    path = _folder(profile.provenance) / f"{_name(profile)}.json"
    if not path.exists():
        write(path, profile)


def remembered(facts: Provenance, formats: dict[str, str]) -> Profile | None:
    """The latest profile of the same weights and calibration text that has a row for each unit in its format (unit →
    format), or None."""
    folder = _folder(facts)
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    for path in reversed(paths):
        with suppress(FileInvalid):
            profile = read(path, Profile)
            if _name(profile) != path.stem:
                drop_damaged(path)
            elif formats.items() <= {(row.unit, row.format) for row in profile.rows}:
                return profile
    return None
