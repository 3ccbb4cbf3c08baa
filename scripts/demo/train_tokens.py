"""Trains the demo's token models: a masked-diffusion one, a block-causal one, and their autoregressive twin.

All three are Llama decoders of one shape, which differ in what a position attends to and in what it predicts. Each
answer position is weighted by 1, and what follows an answer's end by `PADDING_WEIGHT`; every mask counts alike
(MaskGIT, arXiv:2202.04200), without the 1/t of the diffusion bound, which weights the steps with few masks most: a
weight changes how fast something is learned and not what is right there.

The diffusion models begin from the twin's weights (``--start``, as DiffuLLaMA, arXiv:2410.17891, and Dream,
arXiv:2508.15487, do): after 150 steps they copy better than after 1,500 from random ones. The masked model keeps the
twin's shift, so that the output at a position predicts the token after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fewstep.samplers.tokens import DenoiserSpec, save_causal, save_denoiser
from fewstep.scripts.demo.token_data import (
    BOS,
    EOS,
    MASK,
    VOCABULARY,
    Batch,
    Mixture,
    new_tokenizer,
    read_verses,
    split_verses,
)
from fewstep.scripts.demo.trainer import Recipe, train, training_parser

KINDS = ("masked", "block", "ar")
LENGTHS = {40: (0.4, 0.0), 64: (0.3, 0.0), 128: (0.2, 0.8), 304: (0.1, 0.8)}
"""Length of a step's rows: how often it comes, and the share of the rows that are verses. Few verses are short, so that
short rows would teach them by heart; the longest have room for 256 tokens after any prompt."""
TOKENS = 3072
"Tokens of a step, whatever the length of its rows."
PADDING_WEIGHT = 0.1
BLOCK = 8
"Positions in a block of the block-causal model, counted from the first token of the answer."


def new_model(width: int = 160, layers: int = 6) -> LlamaForCausalLM:
    """An untrained Llama of 1.9 million parameters: 3.7 MiB in half precision."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 14 // 5,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=384,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=EOS,
            attn_implementation="sdpa",
        )
    )


def begun(folder: Path) -> LlamaForCausalLM:
    """A model of this script, to train on: its weights in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
    )
    return model


def spec_of(kind: str) -> DenoiserSpec:
    """What the decode loop must know of the masked and of the block-causal model."""
    if kind == "masked":
        return DenoiserSpec(mask_id=MASK, vocab_size=VOCABULARY, eos_ids=(EOS,), logit_shift=1)
    return DenoiserSpec(
        mask_id=MASK,
        vocab_size=VOCABULARY,
        eos_ids=(EOS,),
        attention="block-causal",
        block_length=BLOCK,
        block_anchor="answer",
    )


def save_model(kind: str, folder: Path, model: LlamaForCausalLM) -> None:
    """Writes a model with its tokenizer; `load_denoiser` reads the first two kinds and `load_causal` the third."""
    if kind == "ar":
        save_causal(folder, model, VOCABULARY, BOS)
    else:
        save_denoiser(folder, model, spec_of(kind))
    new_tokenizer().save_pretrained(folder)


def times(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Times in (0, 1], evenly spread over all entries, in random order."""
    count = torch.Size(shape).numel()
    spread = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    return 1 - spread[torch.randperm(count, generator=generator)].view(shape)


def weights(batch: Batch) -> Tensor:
    """(R, L) float32: 0 in prompts, 1 in answers and at their end, `PADDING_WEIGHT` behind."""
    columns = torch.arange(batch.tokens.shape[1])
    weight = torch.where(columns <= batch.end[:, None], 1.0, PADDING_WEIGHT)
    return weight * (columns >= batch.answer[:, None])


def cross_entropy(logits: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over positions: logits (N, V), tokens (N,), weight (N,)."""
    return (torch.nn.functional.cross_entropy(logits, tokens, reduction="none") * weight).sum() / weight.sum()


def noised(batch: Batch, time: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Tokens of which each answer token is a mask with the probability ``time`` (R, 1) or (R, L), and which are."""
    hidden = torch.rand(batch.tokens.shape, generator=generator) < time
    hidden &= torch.arange(batch.tokens.shape[1]) >= batch.answer[:, None]
    return torch.where(hidden, MASK, batch.tokens), hidden


def masked_loss(model: LlamaForCausalLM, batch: Batch, generator: Generator) -> Tensor:
    """The cross-entropy at masks, of which a row has any share, given all that is not masked."""
    rows, length = batch.tokens.shape
    seen, hidden = noised(batch, times((rows, 1), generator), generator)
    attend = torch.ones(1, 1, length, length, dtype=torch.bool)
    states = model.model(input_ids=seen, attention_mask=attend, use_cache=False).last_hidden_state
    logits = model.lm_head(states[:, :-1][hidden[:, 1:]])
    return cross_entropy(logits, batch.tokens[hidden], weights(batch)[hidden])


def block_loss(model: LlamaForCausalLM, batch: Batch, generator: Generator) -> Tensor:
    """The same for block diffusion, all blocks in one pass (arXiv:2503.09573, Section 3.1).

    A row is read as it is and, from the first column where an answer begins, noised with a time of its own in each
    block. A noised block attends to itself and to the clean blocks before it, a clean one to itself and those before.
    """
    rows, length = batch.tokens.shape
    columns, start = torch.arange(length), int(batch.answer.min())
    block = (columns - batch.answer[:, None]).div(BLOCK, rounding_mode="floor").clamp(min=-1)
    seen, hidden = noised(batch, times((rows, length // BLOCK + 2), generator).gather(1, block + 1), generator)
    before, same = block[:, :, None] > block[:, None], block[:, :, None] == block[:, None]
    clean = torch.cat([before | same, torch.zeros_like(same)[:, :, start:]], 2)
    attend = torch.cat([clean, torch.cat([before, same[:, :, start:]], 2)[:, start:]], 1)
    states = model.model(
        input_ids=torch.cat([batch.tokens, seen[:, start:]], 1),
        attention_mask=attend[:, None],
        position_ids=torch.cat([columns, columns[start:]])[None],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(states[:, length:][hidden[:, start:]])
    return cross_entropy(logits, batch.tokens[hidden], weights(batch)[hidden])


def causal_loss(model: LlamaForCausalLM, batch: Batch, generator: Generator) -> Tensor:
    """The cross-entropy of each answer token given those before it, after a token that begins the row."""
    seen = torch.nn.functional.pad(batch.tokens[:, :-1], (1, 0), value=BOS)
    states = model.model(input_ids=seen, use_cache=False).last_hidden_state
    weight = weights(batch)
    counted = weight > 0
    return cross_entropy(model.lm_head(states[counted]), batch.tokens[counted], weight[counted])


LOSSES: dict[str, Callable[[LlamaForCausalLM, Batch, Generator], Tensor]] = {
    "masked": masked_loss,
    "block": block_loss,
    "ar": causal_loss,
}


def draw_batch(mixture: Mixture, generator: Generator, tokens: int = TOKENS) -> Batch:
    """The batch of a step: one length, and as many rows as make up ``tokens``."""
    draw = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    length, (_, text_share) = draw.choices(tuple(LENGTHS.items()), [often for often, _ in LENGTHS.values()])[0]
    return mixture.batch(tokens // length, length, text_share, draw)


def main() -> None:
    """Trains one kind into ``--work`` and saves it, in half precision, as ``--work``/model."""
    parser = training_parser(__doc__, steps=5000, images=False)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--text", type=Path, required=True, help="verses, as `bible -f 'Ge1:1-Rev22:21'` prints them")
    parser.add_argument("--start", type=Path, help="model folder to begin from, such as that of the twin")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, on CPUs that are faster with it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    verses, _ = split_verses(read_verses(options.text))
    mixture = Mixture(new_tokenizer(), verses)
    torch.manual_seed(options.seed)
    model, loss = new_model() if options.start is None else begun(options.start), LOSSES[options.kind]

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        return {options.kind: loss(model, draw_batch(mixture, generator), generator)}

    recipe = Recipe(
        steps=options.steps, lr=options.lr, weight_decay=0.01, seed=options.seed, bf16=options.bf16, save_every=250
    )
    record = train(model, loss_function, recipe, options.work)
    save_model(options.kind, options.work / "model", model.half())
    print(record)  # noqa: T201


if __name__ == "__main__":
    main()
