"""The processes that do one stage together, as torchrun starts them: one for each GPU, or several on CPUs.

All call the same stage. The first alone decides, reads and writes markers, locks, logs and artefacts, and reports; the
others hear from it what to compute, and compute it together. Whichever fails first says why, and all end alike.
"""

from __future__ import annotations

import contextlib
import datetime
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from stages.runtime.errors import INTERRUPTED_EXIT_CODE, Problem, UsageProblem

T = TypeVar("T")
ENDED = "ended"
POLLED_EVERY_S = 0.05
LEFT_WITHIN_S, FAILED_WITHIN_S = 10.0, 2.0
LONGEST_COMPUTATION = datetime.timedelta(minutes=30)
"""How long one process may wait for another within a computation; for the first one's decisions there is no limit."""


class Processes:
    """One process among all that do a stage together; alone if nothing else is said.

    store: what they talk through between computations. device: "cpu" or "cuda", where they compute.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, store: Any = None, device: str = "cpu") -> None:
        self.rank, self.count, self.device = rank, count, device
        self._store, self._decisions = store, 0

    @property
    def is_first(self) -> bool:
        """Whether this one decides, writes and reports."""
        return self.rank == 0

    def agree(self, value: Any = None) -> Any:
        """What the first one gives, however long that takes; what the others give is ignored.

        Where the first has ended instead, so do the others.
        """
        if self.count > 1:
            import torch.distributed as dist

            self._decisions += 1
            if self.is_first:
                self._store.set(f"decision-{self._decisions}", "made")
            while not self._store.check([f"decision-{self._decisions}"]):
                if self._store.check([ENDED]):
                    self._end_as_told()
                time.sleep(POLLED_EVERY_S)
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each value over the processes, to all."""
        if self.count == 1:
            return dict(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """What each process gives, in their order, to all."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait_for_all(self) -> None:
        """Go on when all have come here."""
        self.total({"here": 1.0})

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """While inside, the failure of one process is that of all: it alone says why, and each has its exit code."""
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        try:
            yield
            self._wait_for_the_first()
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, because another was quicker to end
            code = error.exit_code if isinstance(error, Problem) else 1
            code = INTERRUPTED_EXIT_CODE if isinstance(error, KeyboardInterrupt) else code
            if isinstance(error, SystemExit) or not self._ends_first(code):
                self._end_as_told()
            self._leave(within_s=FAILED_WITHIN_S)
            if _is_lost_connection(error):
                raise KeyboardInterrupt(
                    "another process of this stage was killed: the same command goes on from its last checkpoint"
                ) from error
            raise
        self._ends_first(0)
        self._leave(within_s=LEFT_WITHIN_S)
        dist.destroy_process_group()

    def _wait_for_the_first(self) -> None:
        """Whoever helped ends as the first does, which may have more to do alone, and may fail at it."""
        if self.is_first:
            return
        while not self._store.check([ENDED]):
            time.sleep(POLLED_EVERY_S)
        if self._code() != 0:
            self._end_as_told()

    def _ends_first(self, code: int) -> bool:
        own = f"{code} {self.rank}"
        try:
            return bool(self._store.compare_set(ENDED, "", own).decode() == own)
        except RuntimeError:  # the one that held the store was killed
            return True

    def _end_as_told(self) -> NoReturn:
        """End with the exit code of the process that ended first."""
        code = 1
        with contextlib.suppress(RuntimeError):
            code = self._code()
            self._store.add("left", 1)
        raise SystemExit(code)

    def _code(self) -> int:
        """The exit code of the process that ended first."""
        return int(self._store.get(ENDED).decode().split()[0])

    def _leave(self, within_s: float) -> None:
        """The first, which may hold the store, waits a little for the others to have read how it ended."""
        with contextlib.suppress(RuntimeError):
            left, deadline = self._store.add("left", 1), time.monotonic() + within_s
            while self.is_first and left < self.count and time.monotonic() < deadline:
                time.sleep(POLLED_EVERY_S)
                left = self._store.add("left", 0)


ALONE = Processes()


def join(rank: int, count: int, *, local_rank: int, device: str, address: str = "env://") -> Processes:
    """Meet the other processes; from now on this one has the GPU of its number on this machine.

    device: as in machine.toml. address: where they meet, for torch.distributed. Raises UsageProblem where there are
    fewer GPUs than processes.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]
    if kind == "cuda":
        visible = torch.cuda.device_count()
        if visible != 1 and local_rank >= visible:
            mend = "start no more processes on each machine than it has GPUs: --nproc-per-node"
            raise UsageProblem(f"process {rank} needs a GPU of its own; {visible} are here", mend=mend)
        torch.cuda.set_device(local_rank % visible)  # the only one, where Slurm shows each process its own
    elif kind != "cpu":
        raise UsageProblem(f"several processes cannot share the device {device}", mend="give --device cpu")
    store, rank, count = next(rendezvous(address, rank, count, timeout=LONGEST_COMPUTATION))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=PrefixStore("computations", store),
        rank=rank,
        world_size=count,
        timeout=LONGEST_COMPUTATION,
    )
    return Processes(rank, count, store=PrefixStore("decisions", store), device=kind)


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
