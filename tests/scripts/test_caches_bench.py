"""Caches of other packages run as they are and leave nothing behind; costs are counted; curves are compared."""

import importlib
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_dit, tiny_unet

from fewstep.samplers import InputError, Plan
from fewstep.samplers.block_mask import BlockMask
from fewstep.samplers.unet_deep import UNetDeep
from fewstep.scripts.bench import cache_cases, cache_cost
from fewstep.scripts.bench.cache_cases import Calibration, chosen_steps, dit_cases, rungs, unet_cases
from fewstep.scripts.bench.cache_cost import Trial, counted, no_decoding, timed
from fewstep.scripts.bench.curves import Point, at_equal_distance, by_operations, by_time, frontier, speed_at
from fewstep.scripts.bench.peers import PEERS, bytes_of, magnitude_ratios

STEPS = 6
DEEP = {"type": "unet-deep", "interval": 2, "layer": None}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def unet_call(pipe, **arguments):
    return pipe(
        batch_size=2,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **arguments,
    ).images


def dit_call(pipe):
    return pipe(
        class_labels=[1, 2],
        guidance_scale=1.5,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def plan(steps=STEPS, *caches):
    return Plan.from_json(
        {"fewstep_plan": 1, "grid": {"type": "spacing", "steps": steps}} | ({"caches": list(caches)} if caches else {})
    )


def traces(pipe):
    """What a cache could leave on a pipeline and its networks."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modules = {f"{part}.{name}": module for part in parts for name, module in parts[part].named_modules()}
    own = {
        name: (type(module), vars(module).keys() & {"forward", "_diffusers_hook"}) for name, module in modules.items()
    }
    return type(pipe), type(pipe).__call__, own


INSTALLED = [
    pytest.param(
        tiny_unet, unet_call, "deepcache", {"interval": 2, "branch": 0}, marks=needs("DeepCache"), id="deepcache"
    ),
    pytest.param(
        tiny_dit,
        dit_call,
        "cache-dit",
        {"steps": STEPS, "residual_diff_threshold": 9.0},
        marks=needs("cache_dit"),
        id="cache-dit",
    ),
    pytest.param(
        tiny_dit, dit_call, "diffusers", {"config": "FirstBlockCacheConfig", "threshold": 9.0}, id="first-block"
    ),
    pytest.param(
        tiny_dit,
        dit_call,
        "diffusers",
        {
            "config": "TaylorSeerCacheConfig",
            "cache_identifiers": cache_cases.FEATURES,
            "taylor_factors_dtype": "float32",
        },
        id="taylorseer",
    ),
]


@pytest.mark.parametrize(("build", "call", "name", "settings"), INSTALLED)
def test_a_peer_acts_the_same_in_each_call_holds_something_and_leaves_nothing(build, call, name, settings):
    pipe = build(layers=2)
    plain, before, most = call(pipe), traces(pipe), 0
    network = getattr(pipe, "unet", None) or pipe.transformer

    with PEERS[name](pipe, **settings) as held:

        def note(*_):
            nonlocal most
            most = max(most, bytes_of(held()))

        watch = network.register_forward_hook(note)
        first, second = call(pipe), call(pipe)
        watch.remove()
    assert (first == second).all()
    assert (first != plain).any()
    assert most > 0
    assert traces(pipe) == before
    with PEERS[name](pipe, **settings):
        assert (call(pipe) == first).all()
    assert (call(pipe) == plain).all()


@needs("DeepCache")
@pytest.mark.parametrize(("branch", "cut"), [(0, {}), (1, {"layer": 1}), (3, {"depth": 1})])
def test_deepcache_and_unet_deep_at_the_same_cut_are_the_same(branch, cut):
    pipe = tiny_unet()
    with PEERS["deepcache"](pipe, interval=2, branch=branch):
        theirs = unet_call(pipe)
    with Trial(plan(STEPS, {"type": "unet-deep", "interval": 2} | cut)).running(pipe):
        ours = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (theirs == ours).all()


def test_ratios_of_magnitudes_are_those_of_the_residuals():
    pipe = tiny_dit(layers=2)
    residuals = []
    blocks = pipe.transformer.transformer_blocks
    first = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    last = blocks[-1].register_forward_hook(lambda module, args, output: residuals.append(output - residuals.pop()))
    dit_call(pipe)
    first.remove()
    last.remove()
    sizes = [residual.norm(dim=-1) for residual in residuals]
    expected = [
        1.0,
        *((after / (before + 1e-8)).mean().item() for before, after in pairwise(sizes)),
    ]
    assert magnitude_ratios(pipe, lambda: dit_call(pipe), STEPS) == pytest.approx(expected, rel=1e-5)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    with (
        pytest.raises(InputError, match=r"needs its package .*; install it with: pip install 'fewstep\[bench\]'"),
        PEERS["deepcache"](tiny_unet(), interval=2, branch=0),
    ):
        pass


def test_bytes_are_of_storages_wherever_they_are_held():
    tensor = torch.zeros(10)
    held = {
        "a": [tensor, tensor[:5]],
        1: SimpleNamespace(inner=(torch.zeros(3, dtype=torch.float64),)),
        "network": torch.nn.Linear(9, 9),
    }
    held["self"] = held
    assert bytes_of(held) == 40 + 24


def test_operations_and_bytes_are_counted_without_the_decoder():
    pipe = tiny_dit(layers=2)
    call = lambda: pipe(class_labels=[1], output_type="np")  # noqa: E731
    mask = {"type": "block-mask", "rows": ["1", "0", "0", "1", "0", "0"]}
    plain, nothing = counted(pipe, Trial(plan()), call)
    cached, held = counted(pipe, Trial(plan(STEPS, mask)), call)
    half, _ = counted(pipe, Trial(plan(STEPS // 2)), call)
    block, _ = counted(pipe, Trial(plan(STEPS, mask | {"rows": ["1"] * 5 + ["0"]})), call)
    assert half == plain / 2
    assert plain - cached == pytest.approx(4 * (plain - block))
    assert nothing == 0
    assert held > 0
    assert "decode" not in vars(pipe.vae)
    with no_decoding(pipe):
        assert (call().images == 0.5).all()


def test_speeds_are_of_pairs_in_turn_and_the_first_round_does_not_count(monkeypatch):
    pipe, asked = tiny_unet(), []
    base, fast = Trial(plan()), Trial(plan(STEPS, DEEP))

    def seconds(pipe, trial, call):
        asked.append(trial)
        walls = {id(base): (9.0, 4.0, 6.0, 8.0), id(fast): (1.0, 2.0, 2.0, 2.0)}
        wall = walls[id(trial)][sum(other is trial for other in asked) - 1]
        return wall, wall / 2 if trial is base else wall

    monkeypatch.setattr(cache_cost, "_seconds", seconds)
    found = timed(pipe, base, {"fast": fast}, lambda: None, 3)["fast"]
    assert asked == [base, fast] * 4
    assert found["repeats"] == 3
    assert found["wall"] == {"ratio": 3.0, "quartiles": [2.0, 4.0]}
    assert found["processor"]["ratio"] == 1.5


def test_every_case_is_a_plan_of_its_own():
    known = Calibration(tuple(1.0 + step for step in range(cache_cases.STEPS - 1)), (1.0,) * cache_cases.STEPS)
    for cases in (unet_cases(known), dit_cases(known)):
        assert len({(case.method, case.setting) for case in cases}) == len(cases)
        assert {case.whose for case in cases} == {"ours", "peer", "control"}
        for case in cases:
            made = Plan.from_json({"fewstep_plan": 1} | case.plan(None))
            assert bool(made.caches) == (case.whose == "ours")
            assert (case.peer is not None) == (case.whose == "peer")


def test_measured_steps_are_where_features_change():
    changes = [0.0] * (cache_cases.STEPS - 1)
    changes[3] = changes[11] = 1.0
    assert chosen_steps(Calibration(changes), 3) == [0, 4, 12]


def test_rungs_are_those_nearest_to_the_shares():
    ladder = [UNetDeep(steps=tuple(range(count))) for count in (18, 11, 9, 2)]
    assert [len(rung["steps"]) for rung in rungs(ladder, (0.56, 0.45, 0.1))] == [11, 9, 2]
    masks = [BlockMask(rows=("1111", row)) for row in ("1110", "1000")]
    assert [rung["rows"] for rung in rungs(masks, (0.6, 0.0))] == [["1111", "1000"]]


def row(whose, method, setting, distance, flops, wall=None):
    times = {} if wall is None else {"1": {"wall": {"ratio": wall}}}
    metrics = {"feature_distance": {"value": distance, "se": 0.1}} if distance else {}
    return {"whose": whose, "method": method, "setting": setting, "metrics": metrics, "flops": flops, "times": times}


def test_speeds_between_settings_are_on_the_line_and_go_no_further():
    points = [Point(2.0, 3.0, "b"), Point(1.0, 2.0, "a"), Point(3.0, 2.5, "worse"), Point(0.5, 0.9, "slower")]
    assert [point.name for point in frontier(points)] == ["slower", "a", "b"]
    for at, speed in ((0.0, 1.0), (0.5, 1.5), (1.5, 2.5), (2.0, 3.0), (9.0, 3.0)):
        assert speed_at(points, at) == pytest.approx(speed)


def test_ours_are_compared_with_the_fastest_of_the_others_at_its_distance():
    rows = [
        row("control", "uncached", "20", 0.0, 1.0),
        row("control", "fewer steps", "10", 4.0, 2.0),
        row("peer", "x", "1", 1.0, 1.5, wall=1.4),
        row("peer", "y", "1", 2.0, 1.4),
        row("peer", "y", "2", 3.0, 2.0),
        row("ours", "gate", "1", 2.0, 3.0, wall=2.8),
    ]
    near, far = at_equal_distance(rows, by_operations)
    assert (near.peer.name, near.ours, near.control) == ("x: 1", (2.0, "gate"), 1.25)
    assert near.ratio == pytest.approx(4 / 3)
    assert (far.peer.name, far.ours, far.control, far.ratio) == ("y: 2", (3.0, "gate"), 1.75, 1.5)
    (timed_at,) = at_equal_distance(rows, by_time(1, "wall"))
    assert timed_at.ours == (pytest.approx(1.9), "gate")
    assert at_equal_distance(rows, by_time(64, "processor")) == []
