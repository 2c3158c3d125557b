"""Joining the processes of one run: a roll call that says who is missing, then `jax.distributed`."""

import contextlib
import json
import socket
import time
from typing import Any, Iterator

import jax

from peftjax import clusters


def join(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None, *, timeout: float = 300
) -> None:
    """Joins this process to the others of a run; to be called before anything else of JAX is.

    Args:
      coordinator: "host:port" of process 0, reachable by all. None takes all three from SLURM, whose tasks are given one
        GPU of their node each, or from Cloud TPU; elsewhere JAX finds out by itself what it can (MPI, Kubernetes), and
        there is no roll call. `processes` and `index` are then None, too.
      processes: how many there are.
      index: of this one, from 0.
      timeout: seconds within which all have to be there.

    Raises:
      TimeoutError: not all came; says which did not.
      ValueError: an index that is not there, or that two processes have; two that were told different numbers of
        processes; a coordinator that is no "host:port"; what SLURM or Cloud TPU tells cannot be read.
      OSError: process 0 cannot listen at the port.
      RuntimeError: from JAX, which has computed something already, or has joined.

    Example, the first lines of a script that runs on two machines, here on the first:
      >>> from peftjax.processes import join
      >>> join("node0:1234", processes=2, index=0)  # doctest: +SKIP
      >>> join("node0", processes=2, index=0)
      Traceback (most recent call last):
      ...
      ValueError: coordinator 'node0': expected host:port of process 0, the port from 1 to 65535
    """
    gpus: list[int] | None = None  # all of the machine
    if coordinator is None:
        if (found := clusters.find()) is None:
            jax.distributed.initialize(initialization_timeout=int(timeout))
            return
        coordinator, processes, index, gpus = found.coordinator, found.processes, found.index, found.gpus
    if processes is None or index is None or not 0 <= index < processes:
        raise ValueError(f"process {index} of {processes}: expected a number of processes, and an index below it")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator {coordinator!r}: expected host:port of process 0, the port from 1 to 65535")
    address = host, int(port)
    answer = _call(address, processes, timeout) if index == 0 else _report(address, processes, index, timeout)
    if answer["missing"]:
        missing = ", ".join(map(str, answer["missing"]))
        raise TimeoutError(f"of {processes} processes, {missing} did not join at {coordinator} within {timeout:.0f} s")
    if answer["wrong"] is not None:
        raise ValueError(f"at {coordinator}, {answer['wrong']}")
    # All are there; JAX's own service takes over the port. What is late now is that service, not a process. All is said:
    # what JAX would find out by itself under SLURM is one GPU a process, even for one that is alone on its node.
    late = int(max(60, timeout))
    jax.distributed.initialize(coordinator, processes, index, gpus, "deactivate", initialization_timeout=late)


def _call(address: tuple[str, int], processes: int, timeout: float) -> dict[str, Any]:
    """Process 0 waits for the others to report, and tells them who is missing."""
    end, met, lines, wrong = time.monotonic() + timeout, set[int](), list[socket.socket](), None
    with socket.create_server(("", address[1]), reuse_port=False) as server:
        while len(met) < processes - 1 and wrong is None and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
                line.settimeout(5)
                index, count = map(int, line.makefile().readline().split())
            except (TimeoutError, ValueError, OSError):
                continue
            wrong = _wrong(index, count, processes, met)
            met.add(index)
            lines.append(line)
        absent = [k for k in range(1, processes) if k not in met] if wrong is None else []
        answer = {"missing": absent, "wrong": wrong}
        for line in lines:
            with line, contextlib.suppress(OSError):
                line.sendall(json.dumps(answer).encode() + b"\n")
    return answer


def _wrong(index: int, count: int, processes: int, met: set[int]) -> str | None:
    """Why a process that says this of itself is none of the run, or None."""
    if count != processes:
        return f"process {index} of {count} joined a run of {processes}: expected the same number everywhere"
    return f"two processes joined as number {index}" if index in met else None


def _report(address: tuple[str, int], processes: int, index: int, timeout: float) -> dict[str, Any]:
    """Another process reports to process 0, and hears who is missing."""
    for line in _tries(address, time.monotonic() + timeout):
        with line, contextlib.suppress(OSError):  # a server that closes before it answers is asked again
            line.settimeout(timeout + 30)
            line.sendall(f"{index} {processes}\n".encode())
            if answer := line.makefile().readline():
                return json.loads(answer)
    return {"missing": [0], "wrong": None}


def _tries(address: tuple[str, int], end: float) -> Iterator[socket.socket]:
    while time.monotonic() < end:
        try:
            yield socket.create_connection(address, timeout=5)
        except OSError:
            time.sleep(0.2)
