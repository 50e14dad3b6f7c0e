"""Scoring with Hugging Face transformers and PyTorch: batched, sorted by length, cross entropy of each token.

Reads the documents (JSON: a list of lists of ids) from a file, which is cheaper than a broker. Prints one JSON object:
seconds and CPU seconds of the loop alone, without loading. On a GPU, `--dtype float16 --head-rows 4096 --compile` is the
fastest way known: attention in one kernel (SDPA), cross entropy over blocks of rows, a compiled body.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from blas import onednn_products, peer
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--documents", required=True, type=Path)
    parser.add_argument("--tokens-max", required=True, type=int, help="padded tokens of a batch")
    parser.add_argument("--losses", type=Path, help="where to write the losses of each document")
    parser.add_argument("--device", default="cpu", help="as PyTorch names it, such as cuda:0")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--head-rows", type=int, default=0, help="rows of the head at a time; 0 for all, as one would write it")
    parser.add_argument("--compile", action="store_true", help="compile the body")
    parser.add_argument("--attention", choices=ATTENTION, help="the one kernel of attention that may run")
    parser.add_argument("--onednn", action="store_true", help="products of linear layers by oneDNN and not by the BLAS")
    parser.add_argument("--repeats", type=int, default=1, help="the last one's time counts; compiling takes the first")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.eval().to(device)
    body = torch.compile(model.model, dynamic=True) if arguments.compile else model.model

    def score(ids: torch.Tensor) -> torch.Tensor:
        # The last position predicts nothing; shifting the targets spares a copy of the logits.
        targets = functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        if not arguments.head_rows and not arguments.compile:
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            return functional.cross_entropy(logits.float(), targets, reduction="none")
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = arguments.head_rows or len(hidden)
        blocks = zip(hidden.split(rows), targets.split(rows))
        return torch.cat(
            [functional.cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in blocks]
        )

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
    attention = sdpa_kernel(ATTENTION[arguments.attention]) if arguments.attention else nullcontext()
    with torch.inference_mode(), attention, onednn_products() if arguments.onednn else nullcontext():
        score(torch.zeros((1, 8), dtype=torch.long, device=device))
        for _ in range(arguments.repeats):
            padded = 0
            started, cpu = time.perf_counter(), time.process_time()
            for batch in batches:
                longest = len(documents[batch[0]])
                ids = torch.zeros((len(batch), longest), dtype=torch.long)
                for row, index in zip(ids, batch):
                    row[: len(documents[index])] = torch.tensor(documents[index])
                # Padding stands on the right, where no real token of a causal model sees it. `cpu` waits for a GPU.
                scored = score(ids.to(device)).cpu()
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
                "peer": peer(),
            }
        )
    )


if __name__ == "__main__":
    main()
