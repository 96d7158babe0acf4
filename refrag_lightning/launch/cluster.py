"""BatchEnvironment: ranks and addresses of a multi-node AWS Batch job, for Lightning.

AWS Batch starts one container a node with the same command, and says by variables which node it is:

    AWS_BATCH_JOB_NUM_NODES                     how many nodes there are
    AWS_BATCH_JOB_NODE_INDEX                    this node, from 0
    AWS_BATCH_JOB_MAIN_NODE_INDEX               the main node, whose end is the job's end
    AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS    the main node's address, on the others only

Lightning starts a node's further processes, one a device, by running the command again. The port at
which the processes meet is fixed, so that nobody need be told: 29500, or `REFRAG_MAIN_PORT`.
(AWS Batch User Guide, "Multi-node parallel jobs": environment variables.)
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

NUM_NODES = "AWS_BATCH_JOB_NUM_NODES"
NODE_INDEX = "AWS_BATCH_JOB_NODE_INDEX"
MAIN_INDEX = "AWS_BATCH_JOB_MAIN_NODE_INDEX"
MAIN_ADDRESS = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"
PORT = "REFRAG_MAIN_PORT"
DEFAULT_PORT = 29500

_SIOCGIFADDR = 0x8915
# Of the block for documentation (RFC 5737): asked for the way there, the system names the interface
# that leads out. Nothing is sent.
_OUTSIDE = "192.0.2.1"


class BatchEnvironment(ClusterEnvironment):
    """Where this process stands in a multi-node AWS Batch job.

    The main node gets node rank 0, whatever its index is; the others follow in their order.

    Args:
        variables: The process's variables; its own if None.

    Attributes:
        num_nodes: Nodes of the job.

    Raises:
        ValueError: If a variable is missing, or is not what AWS Batch sets.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._variables = os.environ if variables is None else variables
        self.num_nodes = self._number(NUM_NODES, least=1)
        self._node_index = self._number(NODE_INDEX)
        self._main_index = self._number(MAIN_INDEX)
        for name, index in ((NODE_INDEX, self._node_index), (MAIN_INDEX, self._main_index)):
            if index >= self.num_nodes:
                raise ValueError(f"{name} ({index}) must be below {NUM_NODES} ({self.num_nodes})")
        if not self.is_main and not self._variables.get(MAIN_ADDRESS):
            raise ValueError(
                f"{MAIN_ADDRESS} is not set on node {self._node_index}, which is not the main node "
                f"({self._main_index})"
            )
        self._port = self._number(PORT, least=1) if PORT in self._variables else DEFAULT_PORT
        self._global_rank = 0
        self._world_size = 1

    def _number(self, name: str, *, least: int = 0) -> int:
        text = self._variables.get(name, "")
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{name} ({text!r}) must be a whole number from {least} on")
        return int(text)

    @property
    def is_main(self) -> bool:
        """Whether this is the main node."""
        return self._node_index == self._main_index

    @staticmethod
    def detect() -> bool:
        """Whether this is a node of a multi-node AWS Batch job."""
        return NUM_NODES in os.environ

    @property
    def creates_processes_externally(self) -> bool:
        """False on a node's first process: Lightning starts the others."""
        return "LOCAL_RANK" in self._variables

    @property
    def main_address(self) -> str:
        """The main node's address; on itself its own, which no variable holds."""
        if self.is_main:
            # The process that the others look for listens on every interface.
            return own_address(_OUTSIDE) or "127.0.0.1"
        return self._variables[MAIN_ADDRESS]

    @property
    def main_port(self) -> int:
        """The port on the main node."""
        return self._port

    def interface(self) -> str | None:
        """The network interface that leads to the other nodes; None if it cannot be told."""
        address = own_address(_OUTSIDE if self.is_main else self.main_address)
        return None if address is None else interface_of(address)

    def node_rank(self) -> int:
        """This node's number: 0 for the main node."""
        if self.is_main:
            return 0
        return self._node_index + (self._node_index < self._main_index)

    def local_rank(self) -> int:
        """This process's number on its node, which Lightning sets on those that it starts."""
        return int(self._variables.get("LOCAL_RANK", 0))

    def world_size(self) -> int:
        """Processes of all nodes."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Takes the number that Lightning worked out."""
        self._world_size = size

    def global_rank(self) -> int:
        """This process's number among those of all nodes."""
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        """Takes the number that Lightning worked out."""
        self._global_rank = rank
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuses another number of nodes than the job has.

        Raises:
            ValueError: If `num_nodes` is not the job's.
        """
        check_num_nodes(num_nodes, self.num_nodes)


def plug_in(trainer: dict[str, Any]) -> dict[str, Any]:
    """The trainer's settings with those of the AWS Batch job that this process belongs to.

    Outside of a multi-node job they stay as they are, and so do those with a cluster environment of
    their own. `num_nodes` is set where it is 1; `devices` is all that there are unless it was set.

    Args:
        trainer: Arguments of Lightning's Trainer.

    Raises:
        ValueError: If `num_nodes` is another number than the job's, or a variable is wrong.
    """
    plugins = trainer.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if not BatchEnvironment.detect() or any(isinstance(p, ClusterEnvironment) for p in plugins):
        _not_first(int(os.environ.get("NODE_RANK", 0)))
        return trainer
    environment = BatchEnvironment()
    if trainer.get("num_nodes") not in (None, 1):
        check_num_nodes(trainer["num_nodes"], environment.num_nodes)
    _not_first(environment.node_rank())
    interface = environment.interface()
    if interface is not None:
        # Gloo would take the address that the host's name stands for, which may be 127.0.0.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return trainer | {"num_nodes": environment.num_nodes, "plugins": [*plugins, environment]}


def _not_first(node_rank: int) -> None:
    """Notes that a further node's processes are not the first rank.

    Lightning knows the rank only when the trainer starts; files are made before.
    """
    if node_rank > 0:
        rank_zero_only.rank = node_rank  # type: ignore[attr-defined]


def check_num_nodes(given: int, num_nodes: int) -> None:
    """Raises a ValueError where a run has another number of nodes than its job."""
    if given != num_nodes:
        raise ValueError(
            f"trainer.num_nodes ({given}) is not the {num_nodes} node(s) of the AWS Batch job: "
            "leave it out"
        )


def own_address(towards: str) -> str | None:
    """This machine's IPv4 address on the way to another; None if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it settles the route.
            probe.connect((towards, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address of this machine; None off Linux."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
