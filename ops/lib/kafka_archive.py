"""Kafka's classes as the JVM likes to load them, made once a machine: it halves the time of a start."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import fetch
import kafka_cluster
import kafka_node
from kafka_cluster import PLAIN, Failure, Listener
from kafka_install import Install

# What the archive was made with must be what it is used with.
FLAGS = ["-XX:+UseSerialGC"]
READY_WITHIN_S = 60.0
POLL_S = 0.1
NAME = "classes.jsa"


def archive(install: Install) -> list[str]:
    """The JVM's flags that use the archive. The JVM itself ignores one that does not fit it."""
    folder = install.jars.parent / f"{install.jars.name}-java-{install.java_version}"
    try:
        fetch.publish(folder, lambda scratch: _make(install, scratch))
    except Failure as failure:
        # A start is slower without it, and no worse.
        fetch.say(f"kafka: going without prepared classes: {failure}")
        return FLAGS
    return [*FLAGS, f"-XX:SharedArchiveFile={folder / NAME}"]


def _make(install: Install, scratch: Path) -> None:
    """Runs a broker until it serves, and has its JVM write down at its end the classes that it loaded."""
    fetch.say("kafka: preparing its classes (some seconds, once)")
    with tempfile.TemporaryDirectory(dir=scratch) as data:
        cluster = kafka_cluster.make(Path(data), 1, [Listener(PLAIN, "127.0.0.1", 0)], install)
        (broker,) = cluster.brokers
        (plain,) = broker.listeners
        node = cluster.node(broker)
        node.spawn(install, [*FLAGS, f"-XX:ArchiveClassesAtExit={scratch / NAME}"])
        try:
            deadline = time.monotonic() + READY_WITHIN_S
            while not kafka_node.answers(plain.host, plain.port, cluster.id):
                if node.pid() is None or time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
            kafka_node.stop_all([node])
        finally:
            kafka_node.kill_all([node])
        if not (scratch / NAME).exists():
            raise Failure(f"the JVM wrote no archive:\n{node.last_words(0)}")
