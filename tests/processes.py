"""Commands in processes of their own, to be stopped, killed and starved of memory or disk."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import pytest

HEAVY = [
    *("stages.training.training", "stages.evaluation.scoring", "fedcollm_cli.main", "scipy.io"),
    *("stages.distillation.studying", "stages.distillation.teaching", "stages.distillation.two_phases"),
]  # nothing of secagg, which has its randomness from the time of its import: see digests.hold_secrets_fixed
PATIENCE_S = 120.0
SECONDS_FOR_A_STEP = "SECONDS_FOR_A_STEP"
"""A variable of the environment with which training is slow: so long after each of an optimiser's steps."""

SLOWLY = {SECONDS_FOR_A_STEP: "0.03"}
"""For a command that is to be stopped in the middle: it must not end before a busy machine comes to look."""


@dataclass(frozen=True)
class Limits:
    """What befalls a command: see start."""

    file_bytes: int | None = None
    memory_bytes: int | None = None
    locks: Literal["real", "none", "of each machine"] = "real"
    stops_at: int | None = None


NO_LIMITS = Limits()


@dataclass
class Command:
    """A command at work, the end of the pipe that it talks into, and what was read from there."""

    process: ForkServerProcess
    output: Connection
    said: bytes = b""

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the command does while it is at work."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.is_alive(), f"ended too early: {self.end()}"
            assert time.monotonic() < deadline, "did not come to it"
            time.sleep(0.01)

    def wait_until_stopped(self) -> None:
        """Wait until it has stopped itself."""
        state = Path(f"/proc/{self.process.pid}/stat")
        self.wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def send(self, signal_number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal_number)

    def wait_until_said(self, words: str) -> None:
        """Wait until it has said this."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.said.decode():
            left = deadline - time.monotonic()
            assert left > 0, f"does not say it: {self.said.decode()}"
            if self.output.poll(left):
                more = os.read(self.output.fileno(), 1 << 16)
                assert more, f"ended too early: {self.said.decode()}"
                self.said += more

    def stop(self, signal_number: int) -> tuple[int, str]:
        """Send it a signal; then as end."""
        self.send(signal_number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Wait for its end: its exit code, or minus the signal that killed it, and what it said."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0 and self.output.poll(left):
            if not (more := os.read(self.output.fileno(), 1 << 16)):
                break
            self.said += more
        self.process.join(max(1.0, deadline - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"does not end: {self.said.decode()}")
        return self.process.exitcode, self.said.decode()


def start(
    *words: object,
    file_bytes: int | None = None,
    memory_bytes: int | None = None,
    locks: Literal["real", "none", "of each machine"] = "real",
    stops_at: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Begin a command; file_bytes: the largest file it may write; memory_bytes: how much more than it has at first.

    locks: those of its file system; "of each machine" are granted to processes on different ones at once. stops_at: the
    fsync before which it stops (SIGSTOP), in the middle of writing something down.

    The libraries are imported once, in a server that forks: a command begins in milliseconds and is a process like any.
    """
    output, talk = multiprocessing.Pipe(duplex=False)
    limits = Limits(file_bytes, memory_bytes, locks, stops_at)
    process = begin(words, talk, environment=environment, limits=limits)
    talk.close()
    return Command(process, output)


def begin(
    words: Sequence[object],
    out: Connection,
    *,
    err: Connection | None = None,
    folder: str = "",
    environment: Mapping[str, str] | None = None,
    limits: Limits = NO_LIMITS,
) -> ForkServerProcess:
    """Begin a command that talks into these pipes, or files; default: both streams into the same."""
    arguments = [str(word) for word in words], out, err or out, folder, dict(environment or {}), limits
    process = _context().Process(target=_call, args=arguments)
    process.start()
    return process


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def start_together(count: int, *words: object, environment: Mapping[str, str] | None = None) -> list[Command]:
    """Begin a command as so many processes, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= environment or {}
    return [
        start(*words, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)})
        for rank in range(count)
    ]


def call_together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a module's function(processes, *arguments) gives in each of so many processes that have met."""
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        started = [
            context.Process(target=_meet, args=(rank, count, f"file://{folder}/store", talk, function, arguments))
            for rank, (_, talk) in enumerate(pipes)
        ]
        for process in started:
            process.start()
        for _, talk in pipes:
            talk.close()
        try:
            assert all(output.poll(PATIENCE_S) for output, _ in pipes), "do not end"
            return [output.recv() for output, _ in pipes]
        finally:
            for process in started:
                process.join(1.0)
                process.kill()


def _meet(
    rank: int, count: int, address: str, talk: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    from stages.runtime import processes

    gc.freeze()  # what the server has imported is not looked through in each of its children
    torch.set_num_threads(1)
    talk.send(function(processes.join(rank, count, local_rank=rank, device="cpu", address=address), *arguments))


def _call(
    words: list[str], out: Connection, err: Connection, folder: str, environment: dict[str, str], limits: Limits
) -> None:
    gc.freeze()  # what the server has imported is not looked through in each of its children
    os.environ.update(environment)
    if folder:
        os.chdir(folder)
    for stream, talk in ((1, out), (2, err)):
        os.dup2(talk.fileno(), stream)
    out.close()
    err.close()
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if limits.memory_bytes is not None or environment:
        import torch

        torch.set_num_threads(1)  # threads that cannot get a stack would end the process before memory runs out
    if limits.memory_bytes is not None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + limits.memory_bytes, held + limits.memory_bytes))
    if limits.stops_at is not None:
        _stop_at(limits.stops_at)
    if limits.locks != "real":
        from storage_faults import without_locks

        without_locks(pytest.MonkeyPatch(), errno.ENOLCK if limits.locks == "none" else None)
    if slow := environment.get(SECONDS_FOR_A_STEP):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: time.sleep(float(slow)))
    from fedcollm_cli.main import app

    app(words)


def _stop_at(which: int) -> None:
    calls, real = iter(range(1, 1000)), os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == which:
            os.kill(os.getpid(), signal.SIGSTOP)
        real(descriptor)

    os.fsync = fsync
