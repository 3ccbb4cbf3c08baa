"""The gate, against the host's first-block cache, TeaCache written out, and samples that run alone."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit
from torch import nn
from toy_cache import Blocks
from zoo import ZOO

from fewstep.samplers import Evaluation, GuidanceSchedule, InputError, Memory, Plan, SpacingGrid, attach
from fewstep.samplers.cache_call import Passing
from fewstep.samplers.gate import Gate
from fewstep.samplers.rows import NOT_BATCHED, narrowed, pick_rows, put_rows, stacked_branches
from fewstep.samplers.stack_pass import Layouts, StackPass
from fewstep.samplers.stacks import block_names

CRITERIA = ("first-block", "modulated-input")
UNETS = ("ddim", "ddpm", "stable-diffusion", "img2img", "inpaint", "controlnet", "ip-adapter", "sdxl", "stable-video")
UNETS += ("animatediff",)
TRANSFORMERS = [name for name in ZOO if name not in UNETS]
ALIKE = ("flux-img2img", "flux-kontext", "pixart-sigma", "amused")
"Networks of other families; and tokens, which are drawn for the whole batch at once."
ALWAYS = 1e9
"A threshold that no change reaches."

pytestmark = pytest.mark.filterwarnings("ignore:the gate cache computes all")


def gated(family, pipe, part, **options):
    """Samples of a call with a gate, and what it counted."""
    with attach(pipe, Plan(caches=part)) as handle:
        return family.call(pipe, **options), handle.stats


class Watch:
    """Rows that run in each block, one list for each evaluation of the network, counted by forward hooks."""

    def __init__(self, network):
        self.names, self.evaluations = block_names(network), []
        network.register_forward_pre_hook(lambda *_: self.evaluations.append({}))
        for name in self.names:
            network.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, output, name=name: self.see(name, args, kwargs), with_kwargs=True
            )

    def see(self, name, args, kwargs):
        tensors = (value for value in (*kwargs.values(), *args) if isinstance(value, torch.Tensor))
        self.evaluations[-1][name] = kwargs.get("hidden_states", args[0] if args else next(tensors)).shape[0]

    def ran(self):
        """Names of the blocks of each evaluation."""
        return [tuple(evaluation) for evaluation in self.evaluations]


@functools.cache
def plain_run(name):
    """A family's pipeline, its samples of three seeds in one batch, and one by one."""
    family = ZOO[name]
    pipe = family.build()
    alone = torch.cat([family.call(pipe, batch=1, seed=seed, steps=6) for seed in range(3)])
    return pipe, family.call(pipe, batch=3, steps=6), alone


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_threshold_zero_changes_nothing(name):
    pipe, plain, _ = plain_run(name)
    same, stats = gated(ZOO[name], pipe, Gate(threshold=0, criterion="modulated-input"), batch=3, steps=6)
    assert torch.equal(same, plain)
    assert all(rows.skipped == 0 for rows in stats.modules.values())


MATES_DIFFER = {
    "dit": 1.0,
    "pixart-alpha": 0.1,
    "sana": 0.1,
    "hunyuan-dit": 0.3,
    "lumina2": 0.1,
    "cogview4": 0.3,
    "chroma": 1.0,
    "hunyuan-video": 0.3,
    "flux-fill": 0.3,
    "allegro": 0.1,
    "kandinsky5": 0.3,
    "stable-audio": 0.3,
}
"Thresholds at which three samples do not compute in the same steps."


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in ALIKE])
def test_a_sample_does_not_depend_on_its_batch_mates(name, criterion):
    family = ZOO[name]
    pipe, plain, plain_alone = plain_run(name)
    rounding = (plain - plain_alone).abs().max()
    part = Gate(threshold=MATES_DIFFER.get(name, 0.3), criterion=criterion)
    together, stats = gated(family, pipe, part, batch=3, steps=6)
    alone = [gated(family, pipe, part, batch=1, seed=seed, steps=6) for seed in range(3)]
    error = (together - torch.cat([samples for samples, _ in alone])).abs().max()
    assert error <= 20 * rounding + 1e-6 * plain.abs().max()
    for module, rows in stats.modules.items():
        assert rows.skipped == sum(stats_alone.modules[module].skipped for _, stats_alone in alone)
    if name in MATES_DIFFER and criterion == "first-block":
        rows_of_one = stats.steps[0].rows / stats.steps[0].evaluations
        assert rows.run < rows.calls * rows_of_one, "all three computed in the same steps"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["dit", "lumina2", "flux", "latte", "hunyuan-dit", "kandinsky5"])
def test_counts_what_hooks_count(name, criterion):
    family = ZOO[name]
    pipe = family.build()
    network = getattr(pipe, family.denoiser)
    watch = Watch(network)
    threshold = MATES_DIFFER.get(name, 0.3)
    _, stats = gated(family, pipe, Gate(threshold=threshold, criterion=criterion), batch=3, steps=5)
    for block in watch.names:
        rows = stats.modules[f"{family.denoiser}.{block}"]
        seen = [evaluation[block] for evaluation in watch.evaluations if block in evaluation]
        full = max(seen)
        assert rows.calls == len(seen)
        assert rows.run * full == sum(seen) * (stats.rows // len(watch.evaluations))
        assert rows.run + rows.skipped == stats.rows


@pytest.mark.parametrize(("criterion", "left"), [("first-block", 1), ("modulated-input", 0)])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan", "latte", "mochi"])
def test_a_step_that_every_row_skips_runs_no_block_but_the_first(name, criterion, left):
    family = ZOO[name]
    pipe = family.build()
    watch = Watch(getattr(pipe, family.denoiser))
    gated(family, pipe, Gate(threshold=ALWAYS, criterion=criterion), steps=3)
    calls = len(watch.evaluations) // 3
    assert watch.ran() == [watch.names] * calls + [watch.names[:left]] * 2 * calls


def test_settings_that_compute_whatever_changed():
    pipe = tiny_dit(layers=3)
    watch = Watch(pipe.transformer)
    part = Gate(threshold=ALWAYS, warmup=2, last_steps=1, max_skips=2)
    with attach(pipe, Plan(grid=SpacingGrid(steps=9), caches=part)):
        pipe(**call_arguments(pipe))
    assert [len(blocks) > 1 for blocks in watch.ran()] == [True, True, False, False, True, False, False, True, True]


def test_warmup_counts_from_where_the_pipeline_starts():
    family = ZOO["flux-img2img"]
    pipe = family.build()
    watch = Watch(pipe.transformer)
    gated(family, pipe, Gate(threshold=ALWAYS, warmup=2), steps=4)
    assert [len(blocks) > 1 for blocks in watch.ran()] == [True, True, False, False]


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "wan", "ltx", "cogview4", "qwen-image"])
@pytest.mark.parametrize("threshold", [0.1, 0.4])
def test_is_the_hosts_first_block_cache_for_one_sample_without_guidance(name, threshold):
    """The host compares batch means and skips a change equal to the threshold; with one sample that is the same."""
    family = ZOO[name]
    off = {} if family.guidance == "embedded" else {"guidance_scale": 1.0}
    if name == "qwen-image":
        off = {"true_cfg_scale": 1.0}
    pipe, peer = family.build(), family.build()
    watches = Watch(pipe.transformer), Watch(peer.transformer)
    apply_first_block_cache(peer.transformer, FirstBlockCacheConfig(threshold=threshold))
    with peer.transformer.cache_context("cond"):
        expected = family.call(peer, batch=1, steps=8, **off)
    ours, stats = gated(family, pipe, Gate(threshold=threshold), batch=1, steps=8, **off)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    last = stats.modules[f"transformer.{watches[0].names[-1]}"]
    if threshold == 0.4:
        assert last.skipped > 0
    plain = family.call(family.build(), batch=1, steps=8, **off)
    assert torch.equal(ours, plain) == (last.skipped == 0)


class Tea(nn.Module):
    """TeaCache (arXiv:2411.19108) around the blocks of a DiT, for one sample."""

    def __init__(self, blocks, threshold, coefficients):
        super().__init__()
        self.blocks, self.threshold, self.coefficients = blocks, threshold, coefficients
        self.norm1 = blocks[0].norm1
        self.before, self.sum, self.computed, self.residual = None, 0.0, [], None

    def forward(self, hidden_states, timestep=None, class_labels=None, **rest):
        modulated = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)[0]
        if self.before is None:
            compute = True
        else:
            change = ((modulated - self.before).abs().mean() / self.before.abs().mean()).item()
            powers = range(len(self.coefficients) - 1, -1, -1)
            self.sum += sum(factor * change**power for factor, power in zip(self.coefficients, powers, strict=True))
            compute = self.sum >= self.threshold
        self.before = modulated
        self.computed.append(compute)
        if not compute:
            return hidden_states + self.residual
        self.sum, state = 0.0, hidden_states
        for block in self.blocks:
            state = block(state, timestep=timestep, class_labels=class_labels, **rest)
        self.residual = state - hidden_states
        return state


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.5, 1.5, -0.02)])
def test_is_teacache_for_one_sample_without_guidance(coefficients):
    family = ZOO["dit"]
    pipe, peer = family.build(), family.build()
    tea = Tea(peer.transformer.transformer_blocks, 1.2, coefficients)
    peer.transformer.transformer_blocks = nn.ModuleList([tea])
    expected = family.call(peer, batch=1, steps=12, guidance_scale=1.0)
    watch = Watch(pipe.transformer)
    part = Gate(threshold=1.2, criterion="modulated-input", coefficients=coefficients)
    ours, _ = gated(family, pipe, part, batch=1, steps=12, guidance_scale=1.0)
    assert 1 < sum(tea.computed) < 12
    assert [bool(blocks) for blocks in watch.ran()] == tea.computed
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_stacked_branches_of_a_sample_decide_together():
    """Rows of both branches have the same label at both ends of the gathered batch: a class and the null class."""
    pipe = tiny_dit(layers=3)
    labels = []
    pipe.transformer.transformer_blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    with attach(pipe, Plan(grid=SpacingGrid(steps=12), caches=Gate(threshold=0.6))):
        pipe(**call_arguments(pipe, batch=3) | {"class_labels": [1, 2, 3]})
    assert {len(each) for each in labels} > {6}
    for each in labels:
        half = len(each) // 2
        assert each[half:] == [1000] * half
        assert 1000 not in each[:half]


@pytest.mark.parametrize("name", ["wan", "lumina2", "flux-true-cfg", "kandinsky5"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_branches_in_turn_follow_the_first_and_keep_their_own(name, criterion):
    family = ZOO[name]
    pipe = family.build()
    watch, outputs = Watch(pipe.transformer), []
    pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    threshold = {"kandinsky5": 0.3, "lumina2": 0.1, "flux-true-cfg": 0.3}.get(name, 0.1)
    gated(family, pipe, Gate(threshold=threshold, criterion=criterion), batch=3, steps=6)
    pairs = list(zip(watch.evaluations[::2], watch.evaluations[1::2], strict=True))
    assert all(first == second for first, second in pairs)
    assert any(first != pairs[0][0] for first, _ in pairs)
    for first, second in zip(outputs[::2], outputs[1::2], strict=True):
        assert not torch.allclose(torch.as_tensor(first[0]), torch.as_tensor(second[0]), rtol=1e-3)


def test_an_evaluation_that_leaves_blocks_out_follows_too():
    """Skip-layer guidance evaluates the conditional rows again, without some blocks."""
    family = ZOO["sd3"]
    pipe = family.build()
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    watch = Watch(pipe.transformer)
    part = Gate(threshold=0.25)
    together, _ = gated(family, pipe, part, batch=3, steps=8, **skipping)
    first, last = watch.names[0], watch.names[-1]
    pairs = [
        (guided, again)
        for guided, again in itertools.pairwise(watch.evaluations)
        if (guided[first], again[first]) == (6, 3)
    ]
    assert {tuple(again) for _, again in pairs} == {(first,), (first, last)}
    assert all(guided.get(last, 0) == 2 * again.get(last, 0) for guided, again in pairs[1:])
    alone = [gated(family, pipe, part, batch=1, seed=seed, steps=8, **skipping)[0] for seed in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_guidance_window_leaves_rows_out_and_takes_them_up_again():
    pipe = tiny_dit(layers=3)
    for window, threshold in itertools.product(((0.0, 0.5), (0.5, 1.0)), (0.6, ALWAYS)):
        guidance = GuidanceSchedule(scale=3.0, window=window)
        plan = Plan(grid=SpacingGrid(steps=8), guidance=guidance, caches=Gate(threshold=threshold))
        arguments = call_arguments(pipe, batch=2) | {"class_labels": [1, 2]}
        with attach(pipe, plan) as handle:
            together = torch.as_tensor(pipe(**arguments).images)
            assert handle.stats.modules["transformer.transformer_blocks.2"].skipped > 0
            for row in range(2):
                own = {"class_labels": [row + 1], "generator": [torch.Generator().manual_seed(row)]}
                alone = torch.as_tensor(pipe(**arguments | own).images)
                torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_a_cache_of_modules_in_the_blocks_is_told_which_rows_run():
    pipe = tiny_dit(layers=3)
    plan = Plan(
        grid=SpacingGrid(steps=10),
        caches=(Gate(threshold=0.6), Blocks(every=2, names=("transformer_blocks.1.attn1",))),
    )
    arguments = call_arguments(pipe, batch=3) | {"class_labels": [1, 2, 3], "guidance_scale": 1.0}
    with attach(pipe, plan) as handle:
        together = torch.as_tensor(pipe(**arguments).images)
        modules = handle.stats.modules
        assert modules["transformer.transformer_blocks.1"].skipped > 0
        inner = modules["transformer.transformer_blocks.1.attn1"]
        assert inner.skipped > 0
        assert inner.run + inner.skipped == modules["transformer.transformer_blocks.1"].run
        for row in range(3):
            own = {"class_labels": [row + 1], "generator": [torch.Generator().manual_seed(row)]}
            alone = torch.as_tensor(pipe(**arguments | own).images)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


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


def test_the_data_decide_unless_nothing_is_left_to_them():
    assert Gate().computes(8) is None
    assert Gate(threshold=0).computes(2) == (True, True)
    assert Gate(warmup=2, last_steps=1).computes(3) == (True,) * 3


def test_refuses_what_it_cannot_gate():
    with pytest.raises(InputError, match="cannot work on StableDiffusionPipeline: UNet2DConditionModel is a U-Net"):
        attach(ZOO["stable-diffusion"].build(), Plan(caches=Gate()))
    with pytest.raises(InputError, match="DiTTransformer2DModel has 1 block, which the criterion 'first-block' always"):
        attach(tiny_dit(layers=1), Plan(caches=Gate()))
    with attach(tiny_dit(layers=1), Plan(caches=Gate(criterion="modulated-input"))):
        pass
    with pytest.raises(ValidationError, match="coefficients are for the criterion 'modulated-input'"):
        Gate(coefficients=(1.0, 0.0))
    with pytest.raises(ValidationError, match=r"a polynomial has coefficients; got \(\)"):
        Gate(criterion="modulated-input", coefficients=())
