"""What PyTorch multiplies matrices with: a peer's speed is that of its library, which differs by the CPU's maker."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


def peer() -> dict[str, str]:
    """Versions of PyTorch and of its libraries for products, and the processor, as they name themselves."""
    built = [line.removeprefix("  - ") for line in torch.__config__.show().splitlines()]
    named = {
        "blas": "Math Kernel Library Version|OpenBLAS|BLIS|BLAS",
        "onednn": "MKL-DNN|oneDNN",
        "instructions": "CPU capability usage",
    }
    found = {
        key: next((line for line in built if any(name in line for name in names.split("|"))), "not said")
        for key, names in named.items()
    }
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        **{key: line.split(" (Git Hash")[0].split(" for Intel")[0] for key, line in found.items()},
        "processor": processor[0].split(":")[1].strip() if processor else "not said",
    }


class OneDnnLinear(torch.autograd.Function):
    """`functional.linear` without bias whose three products are oneDNN's; PyTorch gives those of float32 to its BLAS."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = context.saved_tensors
        rows = gradient.flatten(0, -2)
        return product(gradient, weight.t()), product(rows.t(), x.flatten(0, -2).t())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")


@contextmanager
def onednn_products() -> Iterator[None]:
    """Within it the products of linear layers without bias are oneDNN's."""
    of_blas = functional.linear
    functional.linear = lambda x, weight, bias=None: OneDnnLinear.apply(x, weight)
    try:
        yield
    finally:
        functional.linear = of_blas
