"""Tokens a second into PyTorch tensors, in a process of its own: by `sluice_feed` from Kafka, or by a peer from local files.

    stream.py prepare SYSTEM FOLDER       writes the peer's data set from FOLDER/tokens.u32 and FOLDER/lengths.u32
    stream.py read SYSTEM FOLDER [...]    reads it once, in batches [8, 2048], and prints tokens, seconds and CPU seconds

`target/release/python_stream` makes the data, starts the broker and calls this.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, LENGTH = 8, 2048


def rows_of(folder: Path) -> Iterator[np.ndarray]:
    """Documents one after the other, cut every 2,048 tokens: the peers' usual way to pack."""
    tokens = np.fromfile(folder / "tokens.u32", dtype=np.uint32).astype(np.int64)
    for start in range(0, len(tokens) - LENGTH + 1, LENGTH):
        yield tokens[start : start + LENGTH]


def prepare_streaming(folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "streaming"), columns={"tokens": f"ndarray:int64:{LENGTH}"}) as writer:
        for row in rows_of(folder):
            writer.write({"tokens": row})


def read_streaming(folder: Path, workers: int, _: argparse.Namespace) -> Iterable[Any]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "streaming"), batch_size=ROWS, shuffle=True, shuffle_seed=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=ROWS, num_workers=workers)
    return (batch["tokens"] for batch in loader)


def document(index_and_row: tuple[int, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(index_and_row[1])


def prepare_litdata(folder: Path) -> None:
    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader

    optimize(
        fn=document,
        inputs=list(enumerate(rows_of(folder))),
        output_dir=str(folder / "litdata"),
        chunk_size=LENGTH * 8192,
        item_loader=TokensLoader(block_size=LENGTH),
        num_workers=1,
    )


def read_litdata(folder: Path, workers: int, _: argparse.Namespace) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    loader = TokensLoader(block_size=LENGTH)
    dataset = StreamingDataset(str(folder / "litdata"), item_loader=loader, shuffle=True, seed=1)
    return iter(StreamingDataLoader(dataset, batch_size=ROWS, num_workers=workers))


def read_sluice(_folder: Path, _workers: int, arguments: argparse.Namespace) -> Iterable[Any]:
    from sluice_feed.torch import ScoredStream

    stream = ScoredStream(
        arguments.topic,
        bootstrap_servers=arguments.bootstrap_servers,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        batch_size=ROWS,
        sequence_length=LENGTH,
        shuffle_buffer=256,
        rank=0,
        world_size=1,
    )
    return (batch["input_ids"][batch["segment_ids"] > 0] for batch in stream)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def read(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    readers = {"sluice": read_sluice, "streaming": read_streaming, "litdata": read_litdata}
    batches = readers[arguments.system](arguments.folder, arguments.workers, arguments)
    started, cpu = time.perf_counter(), cpu_seconds()
    # A look at each number, as a trainer has.
    tokens = checksum = 0
    for batch in batches:
        tokens += batch.numel()
        checksum += int(batch.sum())
    seconds = time.perf_counter() - started
    # Workers' time counts once they have ended.
    del batches
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "checksum": checksum}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["prepare", "read"])
    parser.add_argument("system", choices=["sluice", "streaming", "litdata"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--topic")
    parser.add_argument("--bootstrap-servers")
    parser.add_argument("--tokenizer")
    parser.add_argument("--vocab-size", type=int)
    arguments = parser.parse_args()
    if arguments.action == "read":
        read(arguments)
    else:
        {"streaming": prepare_streaming, "litdata": prepare_litdata}[arguments.system](arguments.folder)


if __name__ == "__main__":
    main()
