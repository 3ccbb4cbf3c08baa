"""A pass through blocks of which some rows run, and rows that are picked and put back."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewstep.samplers import Evaluation, InputError, Memory
from fewstep.samplers.cache_call import Passing
from fewstep.samplers.rows import NOT_BATCHED, narrowed, pick_rows, put_rows, stacked_branches
from fewstep.samplers.stack_pass import Layouts, StackPass


class _Adds(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))

    def forward(self, hidden_states, shift):
        return hidden_states + torch.tanh(hidden_states @ self.matrix + shift)


class _Walk:
    """A network of three blocks between which features of a ControlNet are added, run with some rows kept."""

    def __init__(self, in_place=False):
        self.blocks = [_Adds(seed) for seed in range(3)]
        self.memory, self.layouts, self.in_place = Memory(), Layouts(), in_place

    def __call__(self, x, control, picks=None):
        evaluation = Evaluation("net", nn.Identity(), {"sample": x}, 0, 0, 0.0)
        self.evaluation = evaluation
        way = StackPass(self.memory, self.layouts, evaluation, picks)
        state, self.added = x, []
        for index, block in enumerate(self.blocks):
            before = state
            state = way.through(Passing(f"net.{index}", block, (state,), {"shift": x[:, :1]}, evaluation))
            self.added.append(state - before)
            state = state.add_(control) if self.in_place else state + control
        way.finish()
        return state

    def is_kept(self):
        return StackPass.is_kept(self.memory, self.layouts, self.evaluation)


def test_what_is_added_between_the_blocks_is_that_of_the_step():
    draw = torch.Generator().manual_seed(5)
    first, second, control, later = (torch.randn(4, 3, generator=draw) for _ in range(4))
    walk = _Walk()
    walk(first, control)
    added = sum(walk.added)
    picks = torch.tensor([1, 3])
    mixed = walk(second, later, picks)
    torch.testing.assert_close(mixed[[0, 2]], (second + added + 3 * later)[[0, 2]])
    torch.testing.assert_close(mixed[picks], _Walk()(second, later)[picks])
    again = walk(first, control, torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(again[[0, 2]], (first + added + 3 * control)[[0, 2]])
    whole = _Walk()
    whole(second, later)
    torch.testing.assert_close(again[picks], (first + sum(whole.added) + 3 * control)[picks])


def test_what_is_added_in_place_is_noticed_and_not_kept():
    draw = torch.Generator().manual_seed(5)
    first, second, control, later = (torch.randn(4, 3, generator=draw) for _ in range(4))
    walk = _Walk(in_place=True)
    walk(first, control)
    assert not walk.is_kept()
    out = walk(first, control)
    assert walk.is_kept()
    torch.testing.assert_close(out, _Walk()(first, control))
    answer = walk(second, later, torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(answer, second + (out - first - 3 * control) + 3 * later)


def test_blocks_that_are_none_are_refused_while_they_run():
    class Overwrites(nn.Module):
        def forward(self, hidden_states):
            return hidden_states.mul_(2.0) + 1

    evaluation = Evaluation("net", nn.Identity(), {"sample": torch.ones(2, 3)}, 0, 0, 0.0)
    way = StackPass(Memory(), Layouts(), evaluation, None)
    passing = Passing("net.0", Overwrites(), (torch.ones(2, 3),), {}, evaluation)
    with pytest.raises(InputError, match="Overwrites writes into its inputs"):
        way.through(passing)
    with pytest.raises(InputError, match=r"net.0 runs twice in one evaluation"):
        way.through(passing)


def test_samples_that_are_packed_into_one_sequence_are_refused():
    class Packed(nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1

    for shape in ((1, 6, 3), (6, 3)):
        evaluation = Evaluation("net", nn.Identity(), {"sample": torch.ones(2, 3)}, 0, 0, 0.0)
        passing = Passing("net.0", Packed(), (torch.ones(shape),), {}, evaluation)
        with pytest.raises(InputError, match=r"Packed gives \(.*\) for 2 samples: it packs them into one sequence"):
            StackPass(Memory(), Layouts(), evaluation, None).through(passing)


def test_rows_are_picked_and_put_back():
    x = torch.arange(12).reshape(6, 2)
    picks = torch.tensor([2, 0])
    assert pick_rows("x", x, picks, 3).tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]
    assert torch.equal(put_rows(x, pick_rows("x", x, picks, 3), picks, 3), x)
    assert put_rows(x, -pick_rows("x", x, picks[:1], 3), picks[:1], 3).tolist()[4:] == [[-8, -9], [-10, -11]]
    pair = {"image_rotary_emb": (x, x.reshape(3, 2, 2)), "mask": [x, None, 3]}
    picked = pick_rows("kwargs", pair, picks, 3)
    assert picked["image_rotary_emb"][0] is x
    assert picked["image_rotary_emb"][1].shape == (2, 2, 2)
    assert picked["mask"][0].shape == (4, 2)
    assert picked["mask"][1:] == [None, 3]
    assert "rope" in NOT_BATCHED


def test_an_evaluation_of_some_rows():
    inputs = {"x": [torch.ones(1), torch.zeros(2), torch.zeros(3)], "timestep": torch.tensor([1.0, 2.0, 3.0])}
    whole = Evaluation("net", nn.Identity(), inputs, 0, 0, 0.0, kept=(4, 5, 6))
    some = narrowed(whole, torch.tensor([2, 0]))
    assert (some.rows, some.kept) == (2, (6, 4))
    assert [len(item) for item in some.inputs["x"]] == [3, 1]
    assert some.inputs["timestep"].tolist() == [3.0, 1.0]
    assert narrowed(replace(whole, kept=None), torch.tensor([1])).kept == (1,)


def test_stacked_branches_are_seen_in_the_samples():
    a, b = torch.zeros(1, 3), torch.ones(1, 3)
    for samples, branches in [((a, b), 1), ((a, b, a, b), 2), ((a, b) * 3, 3), ((a, b, b, a), 1), ((a,), 1)]:
        assert stacked_branches({"hidden_states": torch.cat(samples)}) == branches
        assert stacked_branches({"x": list(samples)}) == branches
    assert stacked_branches({"x": [a, torch.ones(2, 3)]}) == 1
    assert stacked_branches({}) == 1
