"""The processes of one launch: what each takes of the work, how results come together, and how all end alike.

Under `torchrun` or `accelerate launch` every process runs the same command. Before the work they compare what they
were started with; whatever one of them raises is raised in all, in their next exchange; and a process that is gone
closes its connections, which ends the others. Exchanges go through the CPU (gloo), whatever the model runs on.

In one process nothing of this is imported.
"""

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from foretune import errors
from foretune.errors import ForetuneError, ProcessError, reason, shown
from foretune.faults import fault_of_outside

if TYPE_CHECKING:
    import torch

JOIN = timedelta(minutes=10)  # until every process has come
WAIT = timedelta(hours=12)  # for one that works; one that is gone ends the wait at once
LAST_WORDS = timedelta(seconds=10)  # that the first process has to say what went wrong, before a launcher ends it
T = TypeVar("T")


class HandedOver(BaseException):
    """Raised in a process whose part of a piece of work is done: the rest is the first one's.

    No fault, so that nothing but `Processes.until_handed_over` takes it.
    """


@dataclass
class _Link:
    """What has become of the connection."""

    lost: bool = False  # an exchange was cut off: nothing can be said any more
    told: bool = False  # all have raised the same error


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; by default it is alone.

    Attributes:
        rank: Its number, 0 … world−1.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1
    _link: _Link = field(default_factory=_Link, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether it is the first one, which alone writes and prints."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Choose what this process takes of some pieces of work.

        The most expensive piece that is left goes to the process with the least to do, the first of them where several
        have as little: every process comes to the same shares.

        Args:
            costs: Of each piece, in any unit.

        Returns:
            Numbers of its pieces, rising; all of them in one process.

        Example:
            >>> [Processes(rank, 2).share([5, 1, 3, 3]) for rank in (0, 1)]
            [[0, 1], [2, 3]]
        """
        taken: list[int] = []
        loads = [(0.0, rank) for rank in range(self.world)]
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[piece], rank))
            if rank == self.rank:
                taken.append(piece)
        return sorted(taken)

    def progress(self, counts: Sequence[int], total: int) -> list[int]:
        """Say how far all are after each piece that this process has done: the others are taken to be as far.

        Args:
            counts: Examples in each of its pieces.
            total: Examples in the pieces of all.

        Returns:
            What each piece adds; the total in all, where it has any.

        Example:
            >>> Processes(0, 2).progress([4, 2], 12)
            [8, 4]
        """
        own = sum(counts)
        done = [total * before // own for before in accumulate(counts, initial=0)] if own else [0]
        return [after - before for before, after in pairwise(done)]

    def agree(self) -> None:
        """Wait for all processes, and find out whether one of them has failed.

        Raises:
            ForetuneError: What the first of them that failed raised.
        """
        if self.world > 1:
            self._compare(None)

    def collect(self, value: T, device: "torch.device | None" = None) -> list[T]:
        """Bring what each process has to the first one.

        Args:
            value: What this one has; its tensors keep their bits.
            device: Where tensors go that lay on a GPU.

        Returns:
            In the first process what each has, in their order; nothing in the others.

        Raises:
            ForetuneError: What another process raised meanwhile.
        """
        if self.world == 1:
            return [value]
        self.agree()
        with self._exchange():
            from torch import distributed

            from foretune.processes.parcels import fetch, post

            if not self.is_main:
                post(value, lambda part: distributed.send(part, 0))
                return []
            others: list[T] = []
            for source in range(1, self.world):
                others.append(fetch(lambda part, source=source: distributed.recv(part, source), device))  # type: ignore[misc]
            return [value, *others]

    def hand_over(self, value: T, device: "torch.device | None" = None) -> list[T]:
        """Bring what each process has to the first one, which goes on alone.

        Args:
            value: What this one has.
            device: As in `collect`.

        Returns:
            What each has.

        Raises:
            HandedOver: In all processes but the first.
            ForetuneError: What another process raised meanwhile.
        """
        collected = self.collect(value, device)
        if not self.is_main:
            raise HandedOver
        return collected

    @contextmanager
    def until_handed_over(self) -> Iterator[None]:
        """Do a piece of work, or this process's part of it.

        Yields:
            Nothing.
        """
        with suppress(HandedOver):
            yield

    def spread(self, value: T | None, device: "torch.device | None" = None, *, source: int = 0) -> T:
        """Give every process what one of them has.

        Args:
            value: In the source what it has; elsewhere it does not count.
            device: Where tensors go that lay on a GPU.
            source: Number of the process that has it.

        Returns:
            The source's value.

        Raises:
            ForetuneError: What another process raised meanwhile.
        """
        if self.world > 1:
            self.agree()
            with self._exchange():
                from torch import distributed

                from foretune.processes.parcels import fetch, post

                def move(part: "torch.Tensor") -> None:
                    distributed.broadcast(part, source)

                if self.rank == source:
                    post(value, move)
                else:
                    value = fetch(move, device)
        assert value is not None
        return value

    def _compare(self, own: Mapping[str, str] | None) -> None:
        """Exchange what went wrong, and raise the first of it."""
        from torch import distributed

        found: list[Any] = [None] * self.world
        with self._exchange():
            distributed.all_gather_object(found, own)
        for rank, fault in enumerate(found):
            if fault is not None:
                self._link.told = True
                if rank != self.rank:
                    raise getattr(errors, fault["kind"])(fault["message"])
                return

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._link.lost = True
            late = any(words in str(error).lower() for words in ("timed out", "timeout"))
            what = f"does not answer for {WAIT}" if late else "ended or was ended"
            raise ProcessError(
                f"process {self.rank} of {self.world} lost another one, which {what}: see what that one and the "
                "launcher said, and give the same command again"
            ) from error

    def _tell(self, error: BaseException) -> None:
        """Let the others raise what this process raises; what an earlier one raises is raised here."""
        if self._link.lost or self._link.told or not isinstance(error, Exception):
            return  # they know, or cannot be reached, or are interrupted themselves
        outside = fault_of_outside(error)
        if isinstance(error, ForetuneError):
            self._compare({"kind": type(error).__name__, "message": str(error)})
        elif outside is not None:
            self._compare({"kind": "ProcessError", "message": f"process {self.rank}: {outside}"})
        else:
            why = f"{type(error).__name__}: {reason(error)}"
            self._compare({"kind": "ProcessError", "message": f"process {self.rank} failed by a fault: {why}"})

    def _leave_last_words(self) -> None:
        """Stay until the first process is gone: launchers end what is left as soon as one process fails."""
        import torch

        if not self.is_main and not self._link.lost:
            with suppress(Exception):
                work = torch.distributed.irecv(torch.empty(1), 0)
                assert work is not None
                work.wait(LAST_WORDS)


ALONE = Processes()


def launched() -> tuple[int, int]:
    """Read what the launcher says of this process.

    Returns:
        Its number, and how many there are; (0, 1) without a launcher.

    Raises:
        ProcessError: If the environment contradicts itself.
    """
    given = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    remedy = "start all processes with torchrun or accelerate launch"
    for name, text in given.items():
        if not text.isascii() or not text.isdigit():
            raise ProcessError(f"{name} = {shown(text)} is no number of a process: {remedy}")
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= max(world, 1):
        raise ProcessError(f"RANK = {rank}, and WORLD_SIZE = {world}: {remedy}")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ProcessError(f"WORLD_SIZE = {world}, but MASTER_ADDR or MASTER_PORT is not set: {remedy}")
    return rank, max(world, 1)


@contextmanager
def together(statement: Callable[[], Mapping[str, object]]) -> Iterator[Processes]:
    """Do the work of one command in all processes that were launched for it.

    Args:
        statement: Gives what all must have alike by name, JSON-ready: versions and settings.

    Yields:
        This process among them.

    Raises:
        ProcessError: If they differ in that, or one does not come, or is lost.
        ForetuneError: What any of them raised.
    """
    rank, world = launched()
    if world == 1:
        yield ALONE
        return
    processes = _join(rank, world, statement())
    from torch import distributed

    try:
        yield processes
        processes.agree()  # the others wait for the first one: all end alike
    except BaseException as error:
        processes._tell(error)
        processes._leave_last_words()
        raise
    distributed.destroy_process_group()


def _join(rank: int, world: int, statement: Mapping[str, object]) -> Processes:
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    # torchrun serves the store itself, and numbers its restarts
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store: Any = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not served,
            timeout=JOIN,
            wait_for_workers=False,
        )
        store = PrefixStore(f"foretune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _compare_statements(store, rank, {"WORLD_SIZE": world, **statement})
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=WAIT)
    except ForetuneError:
        raise
    except Exception as error:
        minutes = int(JOIN.total_seconds() // 60)
        raise ProcessError(
            f"process {rank} of {world} could not meet the others at {place}: {reason(error)}; all have to start "
            f"within {minutes} minutes, with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    return Processes(rank, world)


def _compare_statements(store: Any, rank: int, statement: Mapping[str, object]) -> None:
    """Refuse processes that were not started alike, naming the first thing in which another differs from this one."""
    own = json.loads(json.dumps(statement, default=str))
    store.set(f"statement/{rank}", json.dumps(own))
    for other in range(own["WORLD_SIZE"]):
        theirs = json.loads(store.get(f"statement/{other}"))
        differing = next((name for name in own | theirs if own.get(name) != theirs.get(name)), None)
        if differing is None:
            continue
        store.set(f"read/{rank}", "")
        with suppress(Exception):  # it may be this process that serves the store
            store.wait([f"read/{other}"], LAST_WORDS)
        first, second = sorted([(rank, own), (other, theirs)], key=lambda one: one[0])
        raise ProcessError(
            f"process {first[0]} has {differing} = {shown(first[1].get(differing))} and process {second[0]} "
            f"{shown(second[1].get(differing))}: start every process with the same command and the same versions"
        )
    store.set(f"read/{rank}", "")
