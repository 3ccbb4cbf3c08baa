"""The axes of layers that are left out."""

from dataclasses import replace

import optuna
import pytest
from optuna.trial import FixedTrial
from tiny import tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import (
    BlockMask,
    CrossAttentionFreeze,
    DiffusersSolver,
    ExplicitGrid,
    InputError,
    Plan,
    SpacingGrid,
    attach,
)
from fewstep.samplers.layer_skip import LayerSkip
from fewstep.search.axes.layers import LayerListAxis, LayersAxis
from fewstep.search.genes import Candidate, Genes
from fewstep.search.space import AXES, Space, plan_key

AXIS = LayersAxis(steps=3, width=4, targets=("block",), most=0.25)
LIST = LayerListAxis(steps=3, width=4, targets=("block",), most=0.25)
FREEZE = CrossAttentionFreeze(after=2)


def skip_of(plan):
    return next((part for part in plan.caches if isinstance(part, LayerSkip)), None)


def left_out(plan):
    part = skip_of(plan)
    return 0 if part is None else sum(row.count("0") for row in part.rows)


@pytest.mark.parametrize("axis", [AXIS, LIST], ids=lambda axis: axis.name)
def test_whatever_is_suggested_the_plan_is_valid_within_its_share_and_given_back(axis):
    space, counts = Space(Plan(grid=SpacingGrid(steps=3), caches=FREEZE), (axis,)), set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(100):
        plan = space.suggest(study.ask())
        assert plan == Plan.from_json(plan.to_json())
        assert plan.caches[0] == FREEZE
        assert space.plan(space.params(plan)) == plan
        counts.add(left_out(plan))
    assert counts <= {0, 1, 2, 3}
    assert 3 in counts


def test_a_parameter_is_a_layer_of_a_step():
    space = Space(Plan(), (AXIS,))
    params = dict.fromkeys(AXIS.names, 0) | {"layers.0.2": 1, "layers.2.0": 1}
    plan = space.plan(params)
    assert plan == Plan(caches=LayerSkip(rows=("1101", "1111", "0111"), targets=("block",)))
    assert space.params(plan) == params
    assert LIST.plan(Plan(), (2, 8)) == plan
    assert LIST.params(plan) == {"layer-list.0": 3, "layer-list.1": 9, "layer-list.2": 0}


def test_the_order_of_a_list_and_what_it_names_twice_do_not_matter():
    keys = {
        plan_key(LIST.suggest(FixedTrial(dict(zip(LIST.names, numbers, strict=True))), Plan()))
        for numbers in ((3, 9, 0), (9, 3, 0), (0, 9, 3), (9, 9, 3))
    }
    assert len(keys) == 1


def test_nothing_left_out_is_the_plan_without_the_part():
    base = Plan(caches=[LayerSkip(rows=("0", "1", "1")), FREEZE])
    assert AXIS.plan(base, ()) == Plan(caches=FREEZE)
    assert not any(AXIS.params(Plan(caches=FREEZE)).values())


def test_where_too_many_are_asked_for_one_more_moves_at_most_one():
    """So that a step of evolution stays a small one."""
    everything = set(AXIS.left_out(AXIS.plan(Plan(), range(12))))
    assert len(everything) == AXIS.budget == 3
    assert len({place // 4 for place in everything}) == 3
    for place in everything:
        others = set(AXIS.left_out(AXIS.plan(Plan(), set(range(12)) - {place})))
        assert everything - {place} < others
        assert len(others) == 3


def test_evolution_reads_the_parameters():
    space = {name: optuna.distributions.IntDistribution(0, 1) for name in AXIS.names}
    genes = Genes.of(space, 3)
    params = AXIS.params(AXIS.plan(Plan(), (2, 8)))
    assert genes.read(params) == Candidate((), (frozenset("2"), frozenset(), frozenset("0")), ())
    assert genes.write(genes.read(params)) == params


@pytest.mark.parametrize("build", [tiny_unet, tiny_stable_diffusion, tiny_dit])
@pytest.mark.parametrize("name", ["layers", "layer-list"])
def test_plans_of_a_pipeline_run(build, name):
    pipe = build()
    axis = AXES[name](pipe, Plan(grid=SpacingGrid(steps=4)))
    assert axis.steps == 4
    assert axis.width > 1
    plan = axis.plan(Plan(grid=SpacingGrid(steps=4)), range(axis.steps * axis.width))
    assert left_out(plan) == max(1, axis.steps * axis.width // 10)
    attach(pipe, plan).detach()


def test_takes_the_kinds_and_timesteps_of_the_plan():
    part = LayerSkip(rows=("1",) * 5, targets=("mlp", "block"))
    base = Plan(solver=DiffusersSolver(scheduler="HeunDiscreteScheduler"), grid=SpacingGrid(steps=3), caches=part)
    axis = LayersAxis.of(tiny_dit(layers=2), base)
    assert (axis.steps, axis.width, axis.targets) == (5, 4, ("mlp", "block"))
    assert LayersAxis.of(tiny_dit(), Plan(grid=ExplicitGrid(timesteps=(900, 500)))).steps == 2


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Plan(), "the layers axis needs to know the number of steps; give the plan a grid part"),
        (
            Plan(grid=SpacingGrid(steps=2), caches=LayerSkip(rows=("1", "1"), targets=("resnet",))),
            "the layer-skip cache cannot work on DiTPipeline: DiTTransformer2DModel is no U-Net, and has no resnet",
        ),
        (
            Plan(grid=SpacingGrid(steps=2), caches=BlockMask(rows=("1", "0"), targets=("mlp",))),
            "the block-mask and the layer-skip cache both decide about transformer.transformer_blocks.0.ff",
        ),
        (
            Plan(grid=SpacingGrid(steps=2), caches=[LayerSkip(rows=("1", "1")), LayerSkip(rows=("1", "1"))]),
            "the plan has 2 layer skips; join them in one to search it",
        ),
    ],
)
def test_refuses_plans_that_it_cannot_search(base, message):
    with pytest.raises(InputError, match=message):
        LayersAxis.of(tiny_dit(), base)


@pytest.mark.parametrize(
    ("rows", "targets", "message"),
    [
        (("1", "1", "1"), ("mlp",), "the plan leaves out mlp and the layers axis block"),
        (("1", "1"), ("block",), "is for 2 timesteps of 4 layers and the layers axis has 3 of 4"),
        (("11", "11", "11"), ("block",), "is for 3 timesteps of 2 layers and the layers axis has 3 of 4"),
        (("0", "1", "1"), ("block",), "the plan leaves out 4 layers and the layers axis 3 at most; raise most"),
    ],
)
def test_refuses_plans_that_are_not_in_it(rows, targets, message):
    with pytest.raises(InputError, match=message):
        AXIS.params(Plan(caches=LayerSkip(rows=rows, targets=targets)))


@pytest.mark.parametrize("most", [0.0, 1.5])
def test_refuses_shares_that_are_none(most):
    with pytest.raises(InputError, match=f"leaves out a share of the layers, 0 < most <= 1; got {most}"):
        replace(AXIS, most=most)
