"""The seam of the caches, by a cache that keeps the output of whole blocks."""

import threading

import numpy as np
import pytest
import torch
from tiny import call_arguments, tiny_dit, tiny_qwen, tiny_sd3, tiny_stable_diffusion, tiny_wan
from torch.utils._pytree import tree_leaves
from toy_cache import Blocks

from fewstep.samplers import (
    BlockMask,
    DiffusersSolver,
    ExplicitGrid,
    GuidanceSchedule,
    InputError,
    Plan,
    SpacingGrid,
    attach,
)

CASES = {
    "dit": (tiny_dit, "transformer_blocks.0.attn1"),
    "sd": (tiny_stable_diffusion, "mid_block"),
    "sd3": (tiny_sd3, "transformer_blocks.0.attn"),
    "wan": (tiny_wan, "blocks.0.attn1"),
    "qwen": (tiny_qwen, "transformer_blocks.0.attn"),
}


def plan_of(name, every=2, steps=4, **slots):
    return Plan(grid=SpacingGrid(steps=steps), caches=Blocks(every=every, names=(name,)), **slots)


def first(output):
    value = output[0]
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:the test-blocks cache computes all")
def test_a_cache_that_computes_every_step_changes_nothing(case):
    build, name = CASES[case]
    pipe = build()
    plain = first(pipe(**call_arguments(pipe), num_inference_steps=4))
    with attach(pipe, plan_of(name, every=1)) as handle:
        np.testing.assert_array_equal(first(pipe(**call_arguments(pipe))), plain)
    (rows,) = handle.stats.modules.values()
    assert rows.skipped == 0
    assert rows.run == handle.stats.rows


@pytest.mark.parametrize("case", CASES)
def test_counts_what_ran_and_what_was_kept(case):
    build, name = CASES[case]
    pipe = build()
    (component,) = (c for c in ("unet", "transformer") if hasattr(pipe, c))
    module = getattr(pipe, component).get_submodule(name)
    ran = []
    handle_of_hook = module.register_forward_hook(lambda *_: ran.append(1))
    with attach(pipe, plan_of(name)) as handle:
        cached = first(pipe(**call_arguments(pipe)))
    handle_of_hook.remove()
    rows = handle.stats.modules[f"{component}.{name}"]
    assert rows.calls == len(ran)
    assert rows.run == rows.skipped == handle.stats.rows / 2
    assert handle.stats.cache_bytes > 0
    assert type(module).__mro__[1].__name__ != type(module).__name__
    assert not np.array_equal(cached, first(pipe(**call_arguments(pipe), num_inference_steps=4)))


@pytest.mark.parametrize(("build", "name"), [(tiny_wan, "blocks.0.attn2"), (tiny_qwen, "transformer_blocks.0.attn")])
def test_branches_that_are_evaluated_in_turn_do_not_share_what_is_kept(build, name):
    """One that shared them would answer the second branch with the first one's output, and cancel the guidance."""
    pipe = build()
    arguments = call_arguments(pipe) | ({"true_cfg_scale": 3.0} if build is tiny_qwen else {})
    block, computed = pipe.transformer.get_submodule(name), []
    watcher = block.register_forward_hook(lambda *given: computed.append(tree_leaves(given[-1])[0]))
    with attach(pipe, plan_of(name, steps=2)) as handle:
        pipe(**arguments)
    watcher.remove()
    assert len(computed) == 2  # both branches of the first step
    assert not torch.equal(*computed)
    assert handle.stats.modules[f"transformer.{name}"].skipped == handle.stats.rows / 2


def test_a_guidance_window_leaves_rows_out_and_takes_them_up_again():
    pipe = tiny_dit()
    guidance = GuidanceSchedule(scale=3.0, window=(0.0, 0.5))
    with attach(pipe, plan_of(CASES["dit"][1], steps=8, every=8, guidance=guidance)) as handle:
        pipe(**call_arguments(pipe))
    (rows,) = handle.stats.modules.values()
    assert (rows.run, rows.skipped) == (4, 4 * 3 + 2 * 4)
    late = GuidanceSchedule(scale=3.0, window=(0.5, 1.0))
    with attach(pipe, plan_of(CASES["dit"][1], steps=8, every=100, guidance=late)) as handle:
        pipe(**call_arguments(pipe))
    (rows,) = handle.stats.modules.values()
    assert rows.run == 4  # the first step has both branches; its rows serve all later ones


def test_nothing_is_left_after_an_exception():
    pipe = tiny_dit()
    plain = first(pipe(**call_arguments(pipe), num_inference_steps=4))
    block = pipe.transformer.get_submodule(CASES["dit"][1])
    cls = type(block)
    with attach(pipe, plan_of(CASES["dit"][1])):
        before = first(pipe(**call_arguments(pipe)))
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("stop")

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            pipe(**call_arguments(pipe))
        hook.remove()
        assert type(block) is cls
        np.testing.assert_array_equal(first(pipe(**call_arguments(pipe))), before)
    np.testing.assert_array_equal(first(pipe(**call_arguments(pipe), num_inference_steps=4)), plain)


def test_two_threads_on_shared_networks_do_not_see_each_other():
    first_pipe = tiny_dit()
    second_pipe = tiny_dit()
    second_pipe.transformer = first_pipe.transformer
    plain = first(second_pipe(**call_arguments(second_pipe), num_inference_steps=4))
    with attach(first_pipe, plan_of(CASES["dit"][1])):
        cached = first(first_pipe(**call_arguments(first_pipe)))
        found = {}
        threads = [
            threading.Thread(
                target=lambda: found.update(a=[first(first_pipe(**call_arguments(first_pipe))) for _ in range(5)])
            ),
            threading.Thread(
                target=lambda: found.update(
                    b=[first(second_pipe(**call_arguments(second_pipe), num_inference_steps=4)) for _ in range(5)]
                )
            ),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for image in found["a"]:
        np.testing.assert_array_equal(image, cached)
    for image in found["b"]:
        np.testing.assert_array_equal(image, plain)


def test_two_caches_cannot_decide_about_the_same_module():
    pipe = tiny_dit()
    plan = Plan(caches=(Blocks(names=("transformer_blocks.0.attn1",)), Blocks(names=("transformer_blocks.0.attn1",))))
    with pytest.raises(InputError, match=r"both decide about transformer.transformer_blocks.0.attn1; keep one"):
        attach(pipe, plan)


def test_a_cache_without_a_place_says_so():
    with pytest.raises(InputError, match="test-blocks cache cannot work on DiTPipeline: DiTTransformer2DModel has no"):
        attach(tiny_dit(), plan_of("mid_block"))


def test_a_cache_that_saves_nothing_warns():
    with (
        pytest.warns(UserWarning, match="the test-blocks cache computes all of 4 steps"),
        attach(tiny_dit(), plan_of(CASES["dit"][1], every=1)),
    ):
        pass


def test_what_is_written_into_is_forgotten_and_copied_from_then_on():
    from fewstep.samplers import Evaluation, Memory

    memory, evaluation = Memory(), Evaluation("net", torch.nn.Identity(), {"sample": torch.zeros(2, 3)}, 0, 0, 0.0)
    kept = torch.ones(2, 3)
    memory.keep("a", kept, evaluation)
    assert memory.recall("a", evaluation) is kept
    kept.add_(1)
    assert memory.recall("a", evaluation) is None
    memory.keep("a", kept, evaluation)
    kept.add_(1)
    torch.testing.assert_close(memory.recall("a", evaluation), torch.full((2, 3), 2.0))
    assert memory.held_bytes() == 24


def test_counts_the_timesteps_of_schedulers_that_evaluate_twice_in_a_step():
    """Three steps of Heun are five timesteps."""
    heun = DiffusersSolver(scheduler="HeunDiscreteScheduler", config={"prediction_type": "v_prediction"})
    plan = Plan(solver=heun, grid=SpacingGrid(steps=3), caches=BlockMask(rows=("1", "0", "1", "0", "1")))
    pipe = tiny_dit()
    with attach(pipe, plan) as handle:
        pipe(**call_arguments(pipe))
    assert handle.stats.modules["transformer.transformer_blocks.0"].skipped == 2 * 4
    explicit = plan.model_copy(update={"grid": ExplicitGrid(timesteps=(900.0, 500.0, 100.0))})
    attach(tiny_dit(), explicit).detach()
    with pytest.raises(InputError, match="table is for 5 timesteps and the scheduler has 7"):
        attach(tiny_dit(), plan.model_copy(update={"grid": SpacingGrid(steps=4)}))
