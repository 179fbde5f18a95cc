"""Events of a run in words: starts, transitions, faults, the end. Without torch."""

from __future__ import annotations

from irkd_dist.eventlog import Event

POLICIES = {
    "reset": "moments reset, schedule begun again (reset)",
    "carry": "moments and schedule carried over (carry)",
    "rewarm": "moments kept, learning rate warmed up again (rewarm)",
}


def words(event: Event, stages: dict[int, Event]) -> tuple[str, str] | None:
    """An event in words, (what, details); None for what is told elsewhere. `stages`: their entries, by number."""
    match event["event"]:
        case "start" | "resume":
            world = event.get("world", 1)
            skipped = [f"left out: {text}" for text in event.get("skipped", [])]
            where = f"{world} process{'es' * (world != 1)} on {event.get('device', '?')}"
            return ("started" if event["event"] == "start" else "resumed"), "; ".join([where, *skipped])
        case "stage":
            size = f"{event.get('resolution', '?')} px, batch {event.get('batch', '?')}"
            return "stage entered", f"{size}, learning rate {event.get('lr', float('nan')):.3g}"
        case "transition":
            told = [f"{event['reason']}; next {event.get('resolution', '?')} px"]
            policy = event.get("policy") or stages.get(event["stage"], {}).get("policy")
            told += [f"optimizer: {POLICIES.get(str(policy), policy)}"] if policy else []
            told += [f"weights of {event['reload']}"] if event.get("reload") else []
            return "transition", "; ".join(told)
        case "skip":
            who = ", ".join(map(str, event.get("ranks", []))) or "the gradient"
            return "step skipped", f"not finite: {who}; {event.get('in_a_row', 1)} in a row"
        case "rollback":
            count = len(event.get("left_out", []))
            return (
                "went back",
                f"to {event.get('checkpoint', '?')}; the batches of {count} steps are left out",
            )
        case "checkpoint_failed":
            return "checkpoint failed", str(event.get("error", ""))
        case "stop":
            return "stopped", str(event.get("reason", "") or "a signal asked for it")
        case "best_lost" | "cache":
            return {"best_lost": "best lost", "cache": "teacher's cache"}[event["event"]], str(
                event.get("what", "")
            )
        case "cache_error":
            return (
                "teacher's cache",
                f"largest error of logits {event.get('logits')}, of maps {event.get('maps')}",
            )
        case "taps":
            return "taps without a map", str(event.get("found", ""))
        case "extend":
            return "extended", "; ".join(map(str, event.get("changed", [])))
        case "summary":
            return "finished", f"{event.get('steps', event['step']):,} steps"
    return None
