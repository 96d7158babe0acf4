"""The nodes of an AWS Batch job: ranks and addresses by its variables, and two that meet."""

import re
import socket

import pytest

from refrag_lightning.launch.cluster import (
    DEFAULT_PORT,
    MAIN_ADDRESS,
    MAIN_INDEX,
    NODE_INDEX,
    NUM_NODES,
    PORT,
    BatchEnvironment,
    interface_of,
    own_address,
    plug_in,
)
from tests.training.ranks import start


def variables(node, *, main=0, num_nodes=4, address="10.0.0.7"):
    """What AWS Batch sets on a node: the main node's address everywhere but on itself."""
    values = {NUM_NODES: str(num_nodes), NODE_INDEX: str(node), MAIN_INDEX: str(main)}
    return values if node == main else values | {MAIN_ADDRESS: address}


@pytest.mark.parametrize("main", range(4))
def test_the_main_node_has_rank_0_and_the_others_follow(main):
    ranks = [BatchEnvironment(variables(node, main=main)).node_rank() for node in range(4)]
    assert ranks[main] == 0
    assert [ranks[node] for node in range(4) if node != main] == [1, 2, 3]


def test_addresses_ports_and_local_ranks():
    child, main = BatchEnvironment(variables(2)), BatchEnvironment(variables(0))
    assert child.main_address == "10.0.0.7"
    # No variable has it on the main node: an address of this machine, which one can listen at.
    with socket.socket() as probe:
        probe.bind((main.main_address, 0))
    assert child.main_port == main.main_port == DEFAULT_PORT == 29500
    assert BatchEnvironment(variables(2) | {PORT: "1234"}).main_port == 1234
    assert not child.creates_processes_externally and child.local_rank() == 0
    started = BatchEnvironment(variables(2) | {"LOCAL_RANK": "3"})
    assert started.creates_processes_externally and started.local_rank() == 3


def test_the_interface_that_leads_to_an_address():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert BatchEnvironment(variables(2, address="127.0.0.1")).interface() == "lo"
    assert interface_of("192.0.2.77") is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({NUM_NODES: "two"}, r"AWS_BATCH_JOB_NUM_NODES \('two'\) must be a whole number from 1 on"),
        ({NUM_NODES: "0"}, r"AWS_BATCH_JOB_NUM_NODES \('0'\)"),
        ({NODE_INDEX: ""}, r"AWS_BATCH_JOB_NODE_INDEX \(''\) must be a whole number from 0 on"),
        ({NODE_INDEX: "4"}, r"NODE_INDEX \(4\) must be below AWS_BATCH_JOB_NUM_NODES \(4\)"),
        ({MAIN_INDEX: "7"}, r"MAIN_NODE_INDEX \(7\) must be below"),
        ({MAIN_ADDRESS: ""}, r"PRIVATE_IPV4_ADDRESS is not set on node 2, .* main node \(0\)"),
        ({PORT: "no"}, r"REFRAG_MAIN_PORT \('no'\)"),
    ],
)
def test_wrong_variables_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        BatchEnvironment(variables(2) | changed)


def test_a_trainer_gets_the_nodes_of_the_job(monkeypatch):
    settings = {"num_nodes": 1, "plugins": None, "devices": "auto"}
    assert plug_in(settings) == settings
    for name, value in variables(0, num_nodes=3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    plugged = plug_in(settings)
    assert plugged["num_nodes"] == 3 and plugged["devices"] == "auto"
    (environment,) = plugged["plugins"]
    assert isinstance(environment, BatchEnvironment)
    with pytest.raises(ValueError, match=r"trainer.num_nodes \(2\) is not the 3 node\(s\) of the"):
        plug_in(settings | {"num_nodes": 2})
    own = settings | {"plugins": [environment], "num_nodes": 2}
    assert plug_in(own) is own


@pytest.mark.slow
def test_two_nodes_of_two_processes_meet(tmp_path):
    """On this machine, with the variables that AWS Batch sets; the main node has the index 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["-m", "refrag_lightning", "hello", "--trainer.devices=2"]
    command += ["--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    nodes = [
        start(
            command,
            cwd=tmp_path,
            **variables(node, main=1, num_nodes=2, address="127.0.0.1"),
            REFRAG_MAIN_PORT=port,
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    pattern = r"^hello from rank (\d) \(local rank (\d), node (\d)\)"
    found = [sorted(re.findall(pattern, output, re.M)) for output in outputs]
    # The node with the index 1 is the main one, so it has the first ranks.
    assert found == [[("2", "0", "1"), ("3", "1", "1")], [("0", "0", "0"), ("1", "1", "0")]]
    assert "topology: 2 node(s), 4 process(es)" in outputs[1]
    # 1 + 2 + 3 + 4; every rank compares.
    assert "the all-reduce of rank + 1 is 10" in outputs[1]
    assert "topology" not in outputs[0] and "run folder" not in outputs[0]
    assert len(list((tmp_path / "runs" / "hello").iterdir())) == 1
