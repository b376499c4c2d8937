"""Two ends of a pipe: a child that serves JSON lines, and its owner, for whom every wait has a deadline."""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any

Message = dict[str, Any]
LIMIT = 400  # characters of a reason shown to the reader; the whole is in the child's stderr


class ChildError(RuntimeError):
    """The child refused, died or kept silent; the text says which, and why."""


class Child:
    """`python -m MODULE ARGUMENTS` in a session of its own, so that a Ctrl-C reaches only us and we end it whole."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, do: str, deadline_s: float, **details: object) -> Message:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._epitaph()) from None
        line = self._line(do, deadline_s)
        try:
            answer: Message = json.loads(line)
        except ValueError:
            raise ChildError(f"not JSON: {line[:80]!r}") from None
        if not answer.pop("ok", False):
            raise ChildError(str(answer.get("error", "no reason given")))
        return answer

    def pause(self) -> None:
        """Stop all its threads: several runtimes keep spinning after a call and would slow the next system."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the whole session of the child; a stopped process dies of SIGKILL too."""
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it dies when that call ends
            self._process.wait(timeout=10)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):
                    stream.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # once reaped, its number may belong to someone else
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _line(self, do: str, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        stop = monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = stop - monotonic()
                if left <= 0 or not selector.select(left):
                    raise ChildError(f"no answer to {do!r} within {deadline_s:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise ChildError(self._epitaph())
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output but did not end"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - LIMIT))
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"died ({how})" + (f": {' | '.join(said[-3:])}" if said else "")


def serve(handlers: Mapping[str, Callable[..., Message]], parent: int) -> None:
    """The child's end: answer each line with one line, until told to quit or the owner is gone."""
    die_with(parent)
    # libraries print to stdout: keep the pipe for answers, and let file descriptor 1 mean stderr from here on
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        message: Message = json.loads(line)
        do = message.pop("do")
        if do == "quit":
            break
        try:
            answer = {"ok": True, **handlers[do](**message)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": explain(error)}
        answers.write(json.dumps(answer) + "\n")


def die_with(parent: int) -> None:
    """Ask Linux to kill us when our owner ends: a stopped process would never see the end of its input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if parent and os.getppid() != parent:
        sys.exit("the parent is gone")


def explain(error: BaseException) -> str:
    """One line that names the error and its reason."""
    reason = " ".join(str(error).split()) or "no message"
    text = f"{type(error).__name__}: {reason}"
    return text if len(text) <= LIMIT else text[: LIMIT - 3] + "..."
