"""What the stream must know of the tokenizer: its fingerprint, and how many ids there are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from sluice_feed._core import ConfigurationError

FILE = "tokenizer.json"
_FINGERPRINT = re.compile("[0-9a-f]{64}")


def fingerprint_and_vocab_size(tokenizer: str | os.PathLike[str], vocab_size: int | None) -> tuple[str, int]:
    """SHA-256 of a `tokenizer.json`, which records carry, and the number of ids: what is given, else the file's highest and
    one.

    `tokenizer`: the file, its folder, or the fingerprint itself, with which `vocab_size` must be given.
    """
    if isinstance(tokenizer, str) and _FINGERPRINT.fullmatch(tokenizer):
        if vocab_size is None:
            raise ConfigurationError("a tokenizer's fingerprint does not say how many ids there are: give vocab_size")
        return tokenizer, vocab_size
    path = Path(tokenizer)
    path = path / FILE if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the tokenizer {path}: {error.strerror}; give the {FILE} that the documents were made with, its"
            " folder, or its SHA-256 in lower-case digits (a name on the Hub is none of these)"
        ) from None
    return hashlib.sha256(content).hexdigest(), _highest_id(path, content) + 1 if vocab_size is None else vocab_size


def _highest_id(path: Path, content: bytes) -> int:
    try:
        tokenizer = json.loads(content)
        vocabulary = tokenizer["model"]["vocab"]
        # A dictionary of ids, or for Unigram a list in their order.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        return int(max(ids))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigurationError(
            f"{path} is not a tokenizer of Hugging Face's `tokenizers`; if it is another kind of file, give vocab_size"
        ) from None
