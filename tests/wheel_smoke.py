"""The package as a user gets it: `make wheel-smoke`, which .ci/run calls. Not a pytest file, as it takes minutes.

sdist → wheel → a clean environment → in a folder outside the tree, beside files of the user's own that are called
search.py, formats.py, planner.py and sensitivity.py: a plan, an apply, a reload in plain transformers, and what mypy
and pyright find of the package's types.
"""

import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHADOWS = ("search", "formats", "planner", "sensitivity")

RELOAD = """
import formats, planner, search, sensitivity

import bitplan
import torch
from transformers import AutoModelForCausalLM

assert {module.OWNER for module in (formats, planner, search, sensitivity)} == {"the user"}
saved = AutoModelForCausalLM.from_pretrained("saved")
loaded = bitplan.load("plan.json", device="cpu")
assert bitplan.resident_bytes(saved) == bitplan.resident_bytes(loaded)
ids = torch.arange(2, 34)[None]
with torch.no_grad():
    assert torch.equal(saved(ids).logits, loaded(ids).logits)
print(f"reloaded: {bitplan.resident_bytes(saved):,} bytes")
"""

TYPES = """
from typing import assert_type

import bitplan
from transformers import PreTrainedModel

reveal_type(bitplan.load)
assert_type(bitplan.load("plan.json"), PreTrainedModel)
assert_type(bitplan.PlanConfig("plan.json").plan.bytes, int)
assert_type(bitplan.QuantizationManager("org/model").load("int8"), PreTrainedModel)
"""


def run(*words: str | Path, cwd: Path) -> str:
    """A command's stdout; its seconds are printed. Raises SystemExit where it fails."""
    environment = os.environ | {"BITPLAN_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):  # what pip does not compile, the first import does, once
        environment.pop(name, None)
    start = time.monotonic()
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    print(f"{time.monotonic() - start:6.1f} s  {' '.join(Path(word).name for word in words)[:100]}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, made from the sdist. Raises SystemExit where it lacks a file of the tree."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    [wheel] = folder.glob("*.whl")
    package = ROOT / "src" / "bitplan"
    files = [Path(place, name) for place, _, names in os.walk(package, followlinks=True) for name in names]
    tree = {path.relative_to(package.parent).as_posix() for path in files if path.suffix != ".pyc"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if tree != packed:
        raise SystemExit(f"only in the tree or only in the wheel: {sorted(tree ^ packed)}")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a clean environment with the wheel in it. Raises SystemExit where it has another top level."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for what in ("torch", wheel):  # torch first and alone, as in the Makefile
        run(python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", what, cwd=folder)
    shown = run(python, "-m", "pip", "show", "-f", "bitplan", cwd=folder)
    files = [Path(line.strip()) for line in shown.partition("Files:\n")[2].splitlines()]
    tops = {path.parts[0] for path in files if path.parts[0] != ".." and ".dist-info" not in path.parts[0]}
    if tops != {"bitplan"}:
        raise SystemExit(f"the wheel's top level is {sorted(tops)}")
    return python


def use(python: Path, folder: Path) -> None:
    """A plan, an apply and a reload, with files about that have the names of bitplan's subpackages."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text('OWNER = "the user"\n', encoding="utf-8")
    (folder / "reload.py").write_text(RELOAD, encoding="utf-8")
    where = "from bitplan.planner import demo; print(demo.MODEL, demo.CALIBRATION, sep='\\n')"
    model, text = run(python, "-c", where, cwd=folder).splitlines()
    assert not Path(model).is_relative_to(ROOT)
    bitplan = (python, "-m", "bitplan.planner.cli")  # unlike the script `bitplan`, this looks into the folder first
    menu = (
        "--fraction",
        "0.4",
        "--formats",
        "int8,int4-g64",
        "--rounding",
        "nearest",
        "--tokens",
        "2048",
        "--trials",
        "0",
    )
    run(*bitplan, "plan", model, "--text", text, *menu, "-o", "plan.json", cwd=folder)
    run(python.parent / "bitplan", "apply", "plan.json", "--save", "saved", cwd=folder)
    print(run(python, "reload.py", cwd=folder), end="")


def check_types(python: Path, folder: Path) -> None:
    """mypy and pyright, from the environment that runs this, on a script that imports the installed package."""
    (folder / "typed.py").write_text(TYPES, encoding="utf-8")
    # pyright's own default
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}', encoding="utf-8")
    mypy = run(sys.executable, "-m", "mypy", "--python-executable", python, "typed.py", cwd=folder)
    pyright = run(Path(sys.executable).parent / "basedpyright", "--pythonpath", python, "typed.py", cwd=folder)
    print(mypy, pyright, sep="", end="")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bitplan-wheel-") as place:
        folders = [Path(place, name) for name in ("dist", "environment", "user")]
        for folder in folders:
            folder.mkdir()
        dist, environment, user = folders
        python = install(build(dist), environment)
        use(python, user)
        check_types(python, user)


if __name__ == "__main__":
    main()
