"""PyTorch's versions of the selective step, one step for each line of standard input (see src/bin/training_step.rs).

`torch-mask`: whole logits, the losses of dropped tokens times zero. `torch-gather`: the head forward for every token without a
graph, then again for the kept ones with it. `torch-compiled-...`: the same under torch.compile. All with
scaled_dot_product_attention and the fused AdamW, and under autocast where bf16 is asked for. `torch-onednn-...`: the products of
linear layers are oneDNN's and not the BLAS's (float32 on a CPU). `peer`: what PyTorch is and multiplies with. `memory`: most memory of a step of a
model that is hardly more than its head.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from blas import onednn_products, peer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

KEEP = 0.6


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        rows, length, width = x.shape
        normed = self.input_layernorm(x)
        query, key, value = (
            project(normed).view(rows, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(rows, length, width))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Body(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(
            Layer(width, config["intermediate_size"], heads) for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        half = width // heads // 2
        angles = torch.arange(config["max_position_embeddings"])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cosine, sine = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x).flatten(0, 1)


class Model(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        self.model = Body(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        weights = load_file(folder / "model.safetensors")
        self.load_state_dict({name.replace("self_attn.", "").replace("mlp.", ""): w for name, w in weights.items()})


class Stepper:
    """A model with its optimizer, and one way to take a step."""

    def __init__(self, folder: Path, version: str, device: str, precision: str) -> None:
        self.model = Model(folder).to(device)
        # Its cache would keep the head's weight as cast without a graph, and lose its gradient in the second pass.
        bf16 = precision == "bf16"
        self.autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16, cache_enabled=False)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        norms = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.gathers = version.endswith("gather")
        self.products = onednn_products if "onednn" in version else nullcontext
        compiled = torch.compile if "compiled" in version else lambda function: function
        self.body, self.losses = compiled(self.model.model), compiled(self.plain_losses)

    def plain_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.model.lm_head(hidden), targets, ignore_index=-1, reduction="none")

    def loss(self, tokens: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        hidden = self.body(tokens)
        valid = targets >= 0
        count = int(KEEP * valid.sum().item() + 0.5)
        if self.gathers:
            with torch.no_grad():
                losses = self.losses(hidden, targets)
        else:
            losses = self.losses(hidden, targets)
        excess = (losses.detach() - reference).masked_fill(~valid, -torch.inf)
        kept = excess.topk(count).indices
        if self.gathers:
            return self.losses(hidden[kept], targets[kept]).mean()
        return (losses * torch.zeros_like(losses).scatter_(0, kept, 1.0)).sum() / count

    def step(self, tokens: Tensor, targets: Tensor, reference: Tensor, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.products(), self.autocast:
            loss = self.loss(tokens, targets, reference)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return loss.item()


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    folder, steppers = Path(sys.argv[1]), {}
    for line in sys.stdin:
        vocabulary, version = line.split()
        if version == "peer":
            print(json.dumps(peer()), flush=True)
            continue
        given = json.loads((folder / f"batch-{vocabulary}.json").read_text())
        where = given["device"], given["precision"]
        targets, reference = (torch.tensor(given[name], device=where[0]) for name in ("targets", "reference"))
        tokens = torch.tensor(given["tokens"], device=where[0]).view(given["rows"], given["len"])
        learning_rate = given["learning_rate"]
        if version == "memory":
            stepper, length = Stepper(folder / f"head-{vocabulary}", "torch-mask", *where), given["len"]
            stepper.step(tokens[:1], targets[:length], reference[:length], learning_rate)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS:")
            loss = stepper.step(tokens, targets, reference, learning_rate)
            told = {"bytes": max(status("VmHWM:") - before, 0), "loss": loss}
        else:
            if version not in steppers:
                steppers[version] = Stepper(folder / f"model-{vocabulary}", version, *where)
            started, cpu = time.perf_counter(), time.process_time()
            loss = steppers[version].step(tokens, targets, reference, learning_rate)
            told = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "loss": loss}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
