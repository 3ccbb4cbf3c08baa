"""Which weights a module holds, told from a sample of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 32
"Values read of each tensor, evenly spaced from the first to the last."


def fingerprint(module: nn.Module) -> str:
    """sha256 over a module's safetensors header and a fixed sample of its values.

    The header is what ``save_pretrained`` would write: name, dtype and shape of every tensor. A network of 12 B
    parameters takes well under a second, because few values of each tensor are read. Weights in another dtype
    are other weights.

    Args:
        module: a network, on any device.

    Returns:
        64 hexadecimal digits.
    """
    return fingerprint_of(module.state_dict())


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """`fingerprint` of tensors by name, whatever holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() == 0:
            continue
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        index = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).round().long()
        values = flat[index.to(flat.device)].to("cpu")
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
