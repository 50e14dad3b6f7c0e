"""What the SASL_SSL listener needs: a certificate authority, the broker's certificate, a user and a password.

All of it is made for one data folder and good for nothing else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fetch

USER = "sluice"
DAYS = "3650"
EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
# Both names of this machine that a client may have asked for.
SERVER_EXTENSIONS = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"


@dataclass(frozen=True)
class Secrets:
    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def keystore(self) -> Path:
        """The broker's key and certificate in one file, as Kafka reads PEM."""
        return self.folder / "broker.pem"

    @property
    def password_file(self) -> Path:
        return self.folder / "password"

    def password(self) -> str:
        return self.password_file.read_text().strip()

    def make(self) -> None:
        self.folder.mkdir(mode=0o700)
        write_private(self.password_file, secrets.token_hex(16) + "\n")
        extensions = self.folder / "broker.ext"
        extensions.write_text(SERVER_EXTENSIONS)
        self._openssl(
            *("req", "-x509", *EC_KEY, "-days", DAYS, "-subj", "/CN=sluice test authority"),
            *("-keyout", "ca.key", "-out", self.ca.name),
        )
        self._openssl("req", "-new", *EC_KEY, "-subj", "/CN=localhost", "-keyout", "broker.key", "-out", "broker.csr")
        self._openssl(
            *("x509", "-req", "-in", "broker.csr", "-CA", self.ca.name, "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", DAYS, "-extfile", extensions.name, "-out", "broker.crt"),
        )
        key, certificate = (self.folder / name for name in ("broker.key", "broker.crt"))
        write_private(self.keystore, key.read_text() + certificate.read_text())

    def _openssl(self, *words: str) -> None:
        if shutil.which("openssl") is None:
            fetch.fail("certificates are made with `openssl`, which is missing; to get it: apt-get install openssl")
        done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            fetch.fail(f"`openssl {words[0]}` failed: {done.stderr.strip()[-500:]}")


def write_private(file: Path, text: str) -> None:
    """Writes a file that nobody else may read, not even for a moment."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
