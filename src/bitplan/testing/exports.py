"""Conformance tests for a target of `bitplan export`. May import: formats, sensitivity, planner."""

import json
from collections.abc import Callable, Sequence

import pytest

from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.planner.assemble import Finish, assemble
from bitplan.planner.export import TARGETS, Exported, export, export_text, write_export
from bitplan.planner.export.target import Target
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.sensitivity.profile import ModelFacts, Provenance, TextFacts, TextPart, UnitEntry, UnquantizedEntry
from bitplan.sensitivity.source import Source

SHAPES = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 256), "self_attn.v_proj": (256, 256)}
SHAPES |= {"self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256)}
SHAPES |= {"mlp.down_proj": (256, 512)}
FUSED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def llama_plan(formats: Sequence[str], layers: int = 2) -> Plan:
    """A plan for a Llama that does not exist, in bfloat16: its groups take the formats in turn, "native" leaves a group
    in bfloat16, embedding and norms stay unquantized."""
    entries = []
    for layer in range(layers):
        for part, (rows, columns) in SHAPES.items():
            name = f"model.layers.{layer}.{part}"
            head, _, last = name.rpartition(".")
            entries.append(
                UnitEntry(
                    name=name,
                    kind="linear",
                    parameter=f"{name}.weight",
                    experts=1,
                    rows=rows,
                    columns=columns,
                    dtype="bfloat16",
                    group=f"{head}.{FUSED.get(last, last)}",
                )
            )
    groups = list(dict.fromkeys(entry.group for entry in entries))
    shapes = {"model.embed_tokens.weight": (512, 256), "model.norm.weight": (256,)}
    unquantized = [
        UnquantizedEntry(name=name, shape=shape, dtype="bfloat16", bytes=bytes, reason="for the test")
        for (name, shape), bytes in zip(shapes.items(), (512 * 256 * 2, 256 * 2), strict=True)
    ]
    text = TextPart(sha256="0" * 64, blocks=1, length=2)
    facts = ModelFacts(
        id="llama", revision=None, config_sha256="0" * 64, weights_sha256="0" * 64, dtype="bfloat16", parameters=1 << 20
    )
    texts = TextFacts(source="none", tokens=2, calibration=text, search=text, heldout=text)
    provenance = Provenance(model=facts, text=texts, seed=0, device="cpu", versions={"bitplan": "0"})

    def format_of(entry: UnitEntry) -> str:
        name = formats[groups.index(entry.group) % len(formats)]
        return DTYPES[entry.dtype] if name == "native" else name

    return assemble(entries, unquantized, provenance, format_of, Finish("nearest"), "a test's plan", "search")


class ExportTests:
    """What `bitplan export` takes for granted of a `Target`. Give the fixtures `target`, `formats` and `read`; a target
    that looks at the plan's model also needs `source` and `make_plan`."""

    @pytest.fixture
    def target(self) -> type[Target]:
        raise NotImplementedError("override the fixture `target` with the class to test")

    @pytest.fixture
    def formats(self) -> Sequence[str]:
        """At least two formats that the target supports for a Linear; "native" is the checkpoint's own type."""
        raise NotImplementedError("override the fixture `formats` with names of supported formats")

    @pytest.fixture
    def read(self) -> Callable[[str, str], object]:
        """read(text, unit) → what the written file says of a unit, in the form of `expected`."""
        raise NotImplementedError("override the fixture `read` with a reader of the written file")

    @pytest.fixture
    def expected(self) -> Callable[[PlannedUnit], object]:
        """expected(unit) → what `read` should find: by default its bits per code, None where it stays in floats."""
        return lambda unit: None if unit.is_native else FORMATS[unit.format].bits

    @pytest.fixture
    def unsupported(self) -> str:
        """A format that the target does not have."""
        return "binary-g64"

    @pytest.fixture
    def source(self) -> Source | None:
        return None

    @pytest.fixture
    def make_plan(self) -> Callable[[Sequence[str]], Plan]:
        """make_plan(formats) → a plan whose groups take the formats in turn."""
        return llama_plan

    @pytest.fixture
    def run(self, target, source, monkeypatch) -> Callable[..., Exported]:
        """run(plan, nearest=False) → the plan exported to the target."""
        monkeypatch.setitem(TARGETS, target.name, target)
        return lambda plan, **options: export(plan, target.name, source=source, **options)

    def test_every_unit_is_read_back(self, run, make_plan, formats, read, expected):
        plan = make_plan(formats)
        exported = run(plan)
        assert exported.plan == plan and exported.planned_bytes == plan.bytes
        assert len({unit.format for unit in plan.units}) == len(formats)
        for unit, line in zip(plan.units, exported.lines, strict=True):
            assert read(exported.text, unit.name) == expected(unit), unit.name
            assert (line.unit, line.planned, line.planned_bytes) == (unit.name, unit.format, unit.bytes)
            assert line.format == line.planned and line.word and line.bytes > 0
        json.dumps(exported.as_dict(), allow_nan=False)
        shown = export_text(exported)
        assert f"{exported.bytes:,}" in shown and plan.units[0].name.replace(".0.", ".*.") in shown

    def test_an_unsupported_format_is_refused_by_name_and_nearest_changes_it(
        self, run, make_plan, formats, unsupported, read, expected
    ):
        plan = make_plan((*formats[:2], unsupported))
        odd = [unit.name for unit in plan.units if unit.format == unsupported]
        message = f"{odd[0]}.*in {unsupported}.*--(formats|keep) .*--nearest"
        with pytest.raises(FormatUnavailable, match=message) as caught:
            run(plan)
        assert "\n" not in str(caught.value)
        exported = run(plan, nearest=True)
        changed = {line.unit: line for line in exported.lines if line.planned != line.format}
        assert set(changed) == set(odd) <= {line.unit for line in exported.changes}
        assert all(line.nats is None for line in changed.values())
        for unit in exported.plan.units:
            assert read(exported.text, unit.name) == expected(unit), unit.name
        bytes = sum(unit.bytes for unit in exported.plan.units) + sum(entry.bytes for entry in plan.unquantized)
        assert exported.plan.bytes == bytes
        assert exported.plan.measured is exported.plan.uniform is exported.plan.predicted is None
        assert [unit for unit in exported.plan.units if unit.name not in changed] == [
            unit for unit in plan.units if unit.name not in changed
        ]
        assert f"{unsupported} → " in export_text(exported)

    def test_a_file_is_written_whole(self, run, target, make_plan, formats, tmp_path):
        if target.holds_codes:
            pytest.skip("a folder with the model's weights")
        exported = run(make_plan(formats))
        write_export(exported, tmp_path / "exported")
        assert (tmp_path / "exported").read_text(encoding="utf-8") == exported.text
        assert [path.name for path in tmp_path.iterdir()] == ["exported"]
