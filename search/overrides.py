"""What a person decides about single units, against the search: keep, set, at least.

A group takes one format, so that an override of one of its units holds for all of them.
May import: formats, search.knapsack, sensitivity.profile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from bitplan.formats.errors import UsageError
from bitplan.formats.table import DTYPES, format_named
from bitplan.search.knapsack import Option, Options
from bitplan.sensitivity.profile import Profile, UnitEntry


@dataclass(frozen=True)
class Override:
    """`keep`: as the checkpoint has it; `set`: in this format; `at-least`: in no fewer bytes than in this format."""

    option: Literal["keep", "set", "at-least"]
    glob: str
    format: str | None = None

    def __str__(self) -> str:
        return f"--{self.option} '{self.glob}{f'={self.format}' if self.format else ''}'"

    def matches(self, unit: UnitEntry) -> bool:
        """By the exact name, or by that of another module that holds the same weight."""
        return any(fnmatchcase(name, self.glob) for name in (unit.name, *unit.tied))

    def allows(self, option: Option, units: Sequence[UnitEntry]) -> bool:
        """Whether a group of `units` may take an option."""
        if self.option == "keep":
            return all(option.scheme.format == DTYPES.get(unit.dtype) for unit in units)
        assert self.format is not None
        if self.option == "set":
            return option.scheme.format == self.format
        return option.nbytes >= sum(unit.nbytes(self.format) for unit in units)


def parse_overrides(keep: Sequence[str], set: Sequence[str], at_least: Sequence[str]) -> tuple[Override, ...]:
    """From the words of the command. Raises UsageError, UnknownFormat."""
    made = [Override("keep", glob) for glob in keep]
    for option, words in (("set", set), ("at-least", at_least)):
        for word in words:
            glob, equals, format = word.rpartition("=")
            if not equals or not glob or not format:
                raise UsageError(f"--{option} {word!r}: write GLOB=FORMAT, as --{option} '*.down_proj=int8'")
            made.append(Override(option, glob, format_named(format).name))  # type: ignore[arg-type]
    return tuple(made)


def matched(profile: Profile, override: Override) -> tuple[str, ...]:
    """The units that an override names. Raises UsageError where there is none; tensors that are unquantized anyway may
    be kept."""
    units = tuple(unit.name for unit in profile.units if override.matches(unit))
    unquantized = [entry.name for entry in profile.unquantized]
    kept = override.option == "keep" and any(
        fnmatchcase(name, override.glob) for full in unquantized for name in (full, full.removesuffix(".weight"))
    )
    if not units and not kept:
        first = ", ".join(unit.name for unit in profile.units[:3])
        raise UsageError(f"{override} matches no unit; the first names are {first}")
    return units


def overridden(
    profile: Profile, offered: Options, every: Options, groups: Mapping[str, list[str]], overrides: Sequence[Override]
) -> dict[str, Sequence[Option]]:
    """The `offered` options of each group, cut down by the overrides on any of its units; a format that only an
    override names comes from `every`, which has all rows of the profile. Raises UsageError where nothing is left."""
    entries = {unit.name: unit for unit in profile.units}
    on = {override: set(matched(profile, override)) for override in overrides}
    made = dict(offered)
    for group, names in groups.items():
        binding = [override for override in on if on[override].intersection(names)]
        if not binding:
            continue
        named = {override.format for override in binding}
        more = [option for option in every[group] if option.scheme.format in named and option not in offered[group]]
        units = [entries[name] for name in names]
        made[group] = [o for o in (*offered[group], *more) if all(each.allows(o, units) for each in binding)]
        if not made[group]:
            has = ", ".join(option.scheme.format for option in every[group])
            raise UsageError(
                f"{' and '.join(map(str, binding))} leave no format for {', '.join(names)}; the profile has {has} there"
            )
    return made


def followers(profile: Profile, override: Override) -> list[str]:
    """Units that an override binds only because one of their group is named."""
    named = set(matched(profile, override))
    groups = {unit.group for unit in profile.units if unit.name in named}
    return [unit.name for unit in profile.units if unit.group in groups and unit.name not in named]
