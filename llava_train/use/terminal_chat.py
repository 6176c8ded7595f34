"""A conversation in the terminal: `llava-train chat`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llava_train.errors import UserError
from llava_train.use.images import ImageLike, read_image
from llava_train.use.llava import LLaVA

HELP = """\
/image PATH    show the model a picture with your next words (again for several)
/reset         begin anew
/quit          leave, as Ctrl-D does
Ctrl-C         stop an answer"""


@dataclass
class TerminalChat:
    """Reads lines and prints answers as they are made, until the lines end."""

    llava: LLaVA
    read: Callable[[str], str]
    """As `input`: raises EOFError at the end."""
    say: Callable[[str], None]
    """Prints text as it is, without a new line."""
    system: str | None = None
    allow_urls: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `Sampling`."""

    def run(self) -> None:
        self._begin()
        self.say(f"{self.llava.name} on {self.llava.device}. /image PATH shows a picture, /help says more.\n")
        while True:
            try:
                line = self.read("> ").strip()
                if line in ("/quit", "/exit"):
                    return
                self._take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n(stopped)\n")
            except UserError as error:
                self.say(f"error: {error}\n")

    def _begin(self) -> None:
        self._chat = self.llava.chat(self.system, allow_urls=self.allow_urls)
        self._pending: list[ImageLike] = []

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image" and argument.strip():
            path = argument.strip().strip("'\"")
            read_image(path, self.allow_urls)
            self._pending.append(path)
            self.say(f"{path}: shown with your next words\n")
        elif command == "/image":
            self.say("error: /image PATH: name the file of a picture\n")
        elif command == "/reset":
            self._begin()
            self.say("begun anew\n")
        elif command == "/help":
            self.say(HELP + "\n")
        elif command.startswith("/"):
            self.say(f"error: {command} is not known\n{HELP}\n")
        elif line:
            self._answer(line)

    def _answer(self, text: str) -> None:
        pieces = self._chat.stream(text, self._pending, **self.settings)
        try:
            for piece in pieces:
                self._pending = []  # now the conversation keeps them
                self.say(piece)
        finally:
            pieces.close()  # type: ignore[attr-defined]
        self.say("\n")
