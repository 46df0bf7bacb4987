#!/usr/bin/env bash
# make-auto-gptq.sh: the virtual environment .venv-auto-gptq of the real auto-gptq 0.7.1, its last release. That needs a
# torch and a transformers of its own time (it imports no_init_weights, and its wheel is built for torch 2.2), on Python
# 3.8 to 3.11. torch of that time comes from the registry with CUDA's libraries only: some 5 GB on disk.
# Does nothing when the environment is already complete. PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")"

pins="torch==2.2.2 transformers==4.40.2 accelerate==0.29.3 peft==0.10.0 numpy==1.26.4 datasets==2.19.2 pyarrow==16.1.0
pandas==2.2.3 auto-gptq==0.7.1"
venv=.venv-auto-gptq
marker=$venv/.done
# A marker with other contents belongs to an older list: the environment is made again.
[[ -f $marker && $(<"$marker") == "$pins" ]] && exit 0

rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
# The wheel, never the source package: that one builds kernels and wants a CUDA compiler.
# shellcheck disable=SC2086
"$venv/bin/pip" install -q --only-binary auto-gptq $pins
"$venv/bin/python" -c "import auto_gptq, torch, transformers; \
print('auto-gptq', auto_gptq.__version__, 'torch', torch.__version__, 'transformers', transformers.__version__)"
echo "$pins" > "$marker"
