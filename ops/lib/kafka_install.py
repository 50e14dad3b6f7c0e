"""Java, and the jars of Apache Kafka in the cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fetch

JAVA_WANTED = 17
JAVA_PACKAGE = "openjdk-17-jre-headless"
MAVEN_PACKAGE = "maven"


@dataclass(frozen=True)
class Install:
    """What a broker is run from."""

    java: str
    java_version: str
    jars: Path

    def command(self, *words: str) -> list[str]:
        return [self.java, "-Djava.awt.headless=true", "-XX:-UsePerfData", *words]

    def environment(self) -> dict[str, str]:
        """The class path goes by the environment, so that `ps` shows a readable line; sorted, because the class archive
        is only good for the very class path that it was made with."""
        return {**os.environ, "CLASSPATH": ":".join(str(jar) for jar in sorted(self.jars.glob("*.jar")))}


def install(pins: Path) -> Install:
    """`pins` is the folder of pom.xml and jars.sha256."""
    java, version = _java()
    return Install(java, version, _jars(pins / "pom.xml", pins / "jars.sha256"))


def _java() -> tuple[str, str]:
    """The path of a new enough Java, and the version that it says it has."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin/java") if home else shutil.which("java")
    wanted = f"Apache Kafka needs Java {JAVA_WANTED} or newer"
    to_get = f"apt-get install {JAVA_PACKAGE}, or set JAVA_HOME"
    if java is None or not Path(java).exists():
        fetch.fail(f"{wanted}, and {f'JAVA_HOME has no {java}' if home else 'there is no `java`'}; to get it: {to_get}")
    said = subprocess.run([java, "-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = re.search(r'version "((\d+)[^"]*)"', said.stdout)
    if said.returncode != 0 or found is None:
        fetch.fail(f"{java} does not say its version: {said.stdout.strip()[-300:]}; to get another: {to_get}")
    if int(found[2]) < JAVA_WANTED:
        fetch.fail(f"{wanted}, and {java} is {found[1]}; to get it: {to_get}")
    return java, found[1]


def _jars(pom: Path, lock: Path) -> Path:
    def fill(folder: Path) -> None:
        if shutil.which("mvn") is None:
            fetch.fail(f"Maven fetches Apache Kafka, and there is no `mvn`; to get it: apt-get install {MAVEN_PACKAGE}")
        fetch.say("kafka: downloading Apache Kafka (45 MB)")
        fetched = subprocess.run(
            ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies"]
            + ["-DincludeScope=runtime", f"-DoutputDirectory={folder}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if fetched.returncode != 0:
            fetch.say(fetched.stdout)
            fetch.fail(
                f"Maven could not download Apache Kafka (its message is above; exit status {fetched.returncode});"
                " check that this machine reaches its Maven repository, then run this again"
            )
        _check(folder, lock)

    # The hash is in the folder's name, so a new list never meets old jars.
    return fetch.publish(fetch.cache_root() / "kafka" / f"jars-{_sha256(lock)[:12]}", fill)


def _check(folder: Path, lock: Path) -> None:
    wanted = {name: digest for digest, name in map(str.split, lock.read_text().splitlines())}
    found = {jar.name: _sha256(jar) for jar in folder.iterdir()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        fetch.fail(
            f"these downloaded jars are not what {lock} says: {', '.join(wrong)}; remove them from Maven's local"
            " repository (~/.m2/repository) and run this again; if that changes nothing, the source of the jars differs"
        )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
