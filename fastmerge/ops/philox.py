"""Counter-based random numbers: the same draw for an element on every backend, in every chunk, on every worker.

Definition (docs/numerics.md). Element ``i`` (its flat index in the whole tensor) of stream ``s`` (the model's place in
the recipe) owns a 32-bit draw made of two 16-bit digits::

    key     = XXH64(UTF-8 of the parameter's name, seed mod 2^64); k0 = its low, k1 = its high 32 bits
    words_d = Philox-4x32-10(counter = (i // 8 mod 2^32, i // 8 div 2^32, s, d), key = (k0, k1))
    digit_d = 16 bits of words_d[(i mod 8) // 2]: the low half when i is even, the high half when it is odd
    draw    = digit_0 · 2^16 + digit_1

and is kept with probability p when ``draw < floor(p · 2^32)``. One Philox call with d = 0 serves eight elements and
settles all but one in 65536 of them; only where digit_0 equals the limit's high half does d = 1 matter.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_key(seed: int, name: str) -> tuple[int, int]:
    """(k0, k1): the Philox key of a parameter."""
    digest = xxhash.xxh64_intdigest(name.encode(), seed=seed % 2**64)
    return digest & _MASK, digest >> 32


def draw_limit(probability: float) -> int:
    """floor(p · 2^32): an element is kept when its draw is below; 2^32 keeps all."""
    return int(probability * 4294967296.0)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64; its bits are those of the unsigned one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def draws(
    count: int, *, key: tuple[int, int], stream: int, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The draws of elements [offset, offset + count): int64 [count] in [0, 2^32)."""
    first = offset // 8
    calls = torch.arange(first, (offset + count + 7) // 8, dtype=torch.int64, device=device)
    result = torch.zeros(calls.numel() * 8, dtype=torch.int64, device=device)
    for digit in (0, 1):
        counter = (calls & _MASK, calls >> 32, torch.full_like(calls, stream), torch.full_like(calls, digit))
        words = torch.stack(philox(counter, key), dim=1)
        digits = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)
        result = (result << 16) | digits
    return result[offset - first * 8 :][:count]
