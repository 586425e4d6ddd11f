"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same bits on every back end.

    words = philox4x32_10(counter=(position low, position high, 0, 0), key=(seed low, seed high))
    uniform i = (word i >> 8) * 2**-24          in [0, 1), exact in float32

Integer arithmetic only, so a sequence's draws depend on its (seed, position) and on nothing else.
csrc/philox.h is the same function in C++ and CUDA; Triton has it as tl.philox.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32_10(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four int64 tensors with the 32-bit output words; counter and key words are int64 tensors in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its 64 bits are right; the mask drops the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def uniforms(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent float32 uniforms in [0, 1) for each (seed, position), both int64."""
    zero_B = torch.zeros_like(positions_B)
    counter = [positions_B & _LOW, (positions_B >> 32) & _LOW, zero_B, zero_B]
    words = philox4x32_10(counter, [seeds_B & _LOW, (seeds_B >> 32) & _LOW])
    return (words[0] >> 8).float() * 2.0**-24, (words[1] >> 8).float() * 2.0**-24
