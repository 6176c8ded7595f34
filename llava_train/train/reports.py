"""How the reports of the ranks reach rank 0, and its verdict them: one short connection a report, one line each way.

Why not torch's TCPStore: its calls never return while the server is frozen, whatever their time-out, and print
stacks of C++ when the server left first, at the end of a good run.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from dataclasses import asdict
from typing import Any, Protocol, get_type_hints

from llava_train.train.hang import IO_S, Heard, Report, Times, Verdict, verdict

_POLL_S = 0.1
_LONGEST_LINE_BYTES = 65536


class Line(Protocol):
    """How a rank's thread learns of the others."""

    def exchange(self, report: Report, lived_s: float) -> Verdict | None:
        """Takes this rank's report, `lived_s` after the one before; returns the verdict when the job hangs."""

    def close(self) -> None:
        """Frees what the line holds."""


class Board:
    """Rank 0's end of the lines: the last report of each rank."""

    def __init__(self, n_ranks: int, times: Times) -> None:
        self._times = times
        unheard = [Report(rank, "", 0, "", 0.0, times.timeout_s) for rank in range(n_ranks)]
        self._ranks = [Heard(report, 0.0) for report in unheard]
        self._verdict: Verdict | None = None
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def serve(self, host: str) -> int:
        """Answers the other ranks from now on, on all addresses of this machine; returns the port.

        `host` is the name that they call it by.
        """
        families = {family for family, *_ in socket.getaddrinfo(host, None)}
        self._server = _Server(self, socket.AF_INET if socket.AF_INET in families else socket.AF_INET6)
        threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True).start()
        return int(self._server.server_address[1])

    def hear(self, report: Report) -> dict[str, Any]:
        """Takes the report of another rank, and answers it."""
        with self._lock:
            if 0 < report.rank < len(self._ranks):
                self._ranks[report.rank] = Heard(report, 0.0)
            culprits = None if self._verdict is None else self._verdict.culprits
            return {"first": asdict(self._ranks[0].report), "culprits": culprits}

    def exchange(self, report: Report, lived_s: float) -> Verdict | None:
        with self._lock:
            self._ranks = [Heard(heard.report, heard.unheard_s + lived_s) for heard in self._ranks]
            self._ranks[report.rank] = Heard(report, 0.0)
            self._verdict = verdict(self._ranks, self._times)
            return self._verdict

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class Caller:
    """Another rank's end of its line to rank 0."""

    def __init__(self, address: tuple[str, int], times: Times) -> None:
        self._address = address
        self._times = times
        self._first: Report | None = None
        self._unanswered_s = 0.0

    def exchange(self, report: Report, lived_s: float) -> Verdict | None:
        try:
            answer = self._ask(report)
            self._first, culprits = Report(**answer["first"]), answer["culprits"]
        except (OSError, ValueError, TypeError, KeyError):  # nobody there, or, when rank 0 has left, another program
            self._unanswered_s += lived_s
            # A rank 0 that never answered may be out of reach, and well.
            if self._first is None or self._unanswered_s <= self._times.timeout_s:
                return None
            return verdict([Heard(self._first, self._unanswered_s), Heard(report, 0.0)], self._times)
        self._unanswered_s = 0.0
        return None if culprits is None else Verdict(tuple(culprits))

    def close(self) -> None:
        """Each exchange has closed its connection."""

    def _ask(self, report: Report) -> dict[str, Any]:
        with socket.create_connection(self._address, timeout=IO_S) as connection:
            connection.sendall(_encode(asdict(report)))
            with connection.makefile("rb") as answer:
                return json.loads(answer.readline(_LONGEST_LINE_BYTES))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024  # all ranks may call at once

    def __init__(self, board: Board, family: socket.AddressFamily) -> None:
        self.board = board
        self.address_family = family
        super().__init__(("", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a caller that broke off will call again, and another program's words are not for us."""


class _Handler(socketserver.StreamRequestHandler):
    timeout = IO_S

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        told = json.loads(self.rfile.readline(_LONGEST_LINE_BYTES))
        # Anybody may call: words of other types would end the thread that judges.
        kinds = get_type_hints(Report)
        report = Report(**{name: kinds[name](value) for name, value in told.items()})
        self.wfile.write(_encode(self.server.board.hear(report)))


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
