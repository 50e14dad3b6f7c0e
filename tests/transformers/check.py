"""Holds checkpoints of the trainer against Hugging Face's own Llama. Prints a line of JSON for each; see check."""

import json
import pathlib
import sys

import torch
import transformers

TOLERANCE = 1e-4


def main(folder):
    checked = 0
    for checkpoint in sorted(pathlib.Path(folder).iterdir()):
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            checkpoint, output_loading_info=True, dtype=torch.float32
        )
        wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        assert not wrong, f"{checkpoint.name} does not load as it is: {wrong}"
        expected = json.loads((checkpoint / "log_probabilities.json").read_text())
        with torch.no_grad():
            logits = model(torch.tensor([expected["tokens"]])).logits[0]
        # One value for each position and token id: logits but for a constant of each position.
        ours = torch.tensor(expected["log_probabilities"])
        difference = (torch.log_softmax(logits.double(), dim=-1) - ours.double()).abs().max().item()
        print(json.dumps({
            "checkpoint": checkpoint.name,
            "architectures": model.config.architectures,
            "values": ours.numel(),
            "largest_difference": difference,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }))
        assert ours.shape == logits.shape and difference < TOLERANCE, f"{checkpoint.name}: {difference}"
        checked += 1
    assert checked == 2, f"{checked} checkpoints in {folder}"


main(sys.argv[1])
