"""Every operation is killed at random moments, wherever it is by then."""

import random
from collections import Counter
from collections.abc import Callable
from threading import Lock

import pytest

from faults.trials import Bench
from faults.worlds import OPERATIONS, Operation

NUM_MOMENTS = 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_kill_at_a_random_moment_leaves_the_old_state_or_the_new_one(
    benches: Callable[[Operation], Bench], operation: Operation, report: Callable[[str], None]
) -> None:
    bench = benches(operation)
    moments = random.Random(operation.name)
    counts: Counter[str] = Counter()
    guard = Lock()

    def note(when: str) -> None:
        with guard:
            counts[when] += 1

    # Before a third of its time is over, it only reads.
    delays = [moments.uniform(0.3, 1.4) * bench.wall_s for _ in range(NUM_MOMENTS)]
    bench.each(bench.kill_after(delay, note) for delay in delays)
    report(
        f"{operation.name}: killed at {counts.total()} random moments of its"
        f" {1000 * bench.wall_s:.0f} ms: {counts['before']} before it wrote,"
        f" {counts['within']} within, {counts['after']} after"
    )
