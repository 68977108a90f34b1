"""Start the ranks of a job and move tensors between them (interface: openai/guided-diffusion, dist_util.py).

    mpiexec -n 8 python script.py      MPICH or Open MPI; mpi4py only tells the ranks where to meet
    torchrun --nproc_per_node 8 script.py
    python script.py                   one process; mpi4py is not even imported

All three end in one torch.distributed group, NCCL on GPUs and gloo on CPUs, which then moves all the data.
"""

import atexit
import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch as th
import torch.distributed as dist

from . import checkpoint_util, errors, logger
from .errors import UserError

# Assumed by upstream for every node. Here only the limit for a launcher that does not tell the local rank.
GPUS_PER_NODE = 8

# How often the first rank tries another port when somebody else took the one it had found.
SETUP_RETRY_COUNT = 3

# Rank 0 has this long (seconds) to report an error that all ranks share, so that it is printed once.
ERROR_GRACE = 1.0

_MPI_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its job, and the store where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this host
    local_size: int  # number of ranks on this host
    oversubscribed: bool  # some host has fewer GPUs than ranks
    store: dist.Store


_launch: Launch | None = None


def setup_dist() -> None:
    """Join the process group of this job. Does nothing where one exists already.

    Raises UserError where mpiexec started several ranks but mpi4py cannot reach them.
    """
    global _launch
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        _launch = _from_torchrun()
    elif (mpi := _import_mpi()) is not None and mpi.COMM_WORLD.Get_size() > 1:
        _launch = _from_mpi(mpi.COMM_WORLD)
    else:
        _launch = Launch(0, 1, 0, 1, oversubscribed=False, store=dist.HashStore())

    if _launch.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Every rank would otherwise start one thread per core, and they would wait for each other.
        th.set_num_threads(max(1, _cores() // _launch.local_size))
    if th.cuda.is_available():
        th.cuda.set_device(dev())
    # NCCL refuses two ranks on one GPU; gloo is slow there but works.
    nccl = th.cuda.is_available() and dist.is_nccl_available() and not _launch.oversubscribed
    dist.init_process_group(
        backend="nccl" if nccl else "gloo",
        store=_launch.store,
        rank=_launch.rank,
        world_size=_launch.world_size,
        device_id=dev() if nccl else None,
    )
    atexit.register(_leave)
    if _launch.world_size > 1:
        _end_job_on_exception()


def dev() -> th.device:
    """The device of this rank: its GPU where there is one, else the CPU."""
    if not th.cuda.is_available():
        return th.device("cpu")
    # Another program (Lightning) may have made the group.
    local_rank = _launch.local_rank if _launch is not None else int(os.environ.get("LOCAL_RANK", 0))
    return th.device("cuda", local_rank % th.cuda.device_count())


def get_rank() -> int:
    """This process's rank; 0 before `setup_dist`."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of ranks; 1 before `setup_dist`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if get_world_size() > 1:
        dist.barrier()


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every rank."""
    made = [make() if get_rank() == 0 else None]
    if get_world_size() > 1:
        dist.broadcast_object_list(made, device=dev())
    return made[0]


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Read a checkpoint from a local path or any other that blobfile knows; see `checkpoint_util.read`.

    Every rank reads the file by itself, so it may be called by all ranks or by some: upstream's own
    training scripts call it on rank 0 alone, where a broadcast would wait for the others for ever.
    """
    return checkpoint_util.read(path, **kwargs)


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Give every rank rank 0's values of these tensors, in place."""
    if get_world_size() == 1:
        return
    with th.no_grad():
        for param in params:
            value = param.detach().contiguous()  # the wire knows no channels_last
            dist.broadcast(value, 0)
            if value.data_ptr() != param.data_ptr():
                param.copy_(value)


def end_all_ranks(code: int) -> None:
    """End the whole job with exit code `code`, whatever the other ranks are waiting for.

    With one rank it does nothing: the caller leaves as usual. With several, leaving as usual would hang:
    MPI's own farewell waits for every rank, and the others wait for this one. A rank that dies without it
    ends the job.
    """
    if not _many_ranks():
        return
    _join_mpi()
    for child in multiprocessing.active_children():
        child.terminate()  # data workers, which would outlive a parent that dies like this
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_rank_zero_to_fail() -> None:
    """Most mistakes hit all ranks at once: let rank 0 be the one that reports and ends the job."""
    if _many_ranks() and logger.get_rank_without_mpi_import() > 0:
        _join_mpi()
        time.sleep(ERROR_GRACE)


def _end_job(report: Callable[[], None], code: int) -> None:
    wait_for_rank_zero_to_fail()
    report()
    end_all_ranks(code)
    sys.exit(code)


errors.end_job = _end_job


def _find_free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _from_torchrun() -> Launch:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank % GPUS_PER_NODE))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    # Every rank tells how many GPUs it sees, since all must choose the same backend.
    store.set(f"oversubscribed/{rank}", str(int(local_size > th.cuda.device_count())))
    oversubscribed = any(int(store.get(f"oversubscribed/{r}")) for r in range(world_size))
    return Launch(rank, world_size, local_rank, local_size, oversubscribed, store)


def _from_mpi(comm: Any) -> Launch:
    rank, world_size = comm.Get_rank(), comm.Get_size()
    hosts: list[tuple[str, int]] = comm.allgather((socket.gethostname(), th.cuda.device_count()))
    names = [name for name, _ in hosts]
    if rank == 0:
        address = "127.0.0.1" if len(set(names)) == 1 else _reachable_address()
        store = _open_store(address, world_size)
        comm.bcast((address, store.port), root=0)
    else:
        address, port = comm.bcast(None, root=0)
        store = dist.TCPStore(address, port, world_size, is_master=False)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=names[:rank].count(names[rank]),
        local_size=names.count(names[rank]),
        oversubscribed=any(names.count(name) > gpus for name, gpus in hosts),
        store=store,
    )


def _open_store(address: str, world_size: int) -> dist.TCPStore:
    """The store of rank 0, listening before the others are told of it."""
    for attempt in range(SETUP_RETRY_COUNT):
        try:
            return dist.TCPStore(
                address, _find_free_port(), world_size, is_master=True, wait_for_workers=False
            )
        except RuntimeError:  # the port was taken in the meantime
            if attempt == SETUP_RETRY_COUNT - 1:
                raise
    raise AssertionError("SETUP_RETRY_COUNT must be positive")


def _reachable_address() -> str:
    """How the other hosts find this one. A loopback address (/etc/hosts often has one) is no use."""
    name = socket.getfqdn()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if address.startswith("127.") else address


def _import_mpi() -> ModuleType | None:
    """mpi4py's MPI where mpiexec started several ranks, else None.

    Raises UserError where mpi4py is missing or talks to another MPI library than mpiexec's.
    """
    sizes = [int(os.environ[name]) for name in _MPI_SIZE_VARIABLES if name in os.environ]
    if sizes == [1] or (not sizes and "PMIX_RANK" not in os.environ):
        return None
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        os.environ.setdefault(
            "MPI4PY_MPIABI", "openmpi"
        )  # mpi4py's wheels pick MPICH where both are installed
    try:
        from mpi4py import MPI
    except (ImportError, OSError, RuntimeError) as error:
        if not sizes:
            return None
        raise UserError(
            f"mpiexec started {sizes[0]} ranks, but mpi4py cannot be loaded ({error}); "
            "install mpi4py and the MPI library of this mpiexec, or start with torchrun"
        ) from error
    if sizes and MPI.COMM_WORLD.Get_size() != sizes[0]:
        raise UserError(
            f"mpiexec started {sizes[0]} ranks, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: it uses another "
            f"MPI library ({MPI.Get_library_version().splitlines()[0].split(',')[0]}); "
            "use that library's mpiexec, or torchrun"
        )
    return MPI


def _join_mpi() -> None:
    """mpiexec ends the job when a rank dies that has joined it; one that has not is taken to be done."""
    with contextlib.suppress(UserError):
        _import_mpi()


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _many_ranks() -> bool:
    """Whether this process is one of several, also before `setup_dist`."""
    if _launch is not None:
        return _launch.world_size > 1
    return any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", *_MPI_SIZE_VARIABLES))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_job_on_exception() -> None:
    """Let an uncaught exception of this rank end the job after its traceback: the others would wait."""
    report = sys.excepthook

    def report_and_end(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        report(kind, value, trace)
        end_all_ranks(1)

    sys.excepthook = report_and_end
