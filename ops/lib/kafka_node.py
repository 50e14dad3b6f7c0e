"""One broker as a process: started, asked, signalled."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import kafka_probe
from kafka_install import Install

STOP_WITHIN_S = 30.0
KILL_WITHIN_S = 10.0
POLL_S = 0.05
PID_TRIES = 20
QUOTED_LINES = 12
QUOTED_CHARACTERS = 300


@dataclass(frozen=True)
class Node:
    """Where one broker keeps its things under the data folder.

    A broker runs for as long as its pid file is locked: it inherits the lock, and only its end releases it, whatever
    the end is. A number alone may by now be another process's.
    """

    id: int
    folder: Path

    @property
    def name(self) -> str:
        return f"broker-{self.id}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def properties(self) -> Path:
        return self.folder / f"{self.name}.properties"

    @property
    def data(self) -> Path:
        return self.folder / f"{self.name}.data"

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def pid(self) -> int | None:
        """None when it does not run."""
        try:
            with open(self._pid_file) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return self._written_pid()
        return None

    def _written_pid(self) -> int:
        # Locked first and written a moment later.
        for _ in range(PID_TRIES):
            text = self._pid_file.read_text()
            if text.endswith("\n"):
                return int(text)
            time.sleep(POLL_S)
        raise OSError(f"{self._pid_file} belongs to a running broker and has no process id; end it by hand")

    def spawn(self, install: Install, jvm_flags: list[str]) -> None:
        """Starts it in a session of its own, so that neither Ctrl-C nor a closed terminal reaches it."""
        command = install.command(*jvm_flags, *LOG_FLAGS, "kafka.Kafka", self.properties.name)
        with open(self._pid_file, "w") as pid_file, open(self.log, "ab") as log:
            # Waits for no broker, only for whoever looks at the lock at this moment.
            fcntl.flock(pid_file, fcntl.LOCK_EX)
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=install.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(pid_file.fileno(),),
                start_new_session=True,
            )
            try:
                pid_file.write(f"{process.pid}\n")
                pid_file.flush()
            except OSError:
                process.kill()  # without a number nobody could stop it later
                raise

    def terminate(self) -> None:
        """Asks it to end; one that is suspended wakes up to hear it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def wait_for_end(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while self.pid() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _signal(self, number: signal.Signals) -> None:
        pid = self.pid()
        if pid is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # ended in between

    def last_words(self, since: int) -> str:
        """The last lines of its log after byte `since`: those that tell of trouble, if there are any."""
        with open(self.log, "rb") as log:
            log.seek(since)
            lines = log.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if line.strip() and not line.startswith(("\tat ", "\t..."))]
        trouble = [line for line in telling if " INFO " not in line]
        return "\n".join(f"    {line[:QUOTED_CHARACTERS]}" for line in (trouble or telling)[-QUOTED_LINES:])

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0


# Apache Kafka is told where to log by slf4j-simple's system properties.
LOG_FLAGS = [
    f"-Dorg.slf4j.simpleLogger.{key}={value}"
    for key, value in (
        ("logFile", "System.out"),
        ("showDateTime", "true"),
        ("dateTimeFormat", "yyyy-MM-dd'T'HH:mm:ss.SSSXXX"),
        ("showThreadName", "false"),
        # Hundreds of lines of settings at each start, all of them defaults or in the properties file.
        ("log.org.apache.kafka.common.config", "warn"),
    )
]


def answers(host: str, port: int, cluster_id: str) -> frozenset[int]:
    """The brokers that the one at this address knows to be serving; none when it is not one of this cluster."""
    answer = kafka_probe.ask(host, port)
    return answer.broker_ids if answer is not None and answer.cluster_id == cluster_id else frozenset()


def stop_all(nodes: list[Node]) -> list[Node]:
    """Ends them, all at the same time; returns those that had to be killed."""
    for node in nodes:
        node.terminate()
    deadline = time.monotonic() + STOP_WITHIN_S
    stubborn = [node for node in nodes if not node.wait_for_end(max(deadline - time.monotonic(), 0.0))]
    kill_all(stubborn)
    return stubborn


def kill_all(nodes: list[Node]) -> None:
    for node in nodes:
        node.kill()
    for node in nodes:
        if not node.wait_for_end(KILL_WITHIN_S):
            raise OSError(f"{node.name} (process {node.pid()}) does not end, though it was killed")
