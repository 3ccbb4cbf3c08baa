"""The gate, against the host's first-block cache, TeaCache written out, and samples that run alone."""

import functools
import itertools

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit
from torch import nn
from toy_cache import Blocks
from zoo import ZOO

from fewstep.samplers import GuidanceSchedule, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.gate import Gate
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
