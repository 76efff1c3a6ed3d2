"""The pipes of a command, and what is made of its end.

See: dsec/edge/capture.py, dsec/edge/substrates/container_sandbox.py.
"""

from __future__ import annotations

import os

from dsec.edge.capture import OutputBuffer, PipeReader, PipeWriter
from dsec.errors import ResourceExhaustedError
from dsec.types import Command, ExecResult, Output

CROWDED_MESSAGE = b"cannot start: Resource temporarily unavailable (too many processes in this sandbox)\n"


class Pipes:
    """The pipes of one command: our ends on the event loop, the command's ends until they are sent."""

    def __init__(self, command: Command, scratch: bytearray) -> None:
        self.theirs: list[int] = []
        self._writer: PipeWriter | None = None
        self._readers: list[PipeReader] = []
        try:
            if command.stdin:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                self._writer = PipeWriter(ours, command.stdin)
            for _ in range(1 if command.merge_stderr else 2):
                ours, theirs = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                self._readers.append(PipeReader(ours, OutputBuffer(command.output_bytes_max), scratch))
        except OSError as error:
            self.close()
            raise ResourceExhaustedError(f"no pipes for a command: {error}") from error

    def close_theirs(self) -> None:
        """Close the ends that were sent."""
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def finish(self) -> tuple[Output, Output]:
        """What came on stdout and stderr until now."""
        outputs = [reader.finish() for reader in self._readers]
        return outputs[0], outputs[1] if len(outputs) == 2 else Output()

    def close(self) -> None:
        """Close what is open; safe to call twice."""
        self.close_theirs()
        if self._writer is not None:
            self._writer.close()
        for reader in self._readers:
            reader.close()


def exit_code_of(wait_status: int) -> int:
    """0..255; death by signal n is 128 + n."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def crowded(command: Command, duration_s: float) -> ExecResult:
    """What a shell would say of a program that it cannot fork for."""
    message = OutputBuffer(command.output_bytes_max)
    message.add(memoryview(CROWDED_MESSAGE))
    said = message.output()
    stdout, stderr = (said, Output()) if command.merge_stderr else (Output(), said)
    return ExecResult(exit_code=126, stdout=stdout, stderr=stderr, duration_s=duration_s)
