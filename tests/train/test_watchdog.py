"""A hang ends the job in time, and names the rank; nothing else does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.train.hang import Heard, Report, Times, describe, judge
from llava_train.train.reports import Board, Caller
from llava_train.train.watchdog import EXIT_HUNG
from tests.train.helpers import Finished, ended, environment, start_ranks

TIMEOUT_S = 2.0
TIMES = Times.of(TIMEOUT_S)
SILENT_AFTER_S = 3.0
GOES_ON = [["beat", "step 1"], ["sleep", 0.6]]  # several reports long
WAITS = [*GOES_ON, ["beat", "step 2"], ["hang"]]


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
    verdicts = [caller.exchange(stuck, 1.0) for _ in range(3)]
    assert verdicts[:2] == [None, None]
    assert verdicts[2].culprits == (0,)
    assert "rank 0 (pid 100 on node) has not answered for 3 s" in verdicts[2].message
    assert "in: reading step 6. rank 1 (pid 101 on node) waits for it in: step 5." in verdicts[2].message
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


# Jobs of small processes. A rank that freezes is left so: the others must end without it.


def start(cwd: Path, *scripts: list, timeout_s: float = TIMEOUT_S) -> list[BaseProcess]:
    arguments = ["-m", "tests.train.watchdog_worker", timeout_s, json.dumps(scripts)]
    return start_ranks(arguments, cwd, len(scripts))


def end(processes: list[BaseProcess], cwd: Path, frozen: tuple[int, ...] = ()) -> Finished:
    """Waits until all but the frozen ranks have ended; kills those."""
    for rank, process in enumerate(processes):
        if rank not in frozen:
            process.join(30)
    return ended(processes, cwd)


def run(cwd: Path, *scripts: list, frozen: tuple[int, ...] = (), timeout_s: float = TIMEOUT_S) -> Finished:
    return end(start(cwd, *scripts, timeout_s=timeout_s), cwd, frozen)


def assert_quiet(finished: Finished) -> None:
    assert finished.codes == [0] * len(finished.codes)
    assert finished.stdout == finished.stderr == [""] * len(finished.codes)


def test_a_frozen_rank_ends_the_job_in_time_and_is_named(tmp_path):
    processes = start(tmp_path, WAITS, [*GOES_ON, ["beat", "reading step 2"], ["sleep", 0.5], ["freeze"]], WAITS)
    began = time.monotonic()
    finished = end(processes, tmp_path, frozen=(1,))
    assert time.monotonic() - began < 1.1 + 2 * TIMEOUT_S + 2  # what the script and the start take
    assert finished.codes == [EXIT_HUNG, -signal.SIGKILL, EXIT_HUNG]
    place = f"pid {processes[1].pid} on {socket.gethostname()}"
    assert re.fullmatch(
        rf"error: rank 1 \({re.escape(place)}\) has not answered for \d s; when last heard of it was in: reading "
        r"step 2\. The others wait for it in: step 2\. The job ends; start it again to go on from the newest "
        r"checkpoint \(engine\.hang_timeout_s: 2 sets this time\)\.\n",
        finished.stderr[0],
    )
    assert finished.stderr[2] == ""


def test_a_killed_rank_ends_the_job(tmp_path):
    finished = run(tmp_path, WAITS, WAITS, [*GOES_ON, ["die"]])
    assert finished.codes == [EXIT_HUNG, EXIT_HUNG, -signal.SIGKILL]
    assert re.match(r"error: rank 2 \(pid .*\) has not answered .* in: step 1\. The others", finished.stderr[0])


@pytest.mark.parametrize("deed", ["freeze", "die"])
def test_rank_0_is_named_by_the_others(tmp_path, deed):
    processes = start(tmp_path, [*GOES_ON, [deed]], WAITS, WAITS)
    finished = end(processes, tmp_path, frozen=(0,))
    assert finished.codes[1:] == [EXIT_HUNG, EXIT_HUNG]
    for rank in (1, 2):
        assert f"error: rank 0 (pid {processes[0].pid} on " in finished.stderr[rank]
        assert "when last heard of it was in: step 1." in finished.stderr[rank]
        assert f"rank {rank} (pid {processes[rank].pid} on " in finished.stderr[rank]


def test_ranks_that_freeze_together_with_rank_0_leave_one_that_says_it(tmp_path):
    finished = run(tmp_path, [*GOES_ON, ["freeze"]], [*GOES_ON, ["freeze"]], WAITS, frozen=(0, 1), timeout_s=1.0)
    assert finished.codes[2] == EXIT_HUNG
    assert finished.stderr[2].startswith("error: rank 0 (pid ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_in_an_endless_loop_is_named_and_shows_where(tmp_path, rank):
    scripts = [WAITS, WAITS, WAITS]
    scripts[rank] = [*GOES_ON, ["loop"]]
    finished = run(tmp_path, *scripts)
    assert finished.codes == [EXIT_HUNG] * 3
    assert re.match(
        rf"error: rank {rank} \(pid .*\) answers, but has not gone on for \d s, in: step 1\. The others wait for it "
        r"in: step 2\.",
        finished.stderr[0],
    )
    for other in range(3):
        assert ("in loop_for_ever" in finished.stderr[other]) == (other == rank)


def test_when_all_hang_in_the_same_activity_nobody_is_blamed(tmp_path):
    finished = run(tmp_path, WAITS, WAITS, timeout_s=1.0)
    assert finished.codes == [EXIT_HUNG] * 2
    assert finished.stderr[0].startswith("error: all 2 ranks are in: step 2; none of them has gone on for 1 s.")
    assert "watchdog_worker.py" in finished.stderr[0]
    assert finished.stderr[1] == ""


def test_a_single_process_is_guarded_too(tmp_path):
    finished = run(tmp_path, [["beat", "step 1"], ["loop"]], timeout_s=1.0)
    assert finished.codes == [EXIT_HUNG]
    assert re.match(r"error: rank 0 \(pid .*\) answers, but .* in: step 1\. The job ends;", finished.stderr[0])
    assert "in loop_for_ever" in finished.stderr[0]


def test_a_process_that_hangs_on_its_own_output_ends(tmp_path):
    script = json.dumps([[["beat", "step 1"], ["fill stderr"]]])
    command = [sys.executable, "-m", "tests.train.watchdog_worker", "1.0", script]
    env = environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(20) == EXIT_HUNG
        finally:
            process.kill()


def test_one_rank_may_work_for_long_while_it_says_so(tmp_path):
    saves = [*GOES_ON, ["beat", "saving"], ["touch", 2.5]]
    waits = [*GOES_ON, ["beat", "saving"], ["sleep", 2.5]]
    assert_quiet(run(tmp_path, waits, saves, waits, timeout_s=1.0))


def test_a_slow_activity_within_its_patience_is_not_ended(tmp_path):
    slow = [["beat", "loading", 5.0], ["sleep", 2.5], ["beat", "step 1"]]
    assert_quiet(run(tmp_path, slow, slow, timeout_s=1.0))


@pytest.mark.parametrize("last", [0, 1, 2])
def test_ranks_that_leave_in_any_order_leave_nothing_behind(tmp_path, last):
    scripts = [[*GOES_ON, ["sleep", 0.4 * ((rank - last - 1) % 3)]] for rank in range(3)]
    assert_quiet(run(tmp_path, *scripts))


def test_a_rank_that_failed_is_named_with_its_error(tmp_path):
    finished = run(tmp_path, WAITS, [*GOES_ON, ["fail", "gone"]], timeout_s=1.0)
    assert finished.codes == [EXIT_HUNG, 1]
    assert "rank 1 (pid " in finished.stderr[0]
    assert "when last heard of it was in: ending after KeyError." in finished.stderr[0]
    assert finished.stderr[1].endswith("KeyError: 'gone'\n")


def test_a_job_that_was_suspended_for_long_goes_on(tmp_path):
    timeout_s = 5.0
    works = [["beat", "step 1"], ["sleep", timeout_s + 1.8]]  # the clock of `sleep` does not stand still
    processes = start(tmp_path, works, works, timeout_s=timeout_s)
    while not all((tmp_path / f"started-{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    time.sleep(0.8)  # so that the watchdogs have seen the activity before
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(timeout_s + 0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    assert_quiet(end(processes, tmp_path))
