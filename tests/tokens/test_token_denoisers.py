"""Adapters, against the networks run by hand."""

import pytest
import torch
import transformers
from diffusers import UVit2DModel
from oracles import SPEC
from token_models import BLOCK_CAUSAL, MASK, PROMPTS, llama_denoiser, recorded, tiny_llama

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    CallableDenoiser,
    DenoiserSpec,
    Fixed,
    Quota,
    Recipe,
    RefreshAll,
    TokenGuidance,
    TransformersDenoiser,
    UViTDenoiser,
    decode,
)

TWO = Recipe(blocks=Fixed(length=4), unmask=Quota(tokens=2))


def by_hand(model, row, allowed):
    """(n, V) logits of one sequence without padding, under a mask (n, n)."""
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(input_ids=row[None], attention_mask=additive[None, None], use_cache=False).logits[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("spec", [{}, BLOCK_CAUSAL], ids=["full", "block-causal"])
def test_logits_are_those_of_each_row_by_itself(implementation, shift, spec):
    """In a batch of prompts of different lengths; the mask, the positions and the shift are the adapter's business."""
    denoiser, model = llama_denoiser(implementation, logit_shift=shift, **spec), tiny_llama("eager")
    seen = []

    def compare(state):
        if state.step.max() not in (0, 3):
            return
        for row in range(len(PROMPTS)):
            ids = state.x[row, state.first[row] :]
            number = torch.arange(len(ids))
            allowed = torch.ones(len(ids), len(ids), dtype=torch.bool)
            if spec:
                allowed = number[:, None] // 4 >= number // 4
            logits = by_hand(model, ids, allowed)
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            known = state.known[row, state.first[row] :]
            assert known.any()
            torch.testing.assert_close(state.raw[state.at[0] == row], logits[known], atol=2e-5, rtol=1e-4)
            seen.append(row)

    decode(denoiser, PROMPTS, 8, TWO, watch=compare)
    assert sorted(seen) == sorted([*range(7), *range(7)])


SIZES = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Qwen3": ("ForCausalLM", GROUPED | {"head_dim": 8}),
    "Gemma2": ("ForCausalLM", GROUPED | {"head_dim": 8}),
    "Phi3": ("ForCausalLM", GROUPED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "GPTNeoX": ("ForCausalLM", {"bos_token_id": 1, "eos_token_id": 2}),
    "Bert": ("ForMaskedLM", {}),
    "ModernBert": (
        "ForMaskedLM",
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_and_encoders_of_many_families(family):
    """Each row as the model has it by itself, in full attention; and all through the store where there is one."""
    head, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **fields, initializer_range=0.3)
    model = getattr(transformers, family + head)(config).eval()
    denoiser = TransformersDenoiser(model, DenoiserSpec(mask_id=MASK, vocab_size=24))
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    plain, steps = recorded(decode, denoiser, prompts, 4, TWO)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *[MASK] * 4]])
        whole = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        if model.config._attn_implementation == "eager":
            whole = torch.zeros(whole.shape)
        with torch.no_grad():
            logits = model(input_ids=ids, **({"attention_mask": whole} if head == "ForCausalLM" else {})).logits
        torch.testing.assert_close(steps[0][1][steps[0][2] == row], logits[0, -4:], atol=2e-5, rtol=1e-4)
    assert denoiser.keeps_kv == (head == "ForCausalLM")
    if denoiser.keeps_kv:
        stored, stored_steps = recorded(decode, denoiser, prompts, 4, TWO.replace(cache=RefreshAll()))
        assert torch.equal(stored.tokens, plain.tokens)
        torch.testing.assert_close(stored_steps[1][1], steps[1][1], atol=2e-5, rtol=1e-4)


def test_a_canvas_longer_than_the_window_of_the_attention_is_refused():
    model = tiny_llama()
    model.config.sliding_window = 6
    denoiser = TransformersDenoiser(model, DenoiserSpec(mask_id=MASK, vocab_size=24))
    decode(denoiser, [[1, 2]], 4, TWO)
    with pytest.raises(InputError, match="in windows of 6 positions, and the canvas has 7; decode at most 6 positions"):
        decode(denoiser, [[1, 2]], 5, TWO)


def test_a_decoder_without_a_mask_would_be_causal():
    """Why the adapter hands over the mask: transformers' default is another function."""
    model, ids = tiny_llama(), torch.tensor([3, 4, MASK, MASK])
    full = by_hand(tiny_llama("eager"), ids, torch.ones(4, 4, dtype=torch.bool))
    with torch.no_grad():
        silent = model(input_ids=ids[None], attention_mask=torch.ones(1, 4, dtype=torch.long)).logits[0]
    assert (full[0] - silent[0]).abs().max() > 0.1


def test_blocks_of_the_answer_are_counted_behind_the_prompt():
    spec = DenoiserSpec(mask_id=9, vocab_size=9, attention="block-causal", block_length=2, block_anchor="answer")
    columns, first = torch.arange(7)[None], torch.tensor([[0], [2]])
    assert spec.blocks(columns, first, 3).tolist() == [[-1, -1, -1, 0, 0, 1, 1]] * 2
    sequence = DenoiserSpec(mask_id=9, vocab_size=9, attention="block-causal", block_length=2)
    assert sequence.blocks(columns, first, 3).tolist() == [[0, 0, 1, 1, 2, 2, 3], [-1, -1, 0, 0, 1, 1, 2]]


def test_a_function_sees_rows_without_padding():
    seen = []

    def function(ids, time, style):
        seen.append((tuple(ids.shape), time.tolist(), style.tolist()))
        return torch.zeros(*ids.shape, 31) + ids[..., None] % 7

    spec = DenoiserSpec(mask_id=31, vocab_size=31, time_conditioned=True)
    style = torch.tensor([1.0, 2.0, 3.0])
    decode(
        CallableDenoiser(function, spec),
        [[1, 2], [3], [4, 5]],
        2,
        Recipe(unmask=Quota(tokens=1)),
        cond={"style": style},
    )
    assert seen[:2] == [((1, 3), [1.0], [2.0]), ((2, 4), [1.0, 1.0], [1.0, 3.0])]
    assert seen[2][1] == [0.5]


def test_wrong_shapes_of_logits_are_named():
    denoiser = CallableDenoiser(lambda ids: torch.zeros(*ids.shape, 5), SPEC)
    with pytest.raises(InputError, match=r"shape \(1, 3, 5\) for ids of shape \(1, 3\); \(rows, positions, 31\)"):
        decode(denoiser, [[1]], 2, TWO)


def test_logits_that_are_nan_are_refused():
    denoiser = CallableDenoiser(lambda ids: torch.full((*ids.shape, 31), torch.nan), SPEC)
    with pytest.raises(InputError, match="logits are NaN; look at"):
        decode(denoiser, [[1]], 2, TWO)


def test_half_precision_is_decided_on_in_float32():
    _, steps = recorded(decode, llama_denoiser(dtype=torch.bfloat16), [[1, 2]], 4, TWO)
    assert steps[0][1].dtype == torch.float32


def test_guidance_masks_the_prompt_and_costs_two_evaluations():
    denoiser = llama_denoiser()
    model, ids = tiny_llama("eager"), torch.tensor([1, 2, 3, MASK, MASK])
    whole = torch.ones(5, 5, dtype=torch.bool)
    cond, uncond = by_hand(model, ids, whole)[3:], by_hand(model, torch.full((5,), MASK), whole)[3:]
    seen = []
    recipe = Recipe(unmask=Quota(tokens=1), logits=TokenGuidance(scale=2.5))
    decoded = decode(denoiser, [[1, 2, 3]], 2, recipe, watch=lambda state: seen.append(state.logits))
    torch.testing.assert_close(seen[0][:, :MASK], (uncond + 2.5 * (cond - uncond))[:, :MASK], atol=5e-5, rtol=1e-4)
    assert decoded.nfe.tolist() == [4]
    assert decoded.token_forwards.tolist() == [20]


@pytest.fixture(scope="module")
def uvit():
    torch.manual_seed(0)
    return UVit2DModel(
        hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=8,
        vocab_size=20, codebook_size=18, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, sample_size=4,
    ).eval()  # fmt: skip


def uvit_conditions(rows):
    torch.manual_seed(1)
    return {
        "encoder_hidden_states": torch.randn(rows, 3, 8),
        "pooled_text_emb": torch.randn(rows, 8),
        "micro_conds": torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).expand(rows, -1),
    }


def test_an_image_of_tokens_is_decoded_with_guidance(uvit):
    cond, uncond = uvit_conditions(2), {k: v * 0 for k, v in uvit_conditions(2).items() if k != "micro_conds"}
    seen = []
    recipe = Recipe(unmask=Quota(steps=4), logits=TokenGuidance(scale=3.0))
    decoded = decode(
        UViTDenoiser(uvit, 4, 4), [[], []], 16, recipe, cond=cond, uncond=uncond,
        watch=lambda state: seen.append(state.logits.clone()),
    )  # fmt: skip
    ids = torch.full((2, 4, 4), 19)
    with torch.no_grad():
        c, u = uvit(ids, **cond), uvit(ids, **{**cond, **uncond})
    expected = (u + 3.0 * (c - u)).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)
    assert decoded.tokens.shape == (2, 16)
    assert int(decoded.tokens.max()) < 18
    assert decoded.nfe.tolist() == [8, 8]


def test_an_image_needs_its_conditions_and_its_size(uvit):
    denoiser = UViTDenoiser(uvit, 4, 4)
    with pytest.raises(
        InputError, match="needs encoder_hidden_states, micro_conds, pooled_text_emb; give them in cond"
    ):
        decode(denoiser, [[]], 16, Recipe(unmask=Quota(steps=4)))
    with pytest.raises(InputError, match="9 tokens, the image 4 x 4; decode with an empty prompt and gen_length=16"):
        decode(denoiser, [[]], 9, Recipe(unmask=Quota(tokens=4)))


class _NoPositions(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        raise NotImplementedError


def test_models_that_cannot_be_asked_are_refused():
    spec = DenoiserSpec(mask_id=MASK, vocab_size=24)
    with pytest.raises(InputError, match="_NoPositions takes no argument 'position_ids'; write a Denoiser"):
        TransformersDenoiser(_NoPositions(), spec)
    with pytest.raises(InputError, match=r"training mode, where dropout is random; call model.eval\(\) first"):
        TransformersDenoiser(tiny_llama().train(), spec)
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 attention, which takes no mask of four dimensions"):
        TransformersDenoiser(model, spec)


@pytest.mark.parametrize(("fields", "words"), [
    ({"mask_id": 3, "vocab_size": 9, "eos_ids": (3,)}, "mask_id 3 is among eos_ids"),
    ({"mask_id": 3, "vocab_size": 9, "eos_ids": (9,)}, r"eos_ids \(9,\) must be ids of tokens"),
    ({"mask_id": 3, "vocab_size": 1}, "got 1"),
    ({"mask_id": 3, "vocab_size": 9, "logit_shift": 2}, "logit_shift is 0 or 1; got 2"),
    ({"mask_id": 3, "vocab_size": 9, "attention": "block-causal"}, "block_length is given with"),
    ({"mask_id": 3, "vocab_size": 9, "attention": "block-causal", "block_length": 0}, "counts positions; got 0"),
])  # fmt: skip
def test_a_spec_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        DenoiserSpec(**fields)
