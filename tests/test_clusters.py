"""What SLURM and Cloud TPU tell a process of its process in a run."""

import contextlib
import http.server
import threading

import pytest

from peftjax import clusters
from peftjax.clusters import Process, cloud_tpu, metadata, slurm

JOB = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "8"}
TASK = JOB | {"SLURM_PROCID": "7", "SLURM_LOCALID": "3"}
NODE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLICE = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first:8081"}
MACHINE = {"agent-worker-number": "1", "worker-network-endpoints": "a,b,c,d", "tpu-env": "ZONE: 'x'\nTYPE: 'v5'"}


@contextlib.contextmanager
def serving(attributes, busy=0):
    """A server of a machine's attributes, as Google Cloud has it, that is too busy to answer so many times."""
    left = [busy]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            if self.headers["Metadata-Flavor"] != "Google":
                self.send_error(403)
            elif left[0]:
                left[0] -= 1
                self.send_error(503)
            elif found is None:
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(found.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def on_machine(monkeypatch, server):
    """Makes this one a machine with TPUs, of which JAX has found none here."""
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", server)


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("n[001-015],h", "n001"),
        ("n[001,007-015],h", "n001"),
        ("n[3-4]-ib", "n3-ib"),
        ("a-b[3],c", "a-b3"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert slurm(TASK | {"SLURM_STEP_NODELIST": nodes}) == Process(f"{first}:61441", 8, 7, [3])


@pytest.mark.parametrize(
    "told,gpus",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8,1"}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, [3]),
    ],
)
def test_which_gpus_a_task_of_slurm_has(told, gpus):
    assert slurm(TASK | told).gpus == gpus


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_slurms_numbers_are_numbers(name):
    with pytest.raises(ValueError, match="'x'.*; expected numbers"):
        slurm(TASK | {name: "x"})


@pytest.mark.parametrize(
    "told,attributes,process",
    [
        (NODE, {}, Process("a:8482", 2, 1)),
        (NODE, MACHINE, Process("a:8482", 2, 1)),
        (NODE | {"TPU_PROCESS_ADDRESSES": "c:8476,d:8476,e:8476"}, {}, Process("c:8482", 3, 1)),
        (NODE | SLICE, {}, Process("first:8482", 6, 5)),
        ({}, MACHINE, Process("a:8482", 4, 1)),
        ({}, MACHINE | {"worker-network-endpoints": "w:0:10.0.0.1,w:1:10.0.0.2"}, Process("10.0.0.1:8482", 2, 1)),
        ({}, MACHINE | {"tpu-env": "".join(f"{k}: '{x}'\n" for k, x in SLICE.items())}, Process("first:8482", 12, 9)),
        (SLICE, MACHINE, Process("first:8482", 12, 9)),
        ({}, {"tpu-env": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": ""}, {}, None),
    ],
)
def test_cloud_tpu(told, attributes, process):
    assert cloud_tpu(told, attributes.get) == process


@pytest.mark.parametrize(
    "told,attributes",
    [
        (NODE | {"TPU_WORKER_ID": "one"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        (NODE | {"TPU_WORKER_HOSTNAMES": "a,,b"}, {}),
        (NODE | {"MEGASCALE_NUM_SLICES": "two"}, {}),
        ({}, MACHINE | {"agent-worker-number": "?"}),
    ],
)
def test_cloud_tpus_numbers_are_numbers(told, attributes):
    with pytest.raises(ValueError, match="Cloud TPU says worker .*; expected numbers, and a list of hosts"):
        cloud_tpu(told, attributes.get)


def test_a_machines_attributes_are_asked_for(monkeypatch):
    with serving(MACHINE, busy=2) as server:
        on_machine(monkeypatch, server)
        assert metadata("agent-worker-number") == "1" and metadata("other") is None
        assert clusters.find() == Process("a:8482", 4, 1)
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        assert metadata("agent-worker-number") is None and clusters.find() is None


def test_a_server_that_stays_busy_is_left(monkeypatch):
    with serving(MACHINE, busy=9) as server:
        on_machine(monkeypatch, server)
        assert metadata("agent-worker-number", tries=2) is None
    assert metadata("agent-worker-number") is None  # nobody is there now


def test_slurm_goes_first(monkeypatch):
    for name, value in (TASK | NODE).items():
        monkeypatch.setenv(name, value)
    assert clusters.find() == Process("node1:61441", 8, 7, [3])
