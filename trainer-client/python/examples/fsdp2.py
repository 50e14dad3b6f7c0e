"""Selective training of a Llama under FSDP2, on any number of ranks, from a topic that `sluiced` has scored.

    torchrun --nproc-per-node 2 fsdp2.py --topic sluice.scored --tokenizer tokenizer.json --micro-batches 8 \
        --sequence-length 512 --steps 100 --out run

Kill it whenever you like, and start it again with as many ranks as you like (a divisor of --micro-batches and of the topic's
partitions): it goes on from its last checkpoint and learns from every document as often as if nothing had happened.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sluice_feed import Selection
from sluice_feed.torch import ScoredStream, SelectiveModel, select
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    arguments = parse()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dist.init_process_group()
    if device.type != "cpu":
        torch.accelerator.set_device_index(dist.get_rank() % torch.accelerator.device_count())
    stream = ScoredStream(
        arguments.topic,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        bootstrap_servers=arguments.bootstrap_servers,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        micro_batches=arguments.micro_batches,
        epochs=arguments.epochs,
        shuffle_buffer=arguments.shuffle_buffer,
        seed=arguments.seed,
        reference_models=arguments.reference_model,
        digests=arguments.log_documents,
    )
    # All ranks stop before the same step, and write a checkpoint that stands there.
    signal.signal(signal.SIGTERM, lambda *_: stream.stop())
    selection = Selection(keep=arguments.keep)
    model = sharded(arguments, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    run = Run(model, optimizer, stream)
    found = last_checkpoint(arguments.out)
    if found is not None:
        dcp.load({"run": run}, checkpoint_id=found)
    log = documents_log(arguments) if arguments.log_documents else None

    for micro_batches in stream.steps():
        run.step += 1
        loss = take_step(model, optimizer, micro_batches, selection, run.step)
        if log is not None:
            log_documents(log, micro_batches)
        if dist.get_rank() == 0:
            print(json.dumps({"step": run.step, "loss": loss}), flush=True)
        is_last = run.step == arguments.steps
        if run.step % arguments.checkpoint_every == 0 or is_last:
            dcp.save({"run": run}, checkpoint_id=arguments.out / f"step-{run.step:08}")
        if is_last:
            break
    else:
        dcp.save({"run": run}, checkpoint_id=arguments.out / f"step-{run.step:08}")
    stream.close()
    dist.destroy_process_group()


def sharded(arguments: argparse.Namespace, device: torch.device) -> SelectiveModel:
    """The model with its loss, in shards of each layer and of what is around them."""
    torch.manual_seed(arguments.seed)
    if arguments.model is not None:
        llama = LlamaForCausalLM.from_pretrained(arguments.model)
    else:
        config = LlamaConfig(
            vocab_size=arguments.vocab_size or 512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        llama = LlamaForCausalLM(config)
    llama.to(device)
    model = SelectiveModel(llama.model, llama.lm_head)
    for layer in llama.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def take_step(
    model: SelectiveModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Any]],
    selection: Selection,
    step: int,
) -> float:
    """Learns from the tokens of all ranks' micro-batches that are worth it; the mean loss of those, in nats."""
    device = next(model.parameters()).device
    batches = [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in micro_batches
    ]
    if len(batches) == 1:
        # The losses of the forward pass choose the tokens of the backward pass.
        masks, divisor = None, None
    else:
        # The tokens of all micro-batches compete, so the losses of all come first.
        with torch.no_grad():
            losses = [model(batch["labels"], inputs=inputs(batch), only_token_losses=True) for batch in batches]
        signals = [{"loss": loss, "reference_loss": batch["reference_loss"]} for loss, batch in zip(losses, batches)]
        numbers = [batch["number"] for batch in batches]
        row_len = batches[0]["labels"].shape[1]
        masks = select(signals, selection, row_len=row_len, step=step, numbers=numbers)
        divisor = torch.stack([mask.sum() for mask in masks]).sum()
        dist.all_reduce(divisor)
    mean = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        model.set_requires_gradient_sync(index + 1 == len(batches))
        choice: dict[str, Any] = {"selection": selection, "step": step, "number": batch["number"]}
        if masks is not None:
            choice = {"kept": masks[index], "divisor": divisor}
        loss = model(batch["labels"], batch["reference_loss"], inputs=inputs(batch), **choice).loss
        loss.backward()
        mean += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the backbone reads. Positions begin anew with each document, by which transformers keeps documents apart."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


class Run:
    """All that a checkpoint keeps: weights, optimizer, where the stream stands, and the step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, stream: ScoredStream) -> None:
        self.model, self.optimizer, self.stream = model, optimizer, stream
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "stream": self.stream.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self.step = state["step"]


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its list of contents is written last."""
    whole = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(whole, default=None)


def documents_log(arguments: argparse.Namespace) -> TextIO:
    arguments.out.mkdir(parents=True, exist_ok=True)
    return (arguments.out / f"documents-{dist.get_rank()}.jsonl").open("a")


def log_documents(log: TextIO, micro_batches: list[dict[str, Any]]) -> None:
    """A line for each micro-batch: what it was made of."""
    for batch in micro_batches:
        documents = [document for row in batch["document_ids"] for document in row]
        line = {name: batch[name] for name in ("step", "number", "lane", "digest")}
        print(json.dumps({**line, "documents": documents}), file=log, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--bootstrap-servers", default="localhost:9092")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, its folder, or its SHA-256")
    parser.add_argument("--vocab-size", type=int, help="by default as the tokenizer says")
    parser.add_argument("--model", help="folder or name for transformers; by default a tiny one of random weights")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--sequence-length", type=int, help="by default the reference model's window")
    parser.add_argument("--micro-batches", type=int, required=True, help="of a step, over all ranks")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--shuffle-buffer", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-model", action="append", default=[], help="fingerprint to accept; repeatable")
    parser.add_argument("--keep", default="0.6", help="share of the tokens to learn from, a schedule, or adaptive")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help="by default to the end of the topic")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--log-documents", action="store_true", help="write down what each step learnt from")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
