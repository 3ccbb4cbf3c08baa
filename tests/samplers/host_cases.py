"""Settings of diffusers' caches, and calls of tiny pipelines with them."""

import numpy as np
import torch
from tiny import call_arguments

from fewstep.samplers import Plan, SpacingGrid, attach
from fewstep.samplers.host_cache import HostCache

STEPS = 6
ALWAYS = [-1, 1001]
EVERY_SECOND = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": ALWAYS}
FIRST_BLOCK = HostCache(config="FirstBlockCacheConfig", options={"threshold": 0.3})
PYRAMID = HostCache(config="PyramidAttentionBroadcastConfig", options=EVERY_SECOND)
MAG = HostCache(config="MagCacheConfig", options={"threshold": 0.3, "mag_ratios": [1.0, 1.1, 1.0, 0.9]})
TAYLOR = HostCache(
    config="TaylorSeerCacheConfig",
    options={
        "cache_interval": 3,
        "disable_cache_before_step": 2,
        "taylor_factors_dtype": "float32",
        "cache_identifiers": [r"(transformer_)?blocks[.][0-9]+[.]attn1?"],
    },
)
SEA = HostCache(config="SeaCacheConfig", options={"threshold": 0.5})
FASTER = HostCache(
    config="FasterCacheConfig",
    options={
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": ALWAYS,
        "spatial_attention_timestep_skip_range": ALWAYS,
        "tensor_format": "BCHW",
    },
)


def plan_of(part, steps=STEPS, **slots):
    return Plan(grid=SpacingGrid(steps=steps), caches=part, **slots)


def call(pipe, batch=1, **more):
    guided = {"true_cfg_scale": 3.0} if type(pipe).__name__ == "QwenImagePipeline" else {}
    sample = pipe(**call_arguments(pipe, batch) | guided | more)[0]
    return sample.numpy() if isinstance(sample, torch.Tensor) else np.asarray(sample)


def plain(pipe, **more):
    return call(pipe, num_inference_steps=STEPS, **more)


def cached(pipe, part, **more):
    with attach(pipe, plan_of(part)) as handle:
        return call(pipe, **more), handle.stats


def left_on(network):
    """What hooks could leave on the modules of a network."""
    found = {}
    for name, module in network.named_modules():
        registry = vars(module).get("_diffusers_hook")
        hooks = list(registry.hooks) if registry else []
        found[name] = (type(module), vars(module).get("forward"), registry, hooks)
    return found


def skipped(stats):
    return sum(module.skipped for module in stats.modules.values())
