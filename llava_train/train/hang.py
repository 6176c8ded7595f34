"""Whether a job hangs, on which ranks, and how to say it: pure functions of what the ranks last reported.

Ranks pass the same activities in the same order, and count them. One that is behind keeps the others waiting in
a collective, so when nobody goes on, the rank that has not answered is to blame, else the one with the lowest
count. Somebody who goes on, alone or not, is waited for: rank 0 may write a large file while the others wait.

    counter    1: 41, 2: 41, 3: 40      nobody goes on: rank 3 is behind, 1 and 2 wait for it
    counter    1: 41, 2: 41, 3: 40      rank 3 goes on: no hang
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

IO_S = 1.0
"""How long a report waits for its answer."""
_MOST_NAMED = 4


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    rank: int
    place: str
    """Its process and host, `pid 4711 on node-b`; empty for a rank that has not reported yet."""
    counter: int
    """Activities begun."""
    activity: str
    idle_s: float
    """How long its main thread had made no progress."""
    allowance_s: float
    """How long this activity may go on without progress."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})" if self.place else f"rank {self.rank}"


@dataclass(frozen=True)
class Heard:
    """The last report of a rank, and how long ago it came."""

    report: Report
    unheard_s: float

    @property
    def idle_s(self) -> float:
        """For how long no progress of the rank is known."""
        return self.report.idle_s + self.unheard_s


@dataclass(frozen=True)
class Verdict:
    """The job ends. `message` is empty where another rank says it."""

    culprits: tuple[int, ...]
    message: str = ""


class Times(NamedTuple):
    """The times of a watchdog, from its time-out."""

    timeout_s: float
    interval_s: float
    longest_tick_s: float
    """A tick that took longer was none of work: the process was stopped meanwhile."""
    silent_after_s: float

    @classmethod
    def of(cls, timeout_s: float) -> Times:
        interval_s = min(max(timeout_s / 10, 0.2), 5.0)
        longest_tick_s = 2 * (interval_s + IO_S)
        return cls(timeout_s, interval_s, longest_tick_s, min(longest_tick_s, timeout_s / 2))


def judge(ranks: Sequence[Heard], silent_after_s: float) -> tuple[int, ...] | None:
    """None while some rank may still go on; else the job hangs, and on these ranks (on none in particular: ()).

    A rank is silent when it was not heard of for longer than `silent_after_s`.
    """
    if any(heard.idle_s <= heard.report.allowance_s for heard in ranks):
        return None
    if silent := tuple(heard.report.rank for heard in ranks if heard.unheard_s > silent_after_s):
        return silent
    lowest = min(heard.report.counter for heard in ranks)
    behind = tuple(heard.report.rank for heard in ranks if heard.report.counter == lowest)
    return () if 1 < len(ranks) == len(behind) else behind


def describe(ranks: Sequence[Heard], culprits: tuple[int, ...], silent_after_s: float, timeout_s: float) -> str:
    """The message of a hang: one line, which names the culprits and what they and the others were in."""
    named = [heard for heard in ranks if heard.report.rank in culprits]
    others = [heard for heard in ranks if heard.report.rank not in culprits]
    said = [_of_culprit(heard, heard.unheard_s > silent_after_s) for heard in named[:_MOST_NAMED]]
    if len(named) > _MOST_NAMED:
        said.append(f"So it is with {len(named) - _MOST_NAMED} more: {', '.join(map(str, culprits[_MOST_NAMED:]))}.")
    activities = "; ".join(list(dict.fromkeys(heard.report.activity for heard in others))[:_MOST_NAMED])
    if not named:
        least_s = min(heard.idle_s for heard in ranks)
        said.append(f"all {len(ranks)} ranks are in: {activities}; none of them has gone on for {least_s:.0f} s.")
    elif others:
        waiting = f"{others[0].report} waits" if len(others) == 1 else "The others wait"
        said.append(f"{waiting} for {'it' if len(named) == 1 else 'them'} in: {activities}.")
    return (
        f"error: {' '.join(said)} The job ends; start it again to go on from the newest checkpoint "
        f"(engine.hang_timeout_s: {timeout_s:g} sets this time)."
    )


def verdict(ranks: Sequence[Heard], times: Times) -> Verdict | None:
    """None while some rank may still go on; else what ends the job."""
    culprits = judge(ranks, times.silent_after_s)
    if culprits is None:
        return None
    return Verdict(culprits, describe(ranks, culprits, times.silent_after_s, times.timeout_s))


def _of_culprit(heard: Heard, silent: bool) -> str:
    report = heard.report
    if not silent:
        return f"{report} answers, but has not gone on for {heard.idle_s:.0f} s, in: {report.activity}."
    last = f"when last heard of it was in: {report.activity}" if report.place else "it was never heard of"
    return f"{report} has not answered for {heard.unheard_s:.0f} s; {last}."
