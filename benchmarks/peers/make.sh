#!/usr/bin/env bash
# make.sh NAME: the virtual environment .venv-NAME of a peer, from NAME.txt.
# Does nothing when that is already complete. PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")"

name=${1:?usage: make.sh NAME, of a NAME.txt beside it}
[[ -f $name.txt ]] || { echo "no such peer: $name (there is no $name.txt)" >&2; exit 2; }
venv=.venv-$name
marker=$venv/.done
# A marker with other contents than NAME.txt belongs to an older list: the environment is made again.
cmp -s "$name.txt" "$marker" && exit 0

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
# torch comes first, at the version of NAME.txt: gptqmodel's build imports it, and nothing may exchange it later.
torch=$(grep -E '^torch==' "$name.txt")
"$venv/bin/pip" install -q "$torch" numpy setuptools wheel
"$venv/bin/pip" install -q --no-build-isolation -c "$name.txt" -r "$name.txt"
# The registry builds torchvision for CUDA: beside a torch for the CPU it cannot be imported, which transformers tries
# wherever it is there. Texts need none of these.
[[ $name != vllm ]] || "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$venv/bin/python" -c "import torch, transformers; print('$name: torch', torch.__version__, 'transformers', transformers.__version__)"
cp "$name.txt" "$marker"
