"""Tiny random networks behind denoisers, and recipes that exercise them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewstep.samplers.tokens import DenoiserSpec, TransformersDenoiser

VOCABULARY = 24
MASK = VOCABULARY - 1
PROMPTS = ([3, 4, 5, 6], [7, 8], [9], [1, 2, 3, 4, 5, 6, 7], [], [5, 5, 5], [2, 1])
"""Seven prompts of different lengths."""


def tiny_llama(implementation="sdpa", dtype=torch.float32):
    """Two layers of width 32 with logits that are far apart, so that no token hangs on a rounding error."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval().to(dtype)


def llama_denoiser(implementation="sdpa", dtype=torch.float32, **spec):
    return TransformersDenoiser(
        tiny_llama(implementation, dtype), DenoiserSpec(mask_id=MASK, vocab_size=VOCABULARY, eos_ids=(0,), **spec)
    )


BLOCK_CAUSAL = {"attention": "block-causal", "block_length": 4}
"""Of a spec."""


def recorded(decode, *arguments, **options):
    """What ``decode`` gives, and a copy of the known positions and raw logits of each step."""
    steps = []
    decoded = decode(
        *arguments, watch=lambda state: steps.append((state.known.clone(), state.raw.clone(), state.at[0])), **options
    )
    return decoded, steps
