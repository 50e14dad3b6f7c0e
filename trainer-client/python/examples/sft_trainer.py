r"""Selective training by TRL's SFTTrainer, from a topic that `sluiced` has scored.

    python sft_trainer.py --topic sluice.scored --tokenizer folder --model HuggingFaceTB/SmolLM2-135M --steps 1000 --out run

Adapters of peft go by `peft_config`, as they always do in TRL. More settings are in hf_trainer.py; they work here too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sluice_feed.torch import ScoredStream
from sluice_feed.trl import SelectiveSFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig


def main() -> None:
    arguments = parse()
    settings = SFTConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        save_steps=arguments.checkpoint_every,
        logging_steps=1,
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    file = arguments.tokenizer / "tokenizer.json" if arguments.tokenizer.is_dir() else arguments.tokenizer
    if arguments.model is None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<eos>", pad_token="<eos>")
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    stream = ScoredStream(
        arguments.topic,
        tokenizer=file,
        bootstrap_servers=arguments.bootstrap_servers,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        micro_batches=arguments.micro_batches,
        reference_models=arguments.reference_model,
    )
    trainer = SelectiveSFTTrainer(
        model, args=settings, train_dataset=stream, processing_class=tokenizer, keep=arguments.keep
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model(str(arguments.out / "model"))
    stream.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--bootstrap-servers", default="localhost:9092")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json that documents were made with")
    parser.add_argument("--model", help="folder or name for transformers; by default a tiny one of random weights")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--sequence-length", type=int, help="by default the reference model's window")
    parser.add_argument("--micro-batches", type=int, help="of a step, over all ranks; by default one for each")
    parser.add_argument("--reference-model", action="append", default=[], help="fingerprint to accept; repeatable")
    parser.add_argument("--keep", default="0.6", help="share of the tokens to learn from, a schedule, or adaptive")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
