"""The sample order: every sample once an epoch, the same global batches for any world, no hidden state."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from irkd_dist.data import sampler

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Vigna's published next(), with Python's integers: the reference for the vectorised one."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_reference_has_the_published_values():
    state, values = 1234567, []
    for _ in range(3):
        values.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("seed", "epoch", "stream"), [(0, 0, 0), (42, 7, 3), (-1, 10**6, 18), (2**63, 1, 904)]
)
def test_uniform_is_splitmix64_counted_by_id(seed, epoch, stream):
    key = 0
    for part in (seed, epoch, stream):
        key = splitmix64(key ^ (part & MASK))
    ids = np.array([0, 1, 2, 49_999, 2**40])
    expected = [(splitmix64((key + int(i) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53 for i in ids]
    assert sampler.uniform(seed, epoch, ids, stream).tolist() == expected


def test_uniform_looks_uniform_and_independent():
    ids = np.arange(100_000)
    draws = [
        sampler.uniform(seed, epoch, ids, stream) for seed in (0, 1) for epoch in (0, 1) for stream in (1, 2)
    ]
    for u in draws:
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi squared, 99 degrees of freedom: p < 1e-4 above
    correlation = np.corrcoef(np.stack([*draws, np.roll(draws[0], 1)])) - np.eye(9)
    assert np.abs(correlation).max() < 0.015


def test_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [sampler.order(seed, epoch, 5000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(5000))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01


def test_order_is_the_same_in_another_process():
    code = "from irkd_dist.data import sampler; print(sampler.order(3, 9, 40).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(sampler.order(3, 9, 40).tolist())


@pytest.mark.parametrize(("size", "batch"), [(1000, 128), (128, 128), (129, 128), (5, 128), (7, 2), (6, 1)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_an_epoch_for_any_world(size, batch, world, shuffle):
    steps = sampler.steps_per_epoch(size, batch)
    seen = []
    for step in range(steps):
        ids = sampler.global_batch(1, 4, step, size, batch, shuffle)
        assert len(ids) == (batch if step < steps - 1 else size - batch * (steps - 1))
        shares = [sampler.share(len(ids), rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares).tolist()) == list(range(len(ids)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        seen += ids.tolist()
    assert sorted(seen) == list(range(size))
    assert seen == (sampler.order(1, 4, size).tolist() if shuffle else list(range(size)))


def test_share_of_a_batch_smaller_than_the_world():
    assert [sampler.share(2, rank, 4).tolist() for rank in range(4)] == [[0], [1], [], []]


@pytest.mark.parametrize(
    ("size", "batch", "least"), [(130, 64, 4), (130, 64, 2), (129, 64, 2), (5, 64, 8), (7, 7, 8)]
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(size, batch, least):
    edges = sampler.bounds(size, batch, least).tolist()
    counts = [b - a for a, b in itertools.pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == size
    assert counts[:-1] == [batch] * (len(counts) - 1)
    assert counts[-1] < batch + least
    assert len(counts) == 1 or counts[-1] >= least
    assert sampler.steps_per_epoch(size, batch, least) == len(counts)
    seen = [sampler.global_batch(1, 4, step, size, batch, least=least) for step in range(len(counts))]
    assert [len(ids) for ids in seen] == counts
    assert np.array_equal(np.concatenate(seen), sampler.order(1, 4, size))


def test_enough_samples_leave_the_last_batch_alone():
    for size in range(1, 40):
        for batch in range(3, 12):
            plain = [*range(0, size, batch), size]
            assert sampler.bounds(size, batch).tolist() == plain
            if size % batch == 0 or size % batch >= 3:
                assert sampler.bounds(size, batch, 3).tolist() == plain


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_slices_of_enough_samples_have_two_each(parts):
    for n in range(2 * parts, 40):
        slices = sampler.slices(n, parts)
        assert min(map(len, slices)) >= 2
        assert sorted(np.concatenate(slices).tolist()) == list(range(n))
        for part, positions in enumerate(slices):
            assert positions.tolist() == [p for p in range(n) if p % parts == part]


def test_a_share_is_of_slices_that_there_are():
    assert sampler.Share(4, (2, 0)).own == (2, 0)
    for own in ((), (0, 0), (4,), (-1,)):
        with pytest.raises(ValueError, match="no slices out of 4"):
            sampler.Share(4, own)


@pytest.mark.parametrize("size", [2, 3, 150, 1001])
def test_partners_are_one_cycle_of_a_draw(size):
    partner = sampler.partners(3, 1, size)
    at, visited = 0, set()
    for _ in range(size):
        visited.add(at)
        at = int(partner[at])
    assert at == 0
    assert visited == {*range(size)}
    if size > 100:
        for other in (sampler.partners(3, 2, size), sampler.partners(4, 1, size)):
            assert (partner == other).mean() < 0.05


def test_one_sample_is_its_own_partner():
    assert sampler.partners(0, 0, 1).tolist() == [0]
