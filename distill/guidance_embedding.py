"""A student that is told the guidance scale, through the input that U-Nets of diffusers have for it.

Guided distillation (arXiv:2210.03142) trains one student for a range of guidance scales, and tells it which: w = g - 1
as a vector of sines and cosines that joins the embedding of time. In diffusers that is ``timestep_cond`` of a network
with ``time_cond_proj_dim`` in its config. Its pipelines then evaluate one branch, and make the vector of their
``guidance_scale``.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch
from diffusers import LatentConsistencyModelPipeline
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ..samplers.errors import InputError
from .conditions import Condition

WIDTH = 256
"Length of the vector, as in the training scripts of latent consistency models."

_MEND = "set embed_guidance to false to train at one guidance scale"


def with_guidance_embedding(network: nn.Module) -> nn.Module:
    """The network with an input for the guidance scale, which it does not listen to yet.

    The layer of the new input is zero, so that the student begins as the teacher; diffusers' own would be random. All
    else is shared with ``network``, which stays as it is.

    Args:
        network: a denoiser.

    Raises:
        InputError: when diffusers has no such input for it, or it is told the guidance scale already.
    """
    name, config = type(network).__name__, dict(getattr(network, "config", {}))
    embedding = getattr(network, "time_embedding", None)
    known = "timestep_cond" in inspect.signature(network.forward).parameters and "time_cond_proj_dim" in config
    if not known or not isinstance(embedding, TimestepEmbedding):
        raise InputError(f"{name} has no input for the guidance scale; {_MEND}")
    if config["time_cond_proj_dim"] is not None:
        raise InputError(f"{name} is told the guidance scale already, as one that was distilled; {_MEND}")
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    fitted: Any = copy.deepcopy(network, shared)
    weight = embedding.linear_1.weight
    layer = nn.Linear(WIDTH, embedding.linear_1.in_features, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(layer.weight)
    fitted.time_embedding.cond_proj = layer
    fitted.register_to_config(time_cond_proj_dim=WIDTH)
    return fitted  # type: ignore[no-any-return]


def told(condition: Condition, scales: Tensor, device: torch.device | str = "cpu") -> Condition:
    """The condition of a student that is told guidance scales, as its pipeline tells it.

    Args:
        condition: of B samples.
        scales: (B,) g of uncond + g (cond - uncond), which pipelines call ``guidance_scale``; on the CPU.
        device: of the condition.

    Raises:
        InputError: when the pipeline of the condition would not tell its network, or the number of scales differs.
    """
    name = condition.layout.pipeline
    pipeline = getattr(diffusers, name, None)
    if pipeline is not None and not hasattr(pipeline, "get_guidance_scale_embedding"):
        raise InputError(f"{name} does not tell its network the guidance scale; {_MEND}")
    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    vectors: Tensor = embed(None, (scales - 1).float(), embedding_dim=WIDTH)
    return condition.telling(timestep_cond=vectors.to(device, condition.dtype))
