"""How much a LoRA layer has to compute and to move, whoever implements it."""


def lora_flops(m: int, k: int, n: int, rank: int, *, backward: bool) -> int:
    """Floating-point operations: x·Wᵀ, S and S·Bᵀ; backward dX, dS, dB, dA and dS·A.

    Example:
        >>> lora_flops(8, 4, 4, 1, backward=False)
        384
    """
    frozen, low_rank = k * n, (k + n) * rank
    return 2 * m * (frozen + low_rank + (frozen + 2 * low_rank if backward else 0))


def lora_least_bytes(
    m: int, k: int, n: int, rank: int, *, itemsize: int, dropout: bool, backward: bool
) -> int:
    """Memory traffic where either pass moves each tensor once, A, B and their gradients in fp32.

    Example:
        >>> lora_least_bytes(8192, 4096, 4096, 16, itemsize=2, dropout=True, backward=True) // 2**20
        394
    """
    weights = itemsize * k * n + 4 * rank * (k + n)
    # S, and the mask with one bit an element
    kept = itemsize * m * rank + (m * k // 8 if dropout else 0)
    moved = itemsize * m * (k + n) + weights + kept
    if backward:
        # dY and x in, dX out
        moved += itemsize * m * (n + 2 * k) + weights + kept + 4 * rank * (k + n)
    return moved
