"""Types of the compiled half; see its own docstrings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class SluiceError(Exception): ...
class StreamError(SluiceError): ...
class StateError(SluiceError): ...
class RankError(SluiceError): ...
class ConfigurationError(ValueError): ...

class Batch:
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    reference_loss: NDArray[np.float32]
    reference_entropy: NDArray[np.float32]
    document_ids: list[list[str]]
    sources: list[list[str]]
    document_starts: list[list[int]]
    step: int
    number: int | None
    lane: int
    digest: str | None

class Selection:
    score: str
    scope: str
    threshold: float | None
    entropy_keep: float | None
    warmup_steps: int
    seed: int
    needs_entropy: bool
    needs_history_loss: bool
    needs_reference_entropy: bool
    def __init__(
        self,
        *,
        score: str = "excess",
        keep: float | str | None = None,
        threshold: float | None = None,
        scope: str = "batch",
        warmup_steps: int = 0,
        entropy_keep: float | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> None: ...
    def keep_at(self, step: int) -> float | None: ...
    def select(
        self, signals: Sequence[Mapping[str, NDArray[np.float32]]], row_len: int, step: int, micro_batch: int = 0
    ) -> list[NDArray[np.bool_]]: ...
    def draws(self, eligible: NDArray[np.bool_], step: int, micro_batch: int) -> NDArray[np.uint64]: ...
    def state_dict(self) -> str: ...
    def load_state_dict(self, state: str) -> None: ...

class Feed:
    lanes: int
    own_lanes: list[int]
    shape: tuple[int, int]
    reference_model: str | None
    def __init__(
        self,
        *,
        bootstrap_servers: str,
        properties: dict[str, str],
        topic: str,
        tokenizer: str,
        vocab_size: int,
        rows: int,
        sequence_length: int | None,
        micro_batches: int,
        rank: int,
        world_size: int,
        epochs: int | None,
        shuffle_buffer: int,
        seed: int,
        attend_across_documents: bool,
        first_token: str,
        unequal_contexts: str,
        needs_entropies: bool,
        reference_models: list[str],
        state: list[bytes] | None,
    ) -> None: ...
    def identity(self) -> list[int]: ...
    def fill(self) -> list[int]: ...
    def failed(self) -> list[int]: ...
    def agree(self, values: list[int]) -> str: ...
    def take(self, *, with_digests: bool = False) -> list[Batch]: ...
    def snapshot(self, before_step: bool) -> dict[str, bytes]: ...
    def notices(self) -> list[str]: ...
    def metrics(self) -> dict[str, Any]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
