"""Commands on the far side of SSH, by shells that stay: a login there may take as long as the work.

What a login runs at its begin (modules, environments) is paid once a shell, not once a command. A
shell reads commands from its standard input, so that these come in as text: the input of a command
is written as what ``printf`` makes of it, in portable escapes only. The ends of what a command
prints and of what it complains of are marked by words that nobody can guess.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from typing import Any

import asyncssh

_READ = 1 << 16
# octets of input in one printf, which is a program of its own for some shells: its line is limited
_PRINTED = 16 << 10
# neither the shell nor printf makes anything else of these; a format must not begin with a dash
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+=, ")
_AS_TEXT = [bytes([n]) if n in _PLAIN else b"\\%03o" % n for n in range(256)]


class ShellEnded(Exception):
    """There is no shell any more, or never was; ``complaint`` is what was said instead."""

    def __init__(self, complaint: bytes) -> None:
        super().__init__(complaint)
        self.complaint = complaint


class Shell:
    """A POSIX shell on the far side, which does one command after the other."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process

    @classmethod
    async def begun(cls, connection: asyncssh.SSHClientConnection) -> Shell:
        """A new one; what the login prints is passed over.

        Raises
        ------
        ShellEnded
            if something else answers.
        """
        # every login shell knows how to become this one
        process = await connection.create_process("exec sh", encoding=None)
        shell = cls(process)
        try:
            await shell.run("true", b"")
        except BaseException:
            shell.end()
            raise
        return shell

    async def run(self, command: str, given: bytes) -> tuple[int, bytes, bytes]:
        """Exit status of a command with ``given`` as its input, what it printed, and what it
        complained of.

        Raises
        ------
        ShellEnded
        """
        mark = secrets.token_hex(16).encode("ascii")
        line = b"{ %s; } | { %s\n}\nprintf '%%s %%d\\n' '%s' $?; printf '%%s\\n' '%s' >&2\n" % (
            b"; ".join(_printed(given)) or b":",
            command.encode("ascii"),
            mark,
            mark,
        )
        told = asyncio.gather(
            self._until(self._process.stdout, mark), self._until(self._process.stderr, mark)
        )
        try:
            self._process.stdin.write(line)
            (printed, status), (complaint, _) = await told
        except BrokenPipeError:
            raise ShellEnded(b"its input is not taken") from None
        finally:
            told.cancel()
        if not status.strip().isdigit():
            raise ShellEnded(complaint)
        return int(status), printed, complaint

    async def _until(self, stream: Any, mark: bytes) -> tuple[bytes, bytes]:
        """What comes before ``mark``, and what follows on its line; all there is if it ends."""
        seen, found = bytearray(), -1
        while found < 0 or not seen.endswith(b"\n"):
            some = await stream.read(_READ)
            if not some:
                return bytes(seen), b""
            begin = max(0, len(seen) - len(mark))
            seen += some
            found = seen.find(mark, begin) if found < 0 else found
        return bytes(seen[:found]), bytes(seen[found + len(mark) :])

    def end(self) -> None:
        """Have it ended there, whatever it is doing. OpenSSH does that for all users but root,
        whose commands end when they have something to say."""
        self._process.terminate()
        self._process.close()


def _printed(given: bytes) -> Iterator[bytes]:
    """Commands that print ``given``."""
    for n in range(0, len(given), _PRINTED):
        text = b"".join(map(_AS_TEXT.__getitem__, given[n : n + _PRINTED]))
        yield b"printf '%s'" % text
