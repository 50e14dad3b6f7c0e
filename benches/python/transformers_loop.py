"""Scoring with Hugging Face transformers and PyTorch: batched, sorted by length, cross entropy of each token.

Reads the documents (JSON: a list of lists of ids) from a file, which is cheaper than a broker. Prints one JSON object:
seconds and CPU seconds of the loop alone, without loading.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--documents", required=True, type=Path)
    parser.add_argument("--tokens-max", required=True, type=int, help="padded tokens of a batch")
    parser.add_argument("--losses", type=Path, help="where to write the losses of each document")
    arguments = parser.parse_args()
    model = transformers.LlamaForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    documents = json.loads(arguments.documents.read_text())
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(documents[batches[-1][0]]) <= arguments.tokens_max:
            batches[-1].append(index)
        else:
            batches.append([index])

    losses: dict[int, list[float]] = {}
    padded = 0
    with torch.inference_mode():
        model(torch.zeros((1, 8), dtype=torch.long))
        started, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            longest = len(documents[batch[0]])
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, index in zip(ids, batch):
                row[: len(documents[index])] = torch.tensor(documents[index])
            # Padding stands on the right, where no real token of a causal model sees it.
            logits = model(input_ids=ids, use_cache=False).logits
            # The last position predicts nothing; shifting the targets spares a copy of the logits.
            targets = functional.pad(ids[:, 1:], (0, 1), value=-100)
            scored = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            for row, index in zip(scored.view_as(ids), batch):
                losses[index] = row[: len(documents[index]) - 1].tolist()
            padded += ids.numel()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    every = [loss for index in range(len(documents)) for loss in losses[index]]
    if arguments.losses:
        arguments.losses.write_text(json.dumps([losses[index] for index in range(len(documents))]))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "tokens": sum(map(len, documents)),
                "padded_tokens": padded,
                "mean_loss": sum(every) / len(every),
            }
        )
    )


if __name__ == "__main__":
    main()
