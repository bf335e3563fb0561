"""Seeds and permutations that are computed, not stored: pure functions of their keys."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_ROUNDS = 4


def _scramble(x: NDArray[np.uint64], key: np.uint64, mask: np.uint64) -> NDArray[np.uint64]:
    """The function of a Feistel round: multiplications by the odd `key`, of which the well-mixed upper bits count.

    Multiply-shift hashing (Dietzfelbinger et al. 1997). A round needs nothing better, since rounds are
    repeated; and every step computes it.
    """
    out = x + (key >> np.uint64(7))
    out *= key
    out ^= out >> np.uint64(29)
    out *= key
    out >>= np.uint64(32)
    out &= mask
    return out


def stream_seed(seed: int, *path: int) -> int:
    """A 63-bit seed for the random stream that `path` names, for example (step, slot).

    >>> stream_seed(0, 1, 0) == stream_seed(0, 1, 0), stream_seed(0, 1, 0) == stream_seed(0, 0, 1)
    (True, False)
    """
    mask = (1 << 64) - 1
    x = seed & mask
    for part in path:
        x = (x + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 1


def permute(positions: Indices, n: int, key: int) -> Indices:
    """The images of `positions` under a keyed bijection on 0 … n-1.

    A Feistel network (Luby and Rackoff 1988) permutes the smallest power of two that is at least n. An
    image outside 0 … n-1 is permuted again until it falls inside (cycle walking, Black and Rogaway 2002),
    fewer than twice on average.

    >>> sorted(permute(np.arange(10), 10, key=7).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if n <= 2:
        return (positions ^ (key & 1)) % n if n == 2 else np.zeros_like(positions)
    bits = (n - 1).bit_length()
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(2 * stream_seed(key, r) + 1) for r in range(2 * _ROUNDS)]

    def once(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> low, x & low_mask
        for r in range(_ROUNDS):
            left ^= _scramble(right, keys[2 * r], high_mask)
            right ^= _scramble(left, keys[2 * r + 1], low_mask)
        return (left << low) | right

    # For much of the domain, all of it is computed in one call and then looked up: a NumPy call has a fixed cost.
    whole = once(np.arange(1 << bits, dtype=np.uint64)) if 2 * len(positions) >= n else None
    x = once(positions.astype(np.uint64)) if whole is None else whole[positions]
    while (outside := np.flatnonzero(x >= np.uint64(n))).size:
        x[outside] = once(x[outside]) if whole is None else whole[x[outside]]
    return x.astype(np.int64)
