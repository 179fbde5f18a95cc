"""Which samples a step reads: pure functions of (seed, epoch, step, slice, slices), no state.

Randomness is a counter-based hash instead of a generator, so that any draw can be had alone, in any order, on
any rank and with any release of NumPy: resuming takes a position and nothing else, and any world size fits.
"""

import functools
from dataclasses import dataclass

import numpy as np

# augment.py has 1 to 18, and those + 100, + 200, ...
ORDER_STREAM, PARTNER_STREAM, SCALE_STREAM, SHARD_STREAM = 0, 19, 20, 21

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


@functools.lru_cache(maxsize=2)
def shard_order(seed: int, epoch: int, counts: tuple[int, ...], block: int) -> np.ndarray:
    """The order of one epoch of samples in shards of `counts` samples each: as `order`, but block by block.

    The shards are put in a hash order of (seed, epoch, shard) and cut into blocks of `block` shards, the last maybe
    fewer; within a block the samples stand in `order`'s hash order of (seed, epoch, sample).
    """
    place = np.empty(len(counts), np.int64)
    shards = np.argsort(_bits(seed, epoch, np.arange(len(counts)), SHARD_STREAM), kind="stable")
    place[shards] = np.arange(len(counts)) // block
    of_sample = np.repeat(place, counts)
    permutation = np.lexsort((_bits(seed, epoch, np.arange(len(of_sample)), ORDER_STREAM), of_sample))
    permutation.flags.writeable = False
    return permutation


def classes_by_chance(labels: np.ndarray, size: int) -> float:
    """How many classes `size` samples have in the mean, drawn by chance (with replacement) out of these."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float((1 - (1 - shares) ** size).sum())


@functools.lru_cache(maxsize=2)
def partners(seed: int, draw: int, size: int) -> np.ndarray:
    """Whom each sample is mixed with in a draw: a permutation of range(size), int64, read-only.

    It is one cycle through all samples, so that none is its own partner unless it is alone.
    """
    cycle = np.argsort(_bits(seed, draw, np.arange(size), PARTNER_STREAM), kind="stable")
    partner = np.empty(size, np.int64)
    partner[cycle] = np.roll(cycle, -1)
    partner.flags.writeable = False
    return partner


def scale(seed: int, epoch: int, step: int, count: int) -> int:
    """Which of `count` resolutions a step of an epoch is at, each as likely as the others."""
    return int(uniform(seed, epoch, np.array([step]), SCALE_STREAM)[0] * count)


@functools.lru_cache(maxsize=8)
def bounds(size: int, batch: int, least: int = 1) -> np.ndarray:
    """Where the global batches of an epoch begin and end in its order: int64 (steps + 1,), read-only.

    The last batch has what is left; where that is fewer than `least` samples, it joins the batch before it, if
    there is one. BatchNorm needs that: 2 samples in each slice and micro-batch, since one has no variance.
    """
    starts = np.arange(0, size, batch)
    if len(starts) > 1 and size - starts[-1] < least:
        starts = starts[:-1]
    result = np.append(starts, size)
    result.flags.writeable = False
    return result


def steps_per_epoch(size: int, batch: int, least: int = 1) -> int:
    """Global batches in one epoch; the last, short one is included."""
    return len(bounds(size, batch, least)) - 1


def global_batch(
    seed: int, epoch: int, step: int, size: int, batch: int, shuffle: bool = True, least: int = 1
) -> np.ndarray:
    """Sample ids of step `step` within the epoch, int64: `batch` of them, or what `bounds` says of the last step."""
    start, stop = bounds(size, batch, least)[step : step + 2]
    return order(seed, epoch, size)[start:stop] if shuffle else np.arange(start, stop)


@dataclass(frozen=True)
class Share:
    """What a process carries of each global batch: the slices `own` of `parts`.

    Without virtual ranks a process has one slice: Share(world, (rank,)).
    """

    parts: int = 1
    own: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.own or len({*self.own}) < len(self.own) or not {*self.own} <= {*range(self.parts)}:
            raise ValueError(f"{self.own} are no slices out of {self.parts}")


def share(n: int, rank: int, world: int) -> np.ndarray:
    """Positions in a global batch of n samples that belong to a rank: rank, rank + world, ...; or none."""
    return np.arange(rank, n, world)


def slices(n: int, parts: int) -> list[np.ndarray]:
    """The positions of a global batch of n samples by slice: `share` of each virtual rank."""
    return [share(n, part, parts) for part in range(parts)]


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
