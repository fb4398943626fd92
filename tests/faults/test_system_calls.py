"""Every write-class system call of every operation is killed at, and made to fail."""

from collections import Counter
from collections.abc import Callable

import pytest

from faults.harness import Driver, Fault
from faults.trials import Bench, Crash, telling
from faults.worlds import OPERATIONS, Operation, read_state, read_tree

pytestmark = pytest.mark.strace

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)

# A full disk may have room again; a device that fails once is retried; a file system that turned
# read-only stays so.
FAULTS = (Fault("SIGKILL"), Fault("ENOSPC"), Fault("EIO"), Fault("EROFS", lasts=True))


# The others recover in the same ways.
RECOVERIES = (
    "apply -o",
    "apply in place",
    "apply in place, two shards",
    "revert --all in place",
    "edit's saving",
)


@every_operation
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_at_any_call_leaves_the_old_state_or_the_new_one(
    benches: Callable[[Operation], Bench],
    operation: Operation,
    fault: Fault,
    report: Callable[[str], None],
) -> None:
    bench = benches(operation)
    calls = bench.traced.writes
    bench.each(bench.trial(fault, call) for call in calls)
    if fault is FAULTS[-1]:
        counts = ", ".join(f"{num} {name}" for name, num in Counter(call.name for call in calls).items())
        report(
            f"{operation.name}: {len(calls)} write-class calls, {len(FAULTS)} faults at each ({counts})"
        )


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.name in RECOVERIES], ids=lambda one: one.name
)
def test_fault_at_any_call_of_a_recovery_changes_no_state(
    benches: Callable[[Operation], Bench], operation: Operation, report: Callable[[str], None]
) -> None:
    bench = benches(operation)
    trials = bench.recoveries((Fault("SIGKILL"), Fault("EIO")))
    bench.each(trials)
    report(
        f"{operation.name}: {len(bench.crashes)} different states after a kill,"
        f" {len(trials)} faults in recovering from them"
    )


def test_copy_made_from_a_folder_whose_change_was_killed_is_whole(
    benches: Callable[[Operation], Bench],
) -> None:
    # Either state holds patches, and all of them taken out leave the base.
    bench = benches(next(one for one in OPERATIONS if one.name == "apply in place, two shards"))

    def plan(crash: Crash) -> Callable[[Driver], None]:
        def run(driver: Driver) -> None:
            with bench.opened(crash.world) as world, telling(f"SIGKILL at {crash.call}"):
                state = bench.judge(world)
                ending = driver.run(world, ("revert", "copy", "--all", "-o", "out"))
                assert ending.status == 0, ending.text
                assert read_tree(world / "out") == read_tree(world / "base")
                assert read_state(world / "copy") == (bench.old if state == "old" else bench.new)

        return run

    bench.each(map(plan, bench.crashes))
