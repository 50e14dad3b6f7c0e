"""A cluster in a data folder: how it is laid out, configured and formatted."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import shutil
import socket
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from kafka_install import Install
from kafka_node import Node
from kafka_secrets import USER, Secrets, write_private

PLAIN, SASL = "PLAINTEXT", "SASL_SSL"
# Below the ports that the system hands to outgoing connections: a broker that is down must find its port free again.
FREE_PORTS = range(20_000, 30_000)
# A folder with this file was made here, and may be emptied when it was left half made.
MARK = "made-by-ops-kafka"
# Held by whoever makes the cluster or starts brokers of it.
LOCK = ".lock"
SASL_MODULES = "org.apache.kafka.common.security"


class Failure(Exception):
    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Listener:
    """An address of every broker: the first takes `port`, the next ones those after it."""

    protocol: str
    host: str
    port: int


@dataclass(frozen=True)
class Broker:
    id: int
    controller_port: int
    listeners: list[Listener]

    def listener(self, protocol: str) -> Listener | None:
        return next((listener for listener in self.listeners if listener.protocol == protocol), None)


@dataclass(frozen=True)
class Cluster:
    folder: Path
    id: str
    brokers: list[Broker]

    def node(self, broker: Broker) -> Node:
        return Node(broker.id, self.folder)

    @property
    def secrets(self) -> Secrets:
        return Secrets(self.folder / "tls")

    def bootstrap(self, protocol: str) -> str | None:
        """The addresses of this protocol as clients want them; None when the cluster does not have it."""
        listeners = [broker.listener(protocol) for broker in self.brokers]
        return ",".join(f"{it.host}:{it.port}" for it in listeners if it is not None) or None

    def protocols(self) -> set[str]:
        return {listener.protocol for listener in self.brokers[0].listeners}


def load(folder: Path) -> Cluster | None:
    """The cluster of this folder, if one was made."""
    try:
        text = _state(folder).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        state = json.loads(text)
        brokers = [
            Broker(it["id"], it["controller_port"], [Listener(**listener) for listener in it["listeners"]])
            for it in state["brokers"]
        ]
        return Cluster(folder, state["id"], brokers)
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{_state(folder)} is damaged ({error!r}); remove {folder} and start again") from error


def make(folder: Path, brokers: int, listeners: list[Listener], install: Install) -> Cluster:
    """Lays out and formats a new cluster. The state file comes last: without it the folder counts as half made."""
    _prepare(folder)
    taken: set[int] = set()

    def port(wanted: int, host: str) -> int:
        chosen = wanted or _free_port(host, taken)
        taken.add(chosen)
        return chosen

    laid_out = []
    for number in range(1, brokers + 1):
        own = [Listener(it.protocol, it.host, port(it.port and it.port + number - 1, it.host)) for it in listeners]
        laid_out.append(Broker(number, port(0, "127.0.0.1"), own))
    identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    # Kafka's command line would read a leading dash as an option.
    cluster = Cluster(folder, "s" + identity[1:], laid_out)
    if SASL in cluster.protocols():
        cluster.secrets.make()
    write_properties(cluster)
    _format(cluster, install)
    _state(folder).write_text(
        json.dumps({"id": cluster.id, "brokers": [dataclasses.asdict(it) for it in laid_out]}, indent=2) + "\n"
    )
    return cluster


def _state(folder: Path) -> Path:
    return folder / "cluster.json"


def refuse_unfit(folder: Path) -> None:
    """Refuses what a cluster cannot or must not be kept in."""
    if "," in str(folder):
        raise Failure(f"{folder} has a comma, which Kafka takes for the end of a path; give another --data", 64)
    if folder.exists() and not folder.is_dir():
        raise Failure(f"{folder} is not a folder; give another --data", 64)
    if folder.is_dir() and not (folder / MARK).exists() and any(it.name != LOCK for it in folder.iterdir()):
        raise Failure(f"{folder} is not empty and was not made by ops/kafka; give another --data", 64)


def _prepare(folder: Path) -> None:
    """Empties what an earlier start left half made."""
    refuse_unfit(folder)
    (folder / MARK).touch()
    for it in folder.iterdir():
        if it.name in (LOCK, MARK):
            continue
        if it.is_dir() and not it.is_symlink():
            shutil.rmtree(it)
        else:
            it.unlink()


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As the broker does: connections that linger from its last run are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _free_port(host: str, taken: set[int]) -> int:
    for port in random.sample(FREE_PORTS, 200):
        if port not in taken and is_free(host, port):
            return port
    raise Failure(f"found no free port on {host} between {FREE_PORTS.start} and {FREE_PORTS.stop - 1}; give --port")


def write_properties(cluster: Cluster) -> None:
    for broker in cluster.brokers:
        lines = [f"{key}={_escaped(value)}\n" for key, value in _properties(cluster, broker).items()]
        # The PLAIN mechanism has the password in here.
        write_private(cluster.node(broker).properties, "".join(lines))


def _escaped(value: object) -> str:
    """As Java reads .properties: Latin-1, with backslashes of its own."""
    text = str(value).replace("\\", "\\\\")
    return "".join(it if " " <= it <= "~" else "".join(f"\\u{unit:04x}" for unit in _utf16(it)) for it in text)


def _utf16(character: str) -> list[int]:
    units = character.encode("utf-16-be")
    return [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]


def _properties(cluster: Cluster, broker: Broker) -> dict[str, object]:
    count = len(cluster.brokers)
    in_sync = 2 if count == 3 else 1
    addresses = [f"{it.protocol}://{it.host}:{it.port}" for it in broker.listeners]
    voters = [f"{it.id}@127.0.0.1:{it.controller_port}" for it in cluster.brokers]
    properties: dict[str, object] = {
        "process.roles": "broker,controller",
        "node.id": broker.id,
        "controller.quorum.voters": ",".join(voters),
        "controller.listener.names": "CONTROLLER",
        "listeners": ",".join([*addresses, f"CONTROLLER://127.0.0.1:{broker.controller_port}"]),
        "advertised.listeners": ",".join(addresses),
        "listener.security.protocol.map": f"CONTROLLER:{PLAIN},{PLAIN}:{PLAIN},{SASL}:{SASL}",
        "inter.broker.listener.name": PLAIN,
        "log.dirs": cluster.node(broker).data,
        # One broker has nobody to copy to; of three, one may be down and acks=all goes on.
        "default.replication.factor": count,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": count,
        "transaction.state.log.replication.factor": count,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": count,
        "share.coordinator.state.topic.min.isr": in_sync,
        # The default of 50 each costs seconds at the first use, and again at each start.
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.num.partitions": 4,
        "group.initial.rebalance.delay.ms": 0,
        # Transactions that nobody ends are ended when their time is over, and not up to ten seconds later.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
        "auto.create.topics.enable": "false",
        # A broker that was killed is let in again only when its old session has run out.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        # Small machines: the defaults are for servers, and this buffer alone is 128 MiB.
        "num.network.threads": 2,
        "num.io.threads": 4,
        "background.threads": 4,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
    }
    if broker.listener(SASL) is not None:
        properties.update(_sasl_properties(cluster.secrets))
    return properties


def _sasl_properties(secrets: Secrets) -> dict[str, object]:
    mine = f"listener.name.{SASL.lower()}"
    return {
        f"{mine}.ssl.keystore.type": "PEM",
        f"{mine}.ssl.keystore.location": secrets.keystore,
        f"{mine}.sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN,OAUTHBEARER",
        f"{mine}.scram-sha-512.sasl.jaas.config": f"{SASL_MODULES}.scram.ScramLoginModule required;",
        f"{mine}.plain.sasl.jaas.config": (
            f'{SASL_MODULES}.plain.PlainLoginModule required user_{USER}="{secrets.password()}";'
        ),
        # Takes tokens that nobody has signed, which is fit for a test of the client alone.
        f"{mine}.oauthbearer.sasl.jaas.config": (
            f"{SASL_MODULES}.oauthbearer.OAuthBearerLoginModule required;"
        ),
    }


def _format(cluster: Cluster, install: Install) -> None:
    """Formats every broker's storage, at the same time."""
    running: list[tuple[Node, Path, subprocess.Popen[str]]] = []
    try:
        _format_all(cluster, install, running)
    finally:
        for _, arguments, process in running:
            process.kill()
            arguments.unlink()


def _format_all(cluster: Cluster, install: Install, running: list[tuple[Node, Path, subprocess.Popen[str]]]) -> None:
    for broker in cluster.brokers:
        node = cluster.node(broker)
        words = ["kafka.tools.StorageTool", "format", "-t", cluster.id, "-c", node.properties.name]
        if SASL in cluster.protocols():
            words += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={cluster.secrets.password()}]"]
        # By a file, because everybody may read a command line.
        arguments = cluster.folder / f"{node.name}.format"
        write_private(arguments, "\n".join(words) + "\n")
        command = install.command("-XX:TieredStopAtLevel=1", f"@{arguments.name}")
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=cluster.folder, env=install.environment(), **streams)
        running.append((node, arguments, process))
    for node, _, process in running:
        output, _ = process.communicate()
        if process.returncode != 0:
            tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-8:])
            raise Failure(f"could not format the storage of {node.name} in {node.data}:\n{tail}")
