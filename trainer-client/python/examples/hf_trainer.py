r"""Selective training by Hugging Face's Trainer, from a topic that `sluiced` has scored.

    python hf_trainer.py --topic sluice.scored --tokenizer tokenizer.json --model HuggingFaceTB/SmolLM2-135M \
        --steps 1000 --out run
    torchrun --nproc-per-node 8 hf_trainer.py ... --micro-batches 32 --fsdp

With --resume it goes on from the last checkpoint in --out, on as many ranks as you like (a divisor of --micro-batches and of
the topic's partitions), and learns from every document as often as if nothing had happened. SIGTERM ends it before the next
step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sluice_feed import Selection
from sluice_feed.torch import ScoredStream
from sluice_feed.transformers import SelectiveTrainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def main() -> None:
    arguments = parse()
    # First of all, for it lets torch.distributed begin, which the stream asks for its rank.
    settings = training_arguments(arguments)
    stream = made_stream(arguments)
    signal.signal(signal.SIGTERM, lambda *_: stream.stop())
    trainer = SelectiveTrainer(
        model=model(arguments),
        args=settings,
        train_dataset=stream,
        selection=Selection(keep=arguments.keep, scope=arguments.scope),
    )
    trainer.train(resume_from_checkpoint=checkpoint(arguments))
    trainer.save_model(str(arguments.out / "model"))
    if trainer.is_world_process_zero():
        steps = [line for line in trainer.state.log_history if "loss" in line]
        (arguments.out / "log.json").write_text(json.dumps(steps, indent=1) + "\n")
    stream.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if arguments.fsdp else {}
    return TrainingArguments(
        output_dir=str(arguments.out),
        # The stream says how many micro-batches there are in a step, and how many rows in each.
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        save_steps=arguments.checkpoint_every,
        logging_steps=arguments.log_every,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=arguments.seed,
        report_to=[],
        disable_tqdm=True,
        **fsdp,
    )


def made_stream(arguments: argparse.Namespace) -> ScoredStream:
    kind = LoggedStream if arguments.log_documents else ScoredStream
    stream = kind(
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
    if isinstance(stream, LoggedStream):
        arguments.out.mkdir(parents=True, exist_ok=True)
        stream.log = arguments.out / f"documents-{stream.rank}.jsonl"
    return stream


class LoggedStream(ScoredStream):
    """A stream that writes down what each step was made of."""

    log: Path

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        """As of any stream."""
        with self.log.open("a") as log:
            for batches in super().steps():
                for batch in batches:
                    documents = [document for row in batch["document_ids"] for document in row]
                    line = {name: batch[name] for name in ("step", "number", "lane", "digest")}
                    print(json.dumps({**line, "documents": documents}), file=log, flush=True)
                yield batches


def model(arguments: argparse.Namespace) -> Any:
    if not arguments.tiny:
        return AutoModelForCausalLM.from_pretrained(arguments.model)
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocab_size or 512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def checkpoint(arguments: argparse.Namespace) -> str | None:
    """The last one, if it was asked for and there is one."""
    found = get_last_checkpoint(str(arguments.out)) if arguments.resume and arguments.out.is_dir() else None
    return None if found is None else str(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--bootstrap-servers", default="localhost:9092")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, its folder, or its SHA-256")
    parser.add_argument("--vocab-size", type=int, help="by default as the tokenizer says")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", help="folder or name for transformers")
    models.add_argument("--tiny", action="store_true", help="a Llama of two layers and random weights")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--sequence-length", type=int, help="by default the reference model's window")
    parser.add_argument("--micro-batches", type=int, help="of a step, over all ranks; by default one for each")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--shuffle-buffer", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-model", action="append", default=[], help="fingerprint to accept; repeatable")
    parser.add_argument("--keep", default="0.6", help="share of the tokens to learn from, a schedule, or adaptive")
    parser.add_argument("--scope", default="batch", help="what competes: batch, micro-batch or sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, required=True, help="at most; the schedule of the learning rate is for them")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=1)
    parser.add_argument("--log-documents", action="store_true", help="write down what each step learnt from")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="shard by FSDP2; needs torchrun and GPUs")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
