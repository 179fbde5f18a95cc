"""What shards behind a URL cost a run: counted by each process, said at the end of an epoch."""

from __future__ import annotations

from dataclasses import asdict

from irkd_dist import config as configuration
from irkd_dist.data import store
from irkd_dist.data.remote import Url
from irkd_dist.training import distributed
from irkd_dist.training.parts import Parts
from irkd_dist.training.tracking import Tracker

MIB = 2**20


def tell(parts: Parts, tracker: Tracker, step: int) -> None:
    """Say what all processes downloaded since the last time; every process must call it."""
    if not isinstance(configuration.shards_of(parts.config), Url):
        return
    own = store.of(parts.config.data.shard_cache).take_counts()
    total = store.summed(distributed.gather(parts.engine, own))
    tracker.event("downloads", step, **{**asdict(total), "seconds": round(total.seconds, 3)})
    if text := words(total):
        tracker.say(f"shards: {text}")


def words(counts: store.Counts) -> str:
    """What was more than a read from the cache; empty where nothing was."""
    said = []
    if counts.downloads:
        seconds = f"{counts.seconds:.1f} s of requests"
        said.append(f"{counts.downloads:,} files downloaded ({counts.bytes / MIB:,.1f} MiB, {seconds})")
    if counts.ranges:
        said.append(f"{counts.ranges:,} images fetched alone")
    for count, what in (
        (counts.evictions, "evicted from the cache"),
        (counts.retries, "requests tried again"),
        (counts.damaged, "fetched anew, since they were damaged"),
    ):
        if count:
            said.append(f"{count:,} {what}")
    return ", ".join(said)
