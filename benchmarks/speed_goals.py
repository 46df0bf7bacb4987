"""What was promised of speed, beside what was measured. May import: nothing of bitplan."""

from typing import Any

GPU = {"8-bit": ("int8", 1.6), "4-bit": ("int4-g64", 2.2), "3-bit": ("int3-g64", 2.6)}
"""Times bf16, decoding at batch 1."""
SHARE = 0.75
"""Of the copy bandwidth, by the kernel on 4096×14336."""
REFERENCE = " dequantized"

Results = dict[str, dict[str, Any]]


def goals(found: Results, products: Results, device: str) -> list[tuple[str, ...]]:
    """Head and rows: a goal, what was measured, whether it is met."""
    rows = [("goal", "measured", "met")]
    speeds = {name: result for name, result in found.items() if "decode" in result}
    if device == "cpu":
        for name in ("int8", "int4-g64"):
            rows.append(_ratio(f"{name} decodes no slower than fp32", speeds, name, "fp32", 1.0))
    for kind, (name, least) in GPU.items():
        goal = f"on a GPU, {kind} decodes at ≥ {least} × bf16"
        rows.append((goal, "not run", "") if device == "cpu" else _ratio(goal, speeds, name, "bf16", least))
    goal = f"on a GPU, the kernel reads at ≥ {SHARE:.0%} of the copy bandwidth (4096×14336, batch 1)"
    if device == "cpu":
        rows.append((goal, "not run", ""))
    for key, result in products.items():
        cell = result.get("batches", {}).get("1", {})
        if device != "cpu" and result.get("kernel") in ("triton", "scaled_mm") and key.endswith(" 4096×14336"):
            share = result["bytes"] / cell["seconds"] / result["copy"]
            rows.append((f"{goal}: {key.split()[0]}", f"{share:.0%}", _met(share >= SHARE)))
    for name in speeds:
        if (own := name.removesuffix(REFERENCE)) != name and own in speeds:
            times = {batch: _times(speeds, own, name, batch) for batch in [*speeds[own]["decode"], "prefill"]}
            told = ", ".join(f"{batch}: {ratio:.2f} ×" for batch, ratio in times.items())
            goal = f"{own} never slower than dequantized, at each batch and in prefill"
            rows.append((goal, told, _met(min(times.values()) >= 1)))
    lost = [
        f"{key} at batch {batch}"
        for key, result in products.items()
        for batch, cell in result.get("batches", {}).items()
        if cell.get("seconds", 0) > cell.get("dequantized", float("inf"))
    ]
    if products:
        rows.append(("no kernel slower than dequantized, one weight", ", ".join(lost) or "none", _met(not lost)))
    return rows


def _ratio(goal: str, speeds: Results, name: str, base: str, least: float) -> tuple[str, ...]:
    if name not in speeds or base not in speeds:
        return goal, "not run", ""
    times = _times(speeds, name, base, "1")
    return goal, f"{times:.2f} ×", _met(times >= least)


def _times(speeds: Results, name: str, base: str, batch: str) -> float:
    """How many times as fast."""
    fast, slow = ((speeds[n]["prefill"] if batch == "prefill" else speeds[n]["decode"][batch]) for n in (name, base))
    return float(slow["seconds"] / fast["seconds"])


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"
