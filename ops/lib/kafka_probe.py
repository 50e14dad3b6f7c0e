"""Asks a broker which brokers it knows: the smallest client of the Kafka protocol that can tell whether one is ready.

An open port is too little: a broker listens before the controllers let it serve. It names itself only afterwards.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

TIMEOUT_S = 2.0
METADATA, VERSION = 3, 4
ANSWER_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Answer:
    broker_ids: frozenset[int]
    cluster_id: str


def ask(host: str, port: int) -> Answer | None:
    """None when nobody answers there, or not in Kafka's language."""
    # No client id, no topics, and none to be created.
    request = struct.pack(">hhih", METADATA, VERSION, 1, -1) + struct.pack(">i?", 0, False)
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            (size,) = struct.unpack(">i", _read(connection, 4))
            return _parse(_read(connection, size)) if 0 < size <= ANSWER_BYTES_MAX else None
    except (OSError, EOFError, struct.error, UnicodeDecodeError):
        return None


def _read(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def _parse(answer: bytes) -> Answer:
    position = 8  # the correlation id and the throttle time

    def number(layout: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(layout, answer, position)
        position += struct.calcsize(layout)
        return value

    def text() -> str:
        nonlocal position
        size = max(number(">h"), 0)  # -1 stands for null
        position += size
        return answer[position - size : position].decode()

    ids = set()
    for _ in range(number(">i")):
        ids.add(number(">i"))
        text()  # host
        number(">i")  # port
        text()  # rack
    return Answer(frozenset(ids), text())
