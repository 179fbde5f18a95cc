"""Which samples a step reads: pure functions of (seed, epoch, step, rank, world), no state.

Randomness is a counter-based hash instead of a generator, so that any draw can be had alone, in any order, on
any rank and with any release of NumPy: resuming takes a position and nothing else, and any world size fits.
"""

import functools

import numpy as np

ORDER_STREAM = 0  # augment.py numbers its own streams from 1

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, epoch: int, ids: np.ndarray, stream: int) -> np.ndarray:
    """One draw per id, keyed by (seed, epoch, id, stream): float64 in [0, 1), shape of `ids`.

    splitmix64 (Steele, Lea and Flood, 2014): the key picks a start, the id counts on from it.
    """
    return (_bits(seed, epoch, ids, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(size), int64, read-only, of seed and global epoch."""
    permutation = np.argsort(_bits(seed, epoch, np.arange(size), ORDER_STREAM), kind="stable")
    permutation.flags.writeable = False
    return permutation


def steps_per_epoch(size: int, batch: int) -> int:
    """Global batches in one epoch; the last, short one is included."""
    return -(-size // batch)


def global_batch(seed: int, epoch: int, step: int, size: int, batch: int, shuffle: bool = True) -> np.ndarray:
    """Sample ids of step `step` within the epoch, int64, `batch` of them or fewer in the last step."""
    stop = min(size, (step + 1) * batch)
    return order(seed, epoch, size)[step * batch : stop] if shuffle else np.arange(step * batch, stop)


def share(n: int, rank: int, world: int) -> np.ndarray:
    """Positions in a global batch of n samples that belong to a rank: rank, rank + world, ...; or none."""
    return np.arange(rank, n, world)


def _bits(seed: int, epoch: int, ids: np.ndarray, stream: int) -> np.ndarray:
    key = 0
    for part in (seed, epoch, stream):
        key = _mix_int(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    counter = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    return _mix(np.uint64(key) + counter * np.uint64(_GOLDEN))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    """`_mix` on Python integers: a scalar of NumPy would warn of the overflow that is meant here."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
