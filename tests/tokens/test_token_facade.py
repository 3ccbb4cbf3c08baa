"""Recipes as schedulers of stock diffusers pipelines, with dummy models as diffusers' own tests have."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AmusedPipeline, LLaDA2Pipeline, UVit2DModel, VQModel
from token_cases import CASES, recipes

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    CallableDenoiser,
    DenoiserSpec,
    Dfa,
    DualCache,
    Edit,
    EosExit,
    Fixed,
    Guider,
    Order,
    Prophet,
    Proposal,
    Quota,
    Recipe,
    Threshold,
    TokenGuidance,
    TokenScheduler,
    UViTDenoiser,
    decode,
)

MASK, EOS, SIZE = 19, 18, 20


class DummyModel(torch.nn.Module):
    """Logits of the position and of how many tokens are visible, at whole windows."""

    def __init__(self, sharp=3.0):
        super().__init__()
        self.table = torch.nn.Parameter(sharp * torch.randn(64, SIZE, generator=torch.Generator().manual_seed(8)))
        self.windows = []

    @property
    def dtype(self):
        return torch.float32

    @property
    def device(self):
        return self.table.device

    def of(self, ids):
        visible = (ids != MASK).sum(1, keepdim=True)
        return self.table[(torch.arange(ids.shape[1]) * 5 + visible * 3) % 64]

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.windows.append(input_ids.clone())
        return SimpleNamespace(logits=self.of(input_ids))


def text_pipeline(recipe, block=8, model=None):
    pipe = LLaDA2Pipeline(model=model or DummyModel(), scheduler=TokenScheduler(recipe, block, eos_token_id=EOS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(pipe, prompt, length, **options):
    options = {"mask_token_id": MASK, "eos_token_id": None, "output_type": "seq", "num_inference_steps": 32} | options
    return pipe(input_ids=torch.as_tensor(prompt), gen_length=length, **options).sequences


SLOTS = ("unmask", "exit", "remask", "logits")
WORKING = {
    label: recipe
    for label, recipe in recipes().items()
    if label.split(":")[0] in SLOTS
    and not recipe.branches
    and label not in ("exit: eos", "exit: eos dropped", "exit: eot")
}


def test_there_are_policies_of_all_slots_to_try():
    assert {label.split(":")[0] for label in WORKING} == set(SLOTS)
    assert len(WORKING) > sum(len(CASES[slot]) for slot in SLOTS) - 6


@pytest.mark.parametrize("label", WORKING)
def test_policies_work_in_llada2_pipeline(label):
    """Every policy fills each block, at most in the steps of the call, and the generator's seed decides."""
    model = DummyModel()
    pipe = text_pipeline(WORKING[label], model=model)
    prompt = [[1, 2, 3], [4, 5, 6]]
    one, same, other = (written(pipe, prompt, 13, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one.shape == (2, 13)
    assert not (one == MASK).any()
    assert torch.equal(one, same)
    assert not torch.equal(one, other) or label == "remask: edit"  # it settles on what is likeliest
    assert len(model.windows) <= 3 * 2 * 32
    assert all(torch.equal(window[:, :3], torch.tensor(prompt)) for window in model.windows)


@pytest.mark.parametrize("unmask", [Quota(tokens=2), Threshold(threshold=0.6), Quota(steps_per_block=3)])
def test_a_block_in_the_pipeline_is_a_decoding(unmask):
    """Greedy, an empty prompt, one block: the tokens and the number of evaluations of `decode`."""
    recipe, model = Recipe(unmask=unmask), DummyModel()
    pipe = text_pipeline(recipe, block=12, model=model)
    sequences = written(pipe, torch.zeros(3, 0, dtype=torch.long), 12)
    denoiser = CallableDenoiser(model.of, DenoiserSpec(mask_id=MASK, vocab_size=SIZE, eos_ids=(EOS,)))
    decoded = decode(denoiser, [[]] * 3, 12, recipe)
    assert torch.equal(sequences, decoded.tokens)
    assert len(model.windows) == decoded.nfe.max()


def test_rows_that_ended_are_left_as_they_are_and_do_not_hold_the_others_up():
    """The pipeline freezes a row at its end; the block goes on for the other row, and no step is spent on the first."""

    class Ends(DummyModel):
        def of(self, ids):
            logits = super().of(ids).clone()
            logits[:, 3] = torch.where((ids[:, :1] == 1) & (torch.arange(SIZE) == EOS), 50.0, logits[:, 3])
            logits[1:, :, EOS] = -50.0
            return logits

    model = Ends()
    recipe = Recipe(unmask=Order(random=False))
    sequences = written(text_pipeline(recipe, model=model), [[1, 2, 3], [4, 5, 6]], 13, eos_token_id=EOS)
    assert sequences[0, 0] == EOS
    assert (sequences[0, 1:] == MASK).all()
    assert not (sequences[1] == MASK).any()
    assert len(model.windows) == 5 + 8


def test_the_last_step_of_a_call_commits_what_is_left():
    model = DummyModel()
    sequences = written(text_pipeline(Recipe(unmask=Quota(tokens=1)), model=model), [[1, 2]], 14, num_inference_steps=3)
    assert not (sequences == MASK).any()
    assert len(model.windows) == 2 * 3


def test_edits_reach_the_pipeline():
    """A token that the model comes to doubt is replaced in the block, after its masks are gone."""
    recipe = Recipe(unmask=Quota(tokens=4), remask=Edit(threshold=0.3, post_steps=4))
    plain, edited = (
        written(text_pipeline(each, model=DummyModel(5.0)), [[1, 2]], 6)
        for each in (recipe.replace(remask={"type": "none"}), recipe)
    )
    assert not torch.equal(plain, edited)
    assert not (edited == MASK).any()


def picture_pipeline(recipe):
    """Tiny, with embeddings in place of prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UVit2DModel(
            hidden_size=8, use_bias=False, hidden_dropout=0.0, cond_embed_dim=8, micro_cond_encode_dim=2,
            micro_cond_embed_dim=10, encoder_hidden_size=8, vocab_size=33, codebook_size=32, in_channels=8,
            block_out_channels=8, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
            num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0, intermediate_size=8,
            layer_norm_eps=1e-06, ln_elementwise_affine=True,
        ).eval()  # fmt: skip
        vqvae = VQModel(
            latent_channels=8,
            num_vq_embeddings=32,
            norm_num_groups=4,
            block_out_channels=[8],
            lookup_from_codebook=True,
        )
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    pipe = AmusedPipeline(vqvae, None, None, network, TokenScheduler(recipe, mask_token_id=32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


EMBEDS = {
    "prompt_embeds": torch.ones(2, 8) * torch.tensor([[0.1], [0.9]]),
    "encoder_hidden_states": torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8),
}


def painted(pipe, **options):
    options = {
        "height": 8,
        "width": 8,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "num_inference_steps": 12,
    } | options
    return pipe(**EMBEDS, **options).images


@pytest.mark.parametrize("unmask", [Quota(tokens=9), Threshold(threshold=0.3)])
def test_a_picture_in_the_pipeline_is_a_decoding(unmask):
    """Also in the number of evaluations: when nothing is masked, the call is over."""
    recipe = Recipe(unmask=unmask)
    pipe = picture_pipeline(recipe)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    tokens = painted(pipe, num_inference_steps=64)
    spent = len(calls)
    denoiser = UViTDenoiser(pipe.transformer, 8, 8)
    cond = {
        "encoder_hidden_states": EMBEDS["encoder_hidden_states"],
        "pooled_text_emb": EMBEDS["prompt_embeds"],
        "micro_conds": torch.tensor([[8.0, 8, 0, 0, 6]]).expand(2, -1),
    }
    decoded = decode(denoiser, [[], []], 64, recipe, cond=cond)
    assert torch.equal(tokens.flatten(1), decoded.tokens)
    assert spent == decoded.nfe.max()
    assert 1 < spent <= 64


@pytest.mark.parametrize(
    "label", ["unmask: maskgit", "unmask: quota at random", "remask: remdm cap", "unmask: ancestral"]
)
def test_policies_work_in_amused_pipeline_with_its_guidance(label):
    negative = {"negative_prompt_embeds": torch.zeros(2, 8), "negative_encoder_hidden_states": torch.zeros(2, 4, 8)}
    pipe = picture_pipeline(WORKING[label])
    one, same, other = (
        painted(pipe, guidance_scale=3.0, generator=torch.Generator().manual_seed(seed), **negative)
        for seed in (3, 3, 4)
    )
    assert one.shape == (2, 8, 8)
    assert ((one >= 0) & (one < 32)).all()
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_picture_comes_out_of_the_decoder():
    images = painted(picture_pipeline(Recipe(unmask=Quota(tokens=16))), output_type="np")
    assert images.shape == (2, 8, 8, 3)


def test_the_configuration_carries_the_recipe():
    recipe = Recipe(unmask=Quota(tokens=3), propose=Proposal(temperature=0.5))
    scheduler = TokenScheduler(recipe, block_length=4, mask_token_id=9)
    again = TokenScheduler.from_config(scheduler.config)
    assert again.recipe == recipe
    assert (again.config.block_length, again.config.mask_token_id) == (4, 9)
    assert TokenScheduler("fast-dllm").recipe.unmask == Threshold(threshold=0.9)


@pytest.mark.parametrize(("slots", "words"), [
    ({"cache": DualCache()}, "the dual cache cannot work as a scheduler: the pipeline evaluates everything itself"),
    ({"blocks": Fixed()}, "the fixed block schedule cannot .*: the pipeline walks through the blocks"),
    ({"logits": TokenGuidance(scale=2)}, "guidance cannot .*: .*; use its own guidance_scale"),
    ({"exit": EosExit()}, "the eos exit cannot .*: the pipeline ends rows itself"),
    ({"constraint": Dfa(pattern="a")}, "the dfa constraint cannot .*: a scheduler does not see the whole answer"),
    ({"unmask": Order(random=False), "scorer": Guider(top_k=1)}, "the guider scorer cannot .*: .* see the prompt"),
])  # fmt: skip
def test_what_the_pipeline_owns_is_refused(slots, words):
    with pytest.raises(InputError, match=words):
        TokenScheduler(Recipe(**({"unmask": Quota(tokens=1)} | slots)))


def test_settings_of_a_call_that_contradict_the_recipe_are_refused():
    pipe = text_pipeline(Recipe(unmask=Quota(tokens=1), exit=Prophet()))
    for name, value in {"temperature": 0.7, "threshold": 0.9, "editing_threshold": None, "top_k": 5}.items():
        with pytest.raises(
            InputError, match=f"{name}={value} contradicts the recipe of the scheduler; say it in the recipe"
        ):
            written(pipe, [[1]], 4, **{name: value})
    with pytest.raises(InputError, match=r"temperature=\(3, 1\) contradicts the recipe"):
        painted(picture_pipeline(Recipe(unmask=Quota(tokens=1))), temperature=(3, 1))
    scheduler = TokenScheduler(Recipe(unmask=Quota(tokens=1)))
    logits, ids = torch.zeros(1, 4, SIZE), torch.full((1, 4), MASK)
    with pytest.raises(
        InputError, match=r"takes no starting_mask_ratio=0.5; a recipe fills in masks from the first step"
    ):
        scheduler.step(logits, 0, ids, starting_mask_ratio=0.5, mask_token_id=MASK)
    with pytest.raises(InputError, match="the scheduler needs the mask's id; make it with mask_token_id"):
        scheduler.step(logits, 0, ids)
    with pytest.raises(InputError, match="to start midway use the pipeline's scheduler"):
        scheduler.add_noise(ids, 3)
    with pytest.raises(InputError, match="num_inference_steps counts steps; got 0"):
        scheduler.set_timesteps(0)
    assert len(scheduler.step(logits, 0, ids, mask_token_id=MASK, return_dict=False)) == 6
