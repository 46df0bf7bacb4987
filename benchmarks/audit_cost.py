"""What an audit of a large Llama costs, by arithmetic: nothing is run. `python -m benchmarks.audit_cost`.

Per token and decoder block of P weights, the pass forward takes 2P operations; the pass back runs the block again (2P)
and takes the gradient of its inputs (2P); second moments take 2 * columns² for each distinct input. The head is run
once and back. Weights are read twice, a block at a time; hidden states of each block are written and read once, in
float32. Of several ranks, each sends a moment and its gradients' squares once (all-reduce: twice that, over the links).
May import: nothing.
"""

TOKENS = 32768
RATE = 20e12
"""Float32 operations per second that a GPU is assumed to reach (an H100's peak is 67e12 without TF32)."""
SHAPES = {
    "8B": (4096, 14336, 32, 8, 32, 128256),
    "70B": (8192, 28672, 80, 8, 64, 128256),
    "405B": (16384, 53248, 126, 8, 128, 128256),
}
"""Llama 3's hidden size, intermediate size, layers, heads of keys, heads and vocabulary."""


def cost(hidden: int, intermediate: int, layers: int, kv_heads: int, heads: int, vocabulary: int) -> dict[str, float]:
    keys = hidden * kv_heads // heads
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * intermediate
    moments = 3 * hidden**2 + intermediate**2  # inputs of q/k/v, o, gate/up, down
    head = hidden * vocabulary
    operations = TOKENS * (layers * (6 * block + 2 * moments) + 6 * head + 2 * hidden**2)
    weights = 2 * (layers * block + 2 * head)
    kept = 4 * (layers * (2 * (4 * hidden + 2 * hidden + intermediate) + 2 * keys + 2 * intermediate) + 4 * vocabulary)
    return {
        "10^15 operations": operations / 1e15,
        "GPU hours": operations / RATE / 3600,
        "GB of weights read": 2 * weights / 1e9,
        "GB of hidden states": 4 * TOKENS * hidden * layers / 1e9,
        "GB at work": 4 * (block + moments) / 1e9,
        "GB sent by each of many ranks": 2 * 4 * (layers * moments + hidden**2) / 1e9,
        "MB kept": kept / 1e6,
    }


def main() -> None:
    found = {name: cost(*shape) for name, shape in SHAPES.items()}
    print("| |" + "".join(f" {name} |" for name in found))
    print("|---|" + "---:|" * len(found))
    for row in found["8B"]:
        print(f"| {row} |" + "".join(f" {figures[row]:,.3g} |" for figures in found.values()))


if __name__ == "__main__":
    main()
