"""The filter of Learn2PD: what it sees, what it learns from, and decoding with it."""

import oracles
import pytest
import torch
from safetensors.torch import save_file
from token_laws import by_position
from token_models import MASK, PROMPTS, llama_denoiser

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    FilterData,
    Fixed,
    Learned,
    Nested,
    Query,
    Quota,
    Recipe,
    Threshold,
    TokenFilter,
    Whole,
    decode,
    replay,
    train_filter,
)


def threshold_filter(length, threshold):
    """The filter that takes a token for final when its confidence exceeds a threshold."""
    network = TokenFilter(length)
    first, _, second = network.layers
    with torch.no_grad():
        for layer, scale, bias in ((first, 1.0, 0.0), (second, 1e4, -1e4 * threshold)):
            layer.weight.copy_(scale * torch.eye(length))
            layer.bias.fill_(bias)
    return network


@pytest.mark.parametrize("blocks", [Fixed(length=8), Whole()], ids=["fixed", "whole"])
def test_a_filter_that_is_a_threshold_decodes_like_one(blocks):
    network = threshold_filter(8, 0.5)
    for denoiser, prompts in ((llama_denoiser(), PROMPTS), (oracles.shuffle(4).denoiser(), [[4, 2, 1, 3]] * 2)):
        recipe = Recipe(blocks=blocks, unmask=Learned(length=8, threshold=0.5), propose={"temperature": 0.7})
        ours = decode(denoiser, prompts, 8, recipe, resources={"token-filter": network})
        same = decode(denoiser, prompts, 8, recipe.replace(unmask=Threshold(threshold=0.5)))
        assert torch.equal(ours.tokens, same.tokens)
        assert torch.equal(ours.reveal_step, same.reveal_step)


def test_what_is_committed_and_what_lies_past_the_block_is_sure():
    seen = []

    class Spy(TokenFilter):
        def forward(self, confidences):
            seen.append(confidences)
            return super().forward(confidences)

    recipe = Recipe(blocks=Fixed(length=4), unmask=Learned(length=4, threshold=1.0))
    decode(by_position([0.3, 0.9, 0.5, 0.4, 0.6, 0.7]), [[]], 6, recipe, resources={"token-filter": Spy(4)})
    rows = torch.cat(seen).tolist()
    assert rows[0] == pytest.approx([0.3, 0.9, 0.5, 0.4])
    assert rows[1] == pytest.approx([0.3, 1.0, 0.5, 0.4])
    assert rows[4] == pytest.approx([0.6, 0.7, 1.0, 1.0])


def replay_by_hand(denoiser, prompt, truth, length):
    """One row, straight from the definition."""
    canvas = torch.tensor([[*prompt, *[MASK] * length]])
    total, out = canvas.shape[1], []
    while (canvas == MASK).any():
        everything = torch.ones(1, total, dtype=torch.bool)
        logits = denoiser.forward(
            Query(canvas, torch.arange(total)[None], torch.arange(total)[None], torch.tensor([total]),
                  everything[:, None].expand(1, total, total), everything, torch.tensor([0]))
        )  # fmt: skip
        logits[:, MASK] = -torch.inf
        probs, tokens = logits.softmax(-1).max(-1)
        masked = canvas[0] == MASK
        right = masked & (tokens == truth)
        mine = slice(len(prompt), None)
        out.append((torch.where(masked, probs, 1.0)[mine], right[mine], masked[mine]))
        chosen = right if right.any() else masked & (probs == probs[masked].max())
        canvas[0, chosen] = truth[chosen]
    return [torch.stack(part) for part in zip(*out, strict=True)]


def test_a_replay_commits_what_equals_the_reference_and_labels_it():
    denoiser = llama_denoiser()
    for prompt in PROMPTS[:3]:
        reference = decode(denoiser, [prompt], 8, Recipe(unmask=Quota(tokens=1)))
        data = replay(denoiser, [prompt], reference, Whole(), 8)
        features, final, counted = replay_by_hand(denoiser, prompt, reference.tokens[0], 8)
        torch.testing.assert_close(data.features, features)
        assert torch.equal(data.final, final)
        assert torch.equal(data.counted, counted)
    together = replay(denoiser, PROMPTS, decode(denoiser, PROMPTS, 8, Recipe(unmask=Quota(tokens=1))), Whole(), 8)
    assert len(together.features) > len(data.features)
    other = decode(denoiser, PROMPTS, 8, Recipe(unmask=Quota(tokens=1)))
    with pytest.raises(InputError, match="the reference to replay is of other prompts or another length"):
        replay(denoiser, PROMPTS[::-1], other, Whole(), 8)
    with pytest.raises(InputError, match="a block has 8 positions and the token filter is made for 4"):
        replay(denoiser, PROMPTS, other, Whole(), 4)


def test_a_replay_of_what_is_certain_takes_one_step_per_block():
    task = oracles.copy()
    reference = decode(task.denoiser(), task.prompts(3), 6, Recipe(unmask=Quota(tokens=1)))
    data = replay(task.denoiser(), task.prompts(3), reference, Fixed(length=4), 4)
    assert data.features.shape == (6, 4)
    assert torch.equal(data.final, data.counted)
    assert data.counted.sum(1).tolist() == [4, 4, 4, 2, 2, 2]


def test_a_filter_learns_a_threshold_and_survives_its_file(tmp_path):
    """Confidences above 0.7 are final; committed positions, which say nothing, are labelled at random."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(600, 16, generator=generator)
    counted = torch.rand(600, 16, generator=generator) < 0.8
    final = torch.where(counted, features > 0.7, torch.rand(600, 16, generator=generator) < 0.5)
    features = torch.where(counted, features, 1.0)
    train, rest = slice(0, 400), slice(400, None)
    network = train_filter(FilterData(features[train], final[train], counted[train]), steps=1200)
    right = ((network(features[rest]) > 0) == final[rest])[counted[rest]].double().mean()
    assert right > 0.85  # 0.7 by always saying no
    again = train_filter(FilterData(features[train], final[train], counted[train]), steps=3)
    torch.rand(3)
    once = train_filter(FilterData(features[train], final[train], counted[train]), steps=3)
    assert torch.equal(again(features), once(features))
    network.save(tmp_path / "token-filter.safetensors")
    loaded = TokenFilter.load(tmp_path / "token-filter.safetensors")
    assert torch.equal(loaded(features), network(features))
    with pytest.raises(InputError, match="no open position to learn from"):
        train_filter(FilterData(features, final, torch.zeros_like(counted)))


def test_a_recipe_reads_the_filter_beside_it(tmp_path):
    task = oracles.shuffle(4)
    recipe = Recipe(blocks=Fixed(length=4), unmask=Learned(length=4))
    threshold_filter(4, 0.4).save(tmp_path / "token-filter.safetensors")
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    assert loaded.replace(name="other").folder == tmp_path
    assert decode(task.denoiser(), task.prompts(1), 4, loaded).nfe.item() == 3  # two of two at 0.5
    with pytest.raises(InputError, match=r"learned policy reads 'token-filter\.safetensors' beside the recipe"):
        decode(task.denoiser(), task.prompts(1), 4, recipe)
    outside = Recipe.load(tmp_path / "recipe.json").replace(unmask=Learned(length=4, file="../x.safetensors"))
    with pytest.raises(InputError, match="outside the recipe's folder; put it beside the recipe"):
        decode(task.denoiser(), task.prompts(1), 4, outside)
    missing = outside.replace(unmask=Learned(length=4, file="x.safetensors"))
    with pytest.raises(InputError, match=r"names 'x\.safetensors', which is not in"):
        decode(task.denoiser(), task.prompts(1), 4, missing)


def test_filters_that_do_not_fit_are_refused(tmp_path):
    denoiser, prompt = by_position([0.5] * 6), [[]]
    with pytest.raises(InputError, match="a filter for blocks of 32, and the recipe has blocks of 8; use the block"):
        Recipe(blocks=Fixed(length=8), unmask=Learned())
    with pytest.raises(InputError, match="a filter for blocks of 32, and the recipe has blocks of 8"):
        Recipe(blocks=Nested(length=32, inner=8), unmask=Learned())
    with pytest.raises(InputError, match="made for blocks of 8, and the learned policy says 4"):
        decode(denoiser, prompt, 6, Recipe(unmask=Learned(length=4)), resources={"token-filter": TokenFilter(8)})
    with pytest.raises(InputError, match="a block has 6 positions and the token filter is made for 4"):
        decode(denoiser, prompt, 6, Recipe(unmask=Learned(length=4)), resources={"token-filter": TokenFilter(4)})
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is not a token filter of this fewstep; train one with"):
        TokenFilter.load(tmp_path / "x.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "y.safetensors", {"format": "fewstep token filter 1"})
    with pytest.raises(InputError, match="has not the tensors of a token filter; train it again"):
        TokenFilter.load(tmp_path / "y.safetensors")
