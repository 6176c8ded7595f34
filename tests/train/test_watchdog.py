"""A hang ends the job in time, and names the rank; nothing else does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.train import watchdog
from llava_train.train.hang import Heard, Report, Times, describe, judge
from llava_train.train.reports import Board, Caller
from llava_train.train.watchdog import EXIT_HUNG, Watchdog
from tests.train.helpers import TIMEOUT_S as HANGS_S
from tests.train.helpers import Finished, ended, environment, start_ranks

TIMEOUT_S = 6.0
"""Of jobs of processes: so long that only one that stands still is silent."""
TIMES = Times.of(TIMEOUT_S)
SILENT_AFTER_S = 3.0


def heard(rank=0, counter=5, activity="step 5", idle_s=0.0, allowance_s=10.0, unheard_s=0.0, place=None) -> Heard:
    place = f"pid {100 + rank} on node" if place is None else place
    return Heard(Report(rank, place, counter, activity, idle_s, allowance_s), unheard_s)


times = st.floats(0, 100)
jobs = st.lists(st.tuples(st.integers(0, 3), times, times, times), min_size=1, max_size=6).map(
    lambda rows: [heard(rank, counter, f"step {counter}", *numbers) for rank, (counter, *numbers) in enumerate(rows)]
)
hung_jobs = jobs.map(
    lambda ranks: [heard(r.report.rank, r.report.counter, idle_s=20.0, unheard_s=r.unheard_s) for r in ranks]
)


@given(jobs, st.data())
def test_a_job_in_which_one_rank_goes_on_is_never_ended(ranks, data):
    rank = data.draw(st.integers(0, len(ranks) - 1))
    ranks[rank] = heard(rank, idle_s=4.0, unheard_s=data.draw(st.floats(0, 6)), allowance_s=10.0)
    assert judge(ranks, SILENT_AFTER_S) is None


@given(hung_jobs)
def test_silent_ranks_are_to_blame_before_slow_ones(ranks):
    silent = {r.report.rank for r in ranks if r.unheard_s > SILENT_AFTER_S}
    culprits = judge(ranks, SILENT_AFTER_S)
    assert culprits is not None
    assert not silent or set(culprits) == silent


@given(hung_jobs)
def test_when_all_answer_the_ranks_behind_are_to_blame_or_nobody(ranks):
    culprits = judge(ranks, 1000.0)
    counters = [r.report.counter for r in ranks]
    if len(set(counters)) > 1 or len(ranks) == 1:
        assert culprits == tuple(rank for rank, counter in enumerate(counters) if counter == min(counters))
    else:
        assert culprits == ()


@given(jobs)
def test_every_culprit_up_to_four_is_named_with_its_process(ranks):
    culprits = judge(ranks, SILENT_AFTER_S)
    if culprits is not None:
        message = describe(ranks, culprits, SILENT_AFTER_S, 60.0)
        assert "\n" not in message
        assert all(f"rank {rank} (pid {100 + rank} on node)" in message for rank in culprits[:4])


END = " The job ends; start it again to go on from the newest checkpoint (engine.hang_timeout_s: 60 sets this time)."


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (
            [heard(0, 6, "step 6", 70), heard(1, 5, "step 5", 60), heard(2, 6, "step 6", 65)],
            "rank 1 (pid 101 on node) answers, but has not gone on for 60 s, in: step 5. The others wait for it in: step 6.",
        ),
        (
            [heard(0, 6, "step 6", 70), heard(1, 5, "step 5", 1, unheard_s=60)],
            "rank 1 (pid 101 on node) has not answered for 60 s; when last heard of it was in: step 5. "
            "rank 0 (pid 100 on node) waits for it in: step 6.",
        ),
        (
            [heard(0, 6, "step 6", 70), heard(1, 0, "", unheard_s=60, place="")],
            "rank 1 has not answered for 60 s; it was never heard of. rank 0 (pid 100 on node) waits for it in: step 6.",
        ),
        (
            [heard(0, idle_s=70), heard(1, idle_s=61)],
            "all 2 ranks are in: step 5; none of them has gone on for 61 s.",
        ),
        ([heard(0, idle_s=70)], "rank 0 (pid 100 on node) answers, but has not gone on for 70 s, in: step 5."),
        (
            [heard(0, idle_s=70), *(heard(rank, unheard_s=60) for rank in range(1, 8))],
            " ".join(
                f"rank {rank} (pid {100 + rank} on node) has not answered for 60 s; when last heard of it was in: step 5."
                for rank in range(1, 5)
            )
            + " So it is with 3 more: 5, 6, 7. rank 0 (pid 100 on node) waits for them in: step 5.",
        ),
    ],
)
def test_the_message_names_the_culprit_and_what_the_others_wait_in(ranks, message):
    culprits = judge(ranks, SILENT_AFTER_S)
    assert describe(ranks, culprits, SILENT_AFTER_S, 60.0) == f"error: {message}{END}"


@given(st.floats(0.5, 1e6))
def test_a_rank_counts_as_silent_before_the_job_is_judged(timeout_s):
    times = Times.of(timeout_s)
    assert times.interval_s <= 5
    assert times.silent_after_s < times.timeout_s


def test_a_rank_that_never_reached_rank_0_goes_on():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        caller = Caller(unused.getsockname(), TIMES)
        assert all(caller.exchange(heard(1, idle_s=100.0).report, 1.0) is None for _ in range(10))


def test_rank_0_is_to_blame_when_it_answers_no_more():
    board = Board(2, TIMES)
    caller = Caller(("127.0.0.1", board.serve("127.0.0.1")), TIMES)
    board.exchange(heard(0, activity="reading step 6", allowance_s=TIMEOUT_S).report, 0.0)
    stuck = heard(1, idle_s=100.0, allowance_s=TIMEOUT_S).report
    assert caller.exchange(stuck, 1.0) is None
    board.close()
    *before, verdict = [caller.exchange(stuck, TIMEOUT_S / 2) for _ in range(3)]
    assert before == [None, None]
    assert verdict.culprits == (0,)
    assert "rank 0 (pid 100 on node) has not answered for 9 s" in verdict.message
    assert "in: reading step 6. rank 1 (pid 101 on node) waits for it in: step 5." in verdict.message
    assert caller.exchange(heard(1, idle_s=0.0).report, 1.0) is None


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\n", b"[1]\n", b"{}\n", b'"a"\n', b"\xff\n", b"\n", b""])
def test_rank_0_bears_what_other_programs_say(words, capfd):
    board = Board(2, TIMES)
    port = board.serve("localhost")
    with socket.create_connection(("localhost", port)) as connection:
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert Caller(("localhost", port), TIMES).exchange(heard(1).report, 0.0) is None
    board.close()
    assert capfd.readouterr() == ("", "")


# A job whose clock is moved by hand.


@pytest.fixture
def ranks(monkeypatch):
    """The watchdogs of three ranks in this process. They report when `pass_time` says so."""
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    ports = []

    def share_port(port):
        ports.extend([] if port is None else [port])
        return ports[0]

    with ExitStack() as stack:
        yield [stack.enter_context(Watchdog(rank, 3, "127.0.0.1", share_port, TIMEOUT_S)) for rank in range(3)]


def pass_time(ranks, seconds, works=()):
    """What the ranks are told after each interval, while those in `works` say that they work."""
    told = []
    for _ in range(round(seconds / TIMES.interval_s)):
        for rank in works:
            ranks[rank].touch()
        told += [rank._tick(TIMES.interval_s) for rank in ranks]
    return {verdict and verdict.culprits for verdict in told}


@pytest.mark.parametrize("works", [0, 1])
def test_one_rank_may_work_for_long_while_it_says_so(ranks, works):
    for rank in ranks:
        rank.beat("saving")
    assert pass_time(ranks, 10 * TIMEOUT_S, works=[works]) == {None}
    assert pass_time(ranks, 2 * TIMEOUT_S) == {None, ()}, "and no longer"


def test_a_slow_activity_within_its_patience_is_not_ended(ranks):
    for rank in ranks:
        rank.beat("loading", 5.0)
    assert pass_time(ranks, 4.5 * TIMEOUT_S) == {None}
    for rank in ranks:
        rank.beat("step 1")
    assert pass_time(ranks, 0.8 * TIMEOUT_S) == {None}
    assert pass_time(ranks, TIMEOUT_S) == {None, ()}, "the next activity has its own"


def test_a_time_in_which_a_process_was_stopped_counts_as_one_long_interval(monkeypatch):
    guard, verdicts, interval_s = Watchdog(0, 1, "", lambda _: 0, TIMEOUT_S), [], TIMES.interval_s
    guard._line = Board(1, TIMES)
    left = iter([0.0, 0.0, interval_s, 3600.0, 3600.0 + interval_s])
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(left)))
    guard._stop = SimpleNamespace(is_set=lambda: left.__length_hint__() == 0, wait=lambda _: None)
    monkeypatch.setattr(guard, "_end", verdicts.append)
    guard._watch()
    assert guard._idle_s == pytest.approx(2 * interval_s + TIMES.longest_tick_s)
    assert verdicts == []


# Jobs of small processes, which run all at once, for most of their time is waiting. A rank that freezes is left so: the
# others must end without it.

GOES_ON = [["beat", "step 1"], ["settle"]]
WAITS = [*GOES_ON, ["beat", "step 2"], ["hang"]]
FREEZES, DIES, LOOPS = ([*GOES_ON, [deed]] for deed in ("freeze", "die", "loop"))
SUSPENDED_TIMEOUT_S = 12.0
"""Twice what the activity and the longest interval take."""


def leaves(rank, last):
    """Leaves after the rank before it has; the one after `last` leaves first."""
    return GOES_ON if rank == (last + 1) % 3 else [*GOES_ON, ["wait for", f"left-{(rank - 1) % 3}"]]


JOBS = {
    "frozen": [WAITS, [*GOES_ON, ["beat", "reading step 2"], ["report"], ["freeze"]], WAITS],
    "killed": [WAITS, WAITS, DIES],
    "rank 0: freeze": [FREEZES, WAITS, WAITS],
    "rank 0: die": [DIES, WAITS, WAITS],
    "frozen together": [FREEZES, FREEZES, WAITS],
    "loop on 0": [LOOPS, WAITS, WAITS],
    "loop on 1": [WAITS, LOOPS, WAITS],
    "all hang": [WAITS, WAITS],
    "alone": [LOOPS],
    "failed": [WAITS, [*GOES_ON, ["fail", "gone"]]],
    "suspended": [[*GOES_ON, ["beat", "step 2"], ["report"], ["wait for", "woken"]]] * 2,
    **{f"last leaves {last}": [leaves(rank, last) for rank in range(3)] for last in range(3)},
}
FROZEN = {"frozen": (1,), "rank 0: freeze": (0,), "frozen together": (0, 1)}


@dataclass
class Job:
    processes: list[BaseProcess]
    folder: Path
    finished: Finished | None = None

    def place(self, rank):
        return f"pid {self.processes[rank].pid} on {socket.gethostname()}"


def start(folder, name):
    timeout_s = SUSPENDED_TIMEOUT_S if name == "suspended" else TIMEOUT_S
    arguments = ["-m", "tests.train.watchdog_worker", timeout_s, json.dumps(JOBS[name])]
    folder.mkdir()
    return Job(start_ranks(arguments, folder, len(JOBS[name])), folder)


def suspend(job):
    """Stops all processes of a job for longer than its time-out."""
    while not all((job.folder / f"heard-{rank}").exists() for rank in range(2)):
        assert all(process.exitcode is None for process in job.processes)
        time.sleep(0.02)
    for process in job.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(SUSPENDED_TIMEOUT_S + 0.5)
    for process in job.processes:
        os.kill(process.pid, signal.SIGCONT)
    (job.folder / "woken").touch()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {name: start(folder / name.replace(" ", "-"), name) for name in JOBS}
    suspend(jobs["suspended"])
    for name, job in jobs.items():
        for rank, process in enumerate(job.processes):
            if rank not in FROZEN.get(name, ()):
                process.join(HANGS_S)
        job.finished = ended(job.processes, job.folder)
    return jobs


def assert_quiet(finished):
    assert finished.codes == [0] * len(finished.codes)
    assert finished.stdout == finished.stderr == [""] * len(finished.codes)


def test_a_frozen_rank_ends_the_job_and_is_named(jobs):
    job = jobs["frozen"]
    assert job.finished.codes == [EXIT_HUNG, -signal.SIGKILL, EXIT_HUNG]
    assert re.fullmatch(
        rf"error: rank 1 \({re.escape(job.place(1))}\) has not answered for \d+ s; when last heard of it was in: reading "
        r"step 2\. The others wait for it in: step 2\. The job ends; start it again to go on from the newest "
        r"checkpoint \(engine\.hang_timeout_s: 6 sets this time\)\.\n",
        job.finished.stderr[0],
    )
    assert job.finished.stderr[2] == ""


def test_a_killed_rank_ends_the_job(jobs):
    finished = jobs["killed"].finished
    assert finished.codes == [EXIT_HUNG, EXIT_HUNG, -signal.SIGKILL]
    assert re.match(r"error: rank 2 \(pid .*\) has not answered .* in: step 1\. The others", finished.stderr[0])


@pytest.mark.parametrize("deed", ["freeze", "die"])
def test_rank_0_is_named_by_the_others(jobs, deed):
    job = jobs[f"rank 0: {deed}"]
    assert job.finished.codes[1:] == [EXIT_HUNG, EXIT_HUNG]
    for rank in (1, 2):
        said = job.finished.stderr[rank]
        assert f"error: rank 0 ({job.place(0)}) " in said
        assert "when last heard of it was in: step 1." in said
        assert f"rank {rank} ({job.place(rank)}) " in said


def test_ranks_that_freeze_together_with_rank_0_leave_one_that_says_it(jobs):
    finished = jobs["frozen together"].finished
    assert finished.codes[2] == EXIT_HUNG
    assert finished.stderr[2].startswith("error: rank 0 (pid ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_in_an_endless_loop_is_named_and_shows_where(jobs, rank):
    finished = jobs[f"loop on {rank}"].finished
    assert finished.codes == [EXIT_HUNG] * 3
    assert re.match(
        rf"error: rank {rank} \(pid .*\) answers, but has not gone on for \d+ s, in: step 1\. The others wait for it "
        r"in: step 2\.",
        finished.stderr[0],
    )
    for other in range(3):
        assert ("in loop_for_ever" in finished.stderr[other]) == (other == rank)


def test_when_all_hang_in_the_same_activity_nobody_is_blamed(jobs):
    finished = jobs["all hang"].finished
    assert finished.codes == [EXIT_HUNG] * 2
    assert re.match(r"error: all 2 ranks are in: step 2; none of them has gone on for \d+ s\.", finished.stderr[0])
    assert "watchdog_worker.py" in finished.stderr[0]
    assert finished.stderr[1] == ""


def test_a_single_process_is_guarded_too(jobs):
    finished = jobs["alone"].finished
    assert finished.codes == [EXIT_HUNG]
    assert re.match(r"error: rank 0 \(pid .*\) answers, but .* in: step 1\. The job ends;", finished.stderr[0])
    assert "in loop_for_ever" in finished.stderr[0]


def test_a_process_that_hangs_on_its_own_output_ends(tmp_path):
    script = json.dumps([[["beat", "step 1"], ["fill stderr"]]])
    command = [sys.executable, "-m", "tests.train.watchdog_worker", "1.0", script]
    env = environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(HANGS_S) == EXIT_HUNG
        finally:
            process.kill()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_ranks_that_leave_in_any_order_leave_nothing_behind(jobs, last):
    assert_quiet(jobs[f"last leaves {last}"].finished)


def test_a_rank_that_failed_is_named_with_its_error(jobs):
    finished = jobs["failed"].finished
    assert finished.codes == [EXIT_HUNG, 1]
    assert "rank 1 (pid " in finished.stderr[0]
    assert "when last heard of it was in: ending after KeyError." in finished.stderr[0]
    assert finished.stderr[1].endswith("KeyError: 'gone'\n")


def test_a_job_that_was_suspended_for_long_goes_on(jobs):
    assert_quiet(jobs["suspended"].finished)
