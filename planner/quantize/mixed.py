"""Mixed precision (Micikevicius et al. 2018) for what is learned by gradients. May import: nothing of ours."""

import torch


def mixed_precision(device: torch.device | str) -> torch.autocast:
    """Within it, matrix products are of bfloat16, summed in float32, where the device computes them faster so: on a GPU
    that has them, and on a CPU with AVX512-BF16 or AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and _cpu_has_bfloat16()
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def _cpu_has_bfloat16() -> bool:
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
