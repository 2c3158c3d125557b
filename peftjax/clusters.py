"""Where the processes of a run meet, how many there are and which one this is, as SLURM and Cloud TPU tell each of them."""

import dataclasses
import os
import re
import time
import urllib.error
import urllib.request
from typing import Callable, Mapping

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what a task is told
TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # either one, on a TPU node of Kubernetes
TPU_PORT = 8482  # the one that JAX itself takes there

Ask = Callable[[str], "str | None"]


@dataclasses.dataclass(frozen=True)
class Process:
    """The place of a process in a run.

    Attributes:
      coordinator: "host:port" of process 0.
      processes: how many there are.
      index: of this one, from 0.
      gpus: which of the machine are its own; None for all.
    """

    coordinator: str
    processes: int
    index: int
    gpus: list[int] | None = None


def find() -> Process | None:
    """The place of this process by its variables and, on a Cloud TPU machine, by what that tells; None elsewhere.

    Raises:
      ValueError: something told cannot be read.
    """
    if set(SLURM) <= set(os.environ):
        return slurm(os.environ)
    return cloud_tpu(os.environ, metadata)


def slurm(told: Mapping[str, str]) -> Process:
    """The place of a task of a SLURM job, by its variables.

    Of several tasks of a node each has one GPU, by its number there; a task that is alone on its node, or is shown one GPU
    only, has all that it sees. They meet on the first node, at a port that the job's number gives, above those that
    systems hand out.

    Raises:
      ValueError: a variable that cannot be read.

    Example:
      >>> job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-05,9],x1", "SLURM_NTASKS": "4"}
      >>> slurm(job | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"})
      Process(coordinator='gpu03:61447', processes=4, index=2, gpus=[0])
    """
    nodes = told["SLURM_STEP_NODELIST"]
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if first is None or not all(told[name].isdigit() for name in SLURM if name != "SLURM_STEP_NODELIST"):
        raise ValueError(
            f"SLURM says job {told['SLURM_JOB_ID']!r}, nodes {nodes!r}, task {told['SLURM_PROCID']!r} of "
            f"{told['SLURM_NTASKS']!r}, {told['SLURM_LOCALID']!r} on its node; expected numbers, and a list of nodes such "
            "as node[01-04]"
        )
    port = 2**16 - 2**12 + int(told["SLURM_JOB_ID"]) % 2**12
    host = "".join(x or "" for x in first.groups())
    alone = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", told.get("SLURM_STEP_TASKS_PER_NODE", ""))
    shown = [name for name in told.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = None if alone or len(shown) == 1 else [int(told["SLURM_LOCALID"])]
    return Process(f"{host}:{port}", int(told["SLURM_NTASKS"]), int(told["SLURM_PROCID"]), gpus)


def cloud_tpu(told: Mapping[str, str], ask: Ask) -> Process | None:
    """The place of a worker of Cloud TPU slices, which meet on the first worker of the first slice; None elsewhere.

    Args:
      told: its variables: on Kubernetes, they name the workers.
      ask: `ask(name)`, an attribute of the machine, or None: elsewhere, attributes do.

    Raises:
      ValueError: a list of workers, a number of slices or a number of the worker that cannot be read.

    Example:
      >>> cloud_tpu({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, lambda name: None)
      Process(coordinator='t0:8482', processes=2, index=1, gpus=None)
    """
    listed = next((told[name] for name in TPU_WORKERS if told.get(name)), None)
    on_nodes = listed is not None
    number = told.get("TPU_WORKER_ID") if on_nodes else ask("agent-worker-number")
    listed = listed if on_nodes else number and ask("worker-network-endpoints")
    if not listed:
        return None
    slices = told if on_nodes else _settings(ask("tpu-env") or "") | dict(told)
    # A worker is "host", "host:port" on Kubernetes, and "name:number:host" on older machines.
    hosts = [parts[2] if len(parts := worker.split(":")) == 3 else parts[0] for worker in listed.strip().split(",")]
    n, k = slices.get("MEGASCALE_NUM_SLICES") or "1", slices.get("MEGASCALE_SLICE_ID") or "0"
    if not all(hosts) or not all((x or "").strip().isdigit() for x in (number, n, k)):
        raise ValueError(
            f"Cloud TPU says worker {number!r} of {listed!r}, slice {k!r} of {n!r}; expected numbers, and a list of hosts"
        )
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    return Process(f"{first}:{TPU_PORT}", len(hosts) * int(n), int(str(number)) + int(k) * len(hosts))


def metadata(name: str, tries: int = 6) -> str | None:
    """An attribute of this machine of Google Cloud; None where there is none, and on other machines."""
    # JAX sets it where it sees no TPU, and Kubernetes where no machine is to be asked.
    if os.environ.get("TPU_SKIP_MDS_QUERY") is not None:
        return None
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is the machine's own
    for _ in range(tries):
        try:
            with direct.open(request, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:  # there is a server, and it may be busy
            if error.code < 500:
                return None
            time.sleep(0.5)
        except OSError:
            return None
    return None


def _settings(lines: str) -> dict[str, str]:
    """Those of an attribute, lines such as `NAME: 'value'`."""
    pairs = (line.partition(":") for line in lines.splitlines())
    return {name.strip(): value.strip().strip("'\"") for name, colon, value in pairs if colon}
