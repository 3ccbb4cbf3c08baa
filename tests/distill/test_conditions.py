import dataclasses
import functools
import inspect

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map_only
from zoo import ZOO

from fewstep.distill.conditions import Condition
from fewstep.distill.encode import encode
from fewstep.distill.predict import guided, predict
from fewstep.distill.row_trees import leaves, same
from fewstep.samplers import InputError, Plan, Process, attach, denoisers
from fewstep.samplers.call import CallHook
from fewstep.samplers.network import named_inputs, output_rows
from fewstep.samplers.recording import record

REFUSED = {"controlnet": "down_block_additional_residuals", "amused": "unknown scheduler"}
RESCALED = {"qwen-image", "lumina2"}  # they give what guidance gives the length of the conditional vectors
ROUNDED = {"sdxl", "stable-video", "allegro", "stable-audio", "z-image", "lumina2", "qwen-image"}
"Families whose states are scaled, whose times are 1 - t/1000, or whose predictions are rescaled."


def families(condition=lambda family: True):
    chosen = [family for family in ZOO.values() if family.name not in REFUSED and condition(family)]
    return pytest.mark.parametrize("family", chosen, ids=str)


class First(CallHook):
    """Keeps the evaluations and the step of the first step of a call."""

    def __init__(self):
        self.evaluations, self.outputs, self.step = [], [], None

    def evaluate(self, evaluation, proceed):
        output = proceed(evaluation)
        if self.step is None:
            shown = tree_map_only(torch.Tensor, torch.clone, evaluation.inputs[evaluation.state_name])
            self.evaluations.append(evaluation.with_inputs(**{evaluation.state_name: shown}))
            self.outputs.append(output_rows(output))
        return output

    def before_step(self, step):
        if self.step is None:
            self.step = dataclasses.replace(step, x=step.x.clone())  # Kandinsky's pipeline writes into it


class Seen:
    """Keeps the arguments of the calls of a network."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, *args, **kwargs):
        self.calls.append(named_inputs(self.network, args, kwargs))
        return self.network(*args, **kwargs)


def arguments(family, pipe, batch=2, seed=0, **options):
    steps = {family.steps_argument: round(2 / family.share)}
    return family.arguments(pipe, batch, seed) | steps | options


@functools.cache
def run(family):
    pipe = family.build()
    first = First()
    record(pipe, Plan(), arguments(family, pipe, generator=torch.Generator().manual_seed(0)), first)
    condition = encode(pipe, arguments(family, pipe))
    return pipe, first, condition, getattr(pipe, family.denoiser)


def close(family, one, other):
    if family.name in ROUNDED:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(one, other)


def own_scale(family, pipe):
    """The scale of the pipeline's call, as Imagen counts it: Z-Image's pipeline counts from 0."""
    name = family.scale
    scale = arguments(family, pipe).get(name, inspect.signature(type(pipe).__call__).parameters[name].default)
    return scale + (family.name == "z-image")


@families()
def test_the_pipelines_own_evaluations_are_replayed(family):
    _pipe, first, condition, network = run(family)
    seen, step = Seen(network), first.step
    process, x = step.process, step.x[: len(condition)]
    with torch.no_grad():
        if condition.uncond is None:
            predict(seen, process, x, step.time, condition)
        else:
            guided(seen, process, x, step.time, condition, 3.0)
    assert len(seen.calls) == len(first.evaluations)
    for call, evaluation in zip(seen.calls, first.evaluations, strict=True):
        wanted = dict(evaluation.inputs)
        shown, told = wanted.pop(evaluation.state_name), wanted.pop(evaluation.time_name)
        for one, other in zip(call.pop(evaluation.state_name), shown, strict=True):
            close(family, one, other)
        times = call.pop(evaluation.time_name)
        close(family, times.double(), torch.as_tensor(told).double().expand(times.shape))
        for inputs in (call, wanted):
            inputs.pop("return_dict", None)
        assert same({name: call[name] for name in sorted(call)}, {name: wanted[name] for name in sorted(wanted)})


@families()
def test_the_first_prediction_is_what_the_scheduler_got(family):
    pipe, first, condition, network = run(family)
    step = first.step
    x = step.x[: len(condition)]
    out = step.output[: len(condition)]
    if out.shape[1] == 2 * x.shape[1]:  # a learned variance
        out = out[:, : x.shape[1]]
    wanted = (step.process.to_x0(out, x, step.time), step.process.to_eps(out, x, step.time))
    with torch.no_grad():
        if condition.uncond is None:
            predicted = predict(network, step.process, x, step.time, condition)
        else:
            predicted = guided(network, step.process, x, step.time, condition, own_scale(family, pipe))
        if family.name == "stable-video":  # the scale grows over the frames, to that
            lowest = guided(network, step.process, x, step.time, condition, 1.5)
            predicted = [torch.stack([a[:, 0], b[:, 1]], 1) for a, b in zip(lowest, predicted, strict=True)]
    assert predicted[0].dtype == predicted[1].dtype == torch.float32
    if family.name in RESCALED:
        predicted, wanted = ([normalize(eps - x0, dim=-1)] for x0, eps in (predicted, wanted))
    for one, other in zip(predicted, wanted, strict=True):
        close(family, one, other)


@families(lambda family: family.guidance in ("doubled", "separate"))
def test_the_branches_are_the_pipelines(family):
    _pipe, _first, condition, _network = run(family)
    assert condition.layout.stacked == (family.guidance == "doubled")
    cond_first = family.conditional_first or family.guidance == "separate"
    assert condition.layout.branches == (("cond", "uncond") if cond_first else ("uncond", "cond"))
    assert not same(condition.cond.inputs, condition.uncond.inputs)


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_that_have_no_condition_are_refused(name):
    pipe = ZOO[name].build()
    with pytest.raises(InputError, match=REFUSED[name]):
        encode(pipe, arguments(ZOO[name], pipe))
    assert "_fewstep_attachment" not in vars(pipe)


@families()
def test_a_known_layout_gives_the_same_without_the_network(family):
    pipe, _, condition, network = run(family)
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    try:
        again = encode(pipe, arguments(family, pipe), condition.layout)
    finally:
        handle.remove()
    assert not calls
    assert again.layout == condition.layout
    assert same(again.cond.inputs, condition.cond.inputs)
    assert (again.uncond is None) == (condition.uncond is None)
    assert again.uncond is None or same(again.uncond.inputs, condition.uncond.inputs)


def alone(family, pipe, row, layout):
    return encode(pipe, arguments(family, pipe, 1, row), layout)


WHOLE_CALL = {"img2img", "inpaint", "ip-adapter", "flux-kontext", "flux-fill", "stable-video"}
"Families whose images are encoded with noise, or shared by a call."


@families(lambda family: family.name not in WHOLE_CALL)
def test_rows_are_the_conditions_of_the_samples_alone(family):
    pipe, _, condition, _ = run(family)
    parts = [alone(family, pipe, row, condition.layout) for row in range(2)]
    for row, part in enumerate(parts):
        assert_alike(part, condition.rows([row]))
    assert_alike(Condition.cat(parts), condition)


def assert_alike(one, other):
    assert (one.layout, len(one)) == (other.layout, len(other))
    for name in one.layout.branches:
        mine, theirs = one.branch(name), other.branch(name)
        mine, theirs = leaves(mine.inputs, mine.rowed), leaves(theirs.inputs, theirs.rowed)
        assert mine.keys() == theirs.keys()
        torch.testing.assert_close(mine, theirs)


@families()
def test_rows_join_to_the_whole_and_files_keep_it(family, tmp_path):
    condition = run(family)[2]
    whole = Condition.cat([condition.rows([0]), condition.rows(torch.tensor([1]))])
    assert_alike(whole, condition)
    whole.save(tmp_path / "condition.safetensors", {"seed": "3"})
    read, header = Condition.load_with_header(tmp_path / "condition.safetensors")
    assert header["seed"] == "3"
    assert read.layout == condition.layout
    for name in read.layout.branches:
        assert read.branch(name).rowed == condition.branch(name).rowed
        assert same(read.branch(name).inputs, condition.branch(name).inputs)


@families()
def test_each_sample_at_its_own_time_is_as_alone_and_gradients_reach_all(family):
    _pipe, first, condition, network = run(family)
    process, x = first.step.process, first.step.x[:2].clone().requires_grad_()
    times = torch.tensor([first.step.time, first.step.next_time], dtype=torch.float64)
    both = predict(network, process, x, times, condition)
    with torch.no_grad():
        for row in range(2):
            one = predict(network, process, x[row : row + 1], float(times[row]), condition.rows([row]))
            torch.testing.assert_close(both.x0[row], one.x0[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(both.eps[row], one.eps[0], rtol=1e-3, atol=1e-3)
    network.zero_grad()
    (both.x0.square().mean() + both.eps.square().mean()).backward()
    assert all(x.grad[row].abs().sum() > 0 for row in range(2))
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    network.zero_grad()


def stable():
    return run(ZOO["stable-diffusion"])


def test_guidance_is_imagens_and_may_differ_by_sample():
    _, first, condition, network = stable()
    process, x, t = first.step.process, first.step.x, first.step.time
    with torch.no_grad():
        cond = predict(network, process, x, t, condition)
        weak, strong = (guided(network, process, x, t, condition, g) for g in (1.0, 7.0))
        mixed = guided(network, process, x, t, condition, torch.tensor([1.0, 7.0]))
        w = 6.0
        uncond = guided(network, process, x, t, condition, 0.0)
    torch.testing.assert_close(weak.eps, cond.eps)
    torch.testing.assert_close(strong.eps, cond.eps + w * (cond.eps - uncond.eps), rtol=1e-3, atol=1e-4)
    assert torch.equal(mixed.eps[0], weak.eps[0])
    assert torch.equal(mixed.eps[1], strong.eps[1])


def test_a_pipeline_without_guidance_has_no_unconditional_branch():
    family = ZOO["stable-diffusion"]
    pipe, first, _, network = stable()
    condition = encode(pipe, arguments(family, pipe, guidance_scale=1.0))
    assert condition.layout.branches == ("cond",)
    assert same(condition.cond.inputs, stable()[2].cond.inputs)
    with pytest.raises(InputError, match=r"called without guidance, .* encode with a guidance scale above 1"):
        guided(network, first.step.process, first.step.x, first.step.time, condition, 3.0)


@families(lambda family: family.guidance == "doubled" and family.name != "stable-video")
def test_samples_without_their_condition_are_told_the_unconditional_one(family):
    _, first, condition, network = run(family)
    process, x, t = first.step.process, first.step.x[:2], first.step.time
    mixed = condition.without(torch.tensor([False, True]))
    with torch.no_grad():
        prediction = predict(network, process, x, t, mixed).eps
        wanted = [guided(network, process, x, t, condition, g).eps[row] for row, g in enumerate((1.0, 0.0))]
    torch.testing.assert_close(prediction, torch.stack(wanted), rtol=1e-3, atol=1e-3)


def test_arguments_are_told_to_the_network():
    family = ZOO["flux"]
    pipe, first, condition, network = run(family)
    process, x, t = first.step.process, first.step.x, first.step.time
    other = encode(pipe, arguments(family, pipe, guidance_scale=9.0))
    told = condition.telling(guidance=torch.full((2,), 9.0))
    with torch.no_grad():
        assert torch.equal(predict(network, process, x, t, told).x0, predict(network, process, x, t, other).x0)
    assert_alike(told.rows([1]), other.rows([1]))
    with pytest.raises(InputError, match=r"guidance needs one row for each of 2 samples; got \(3,\)"):
        condition.telling(guidance=torch.ones(3))


def test_half_precision_moves_samples_and_inputs():
    _, first, condition, network = stable()
    half = condition.to("cpu", torch.bfloat16)
    seen = []

    def spy(**inputs):
        seen.append(inputs)
        return network(**{name: v.float() if torch.is_tensor(v) else v for name, v in inputs.items()})

    prediction = predict(spy, first.step.process, first.step.x, 500.0, half)
    assert seen[0]["sample"].dtype == seen[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen[0]["timestep"].dtype == torch.float32
    assert prediction.x0.dtype == torch.float32
    assert same(half.to(dtype=torch.float32).layout, condition.layout)


def test_the_pipeline_is_left_as_it_was():
    family = ZOO["wan"]
    pipe = family.build()
    before = (dict(vars(pipe)), type(pipe), type(pipe.transformer))
    samples = family.call(pipe)
    encode(pipe, arguments(family, pipe))
    after = (dict(vars(pipe)), type(pipe), type(pipe.transformer))
    assert before[1:] == after[1:]
    assert before[0].keys() <= after[0].keys()
    assert pipe._progress_bar_config == {"disable": True}
    assert torch.equal(family.call(pipe), samples)


def test_words_of_what_does_not_fit(tmp_path):
    _pipe, first, condition, network = stable()
    process, x = first.step.process, first.step.x
    with pytest.raises(InputError, match=r"of 2 samples of shape \(4, 8, 8\); got states of \(1, 4, 8, 8\)"):
        predict(network, process, x[:1], 10.0, condition)
    with pytest.raises(InputError, match=r"one number or one per sample; got \(3,\) for 2"):
        guided(network, process, x, 10.0, condition, torch.ones(3))
    with pytest.raises(InputError, match="rows 0 to 1; no sample 2"):
        condition.rows([0, 2])
    with pytest.raises(InputError, match="rows 0 to 1; nothing picked"):
        condition.rows([])
    with pytest.raises(InputError, match="no conditions to join; give at least one"):
        Condition.cat([])
    with pytest.raises(InputError, match=r"dropped is bool \(2,\); got torch.int64 of shape \(1,\)"):
        condition.without(torch.tensor([1]))
    other = run(ZOO["dit"])[2]
    with pytest.raises(InputError, match="pipeline is StableDiffusionPipeline and DiTPipeline; encode them by one"):
        Condition.cat([condition, other])
    longer = condition.telling(encoder_hidden_states=torch.zeros(2, 5, 8))
    with pytest.raises(InputError, match=r"encoder_hidden_states has \(4, 8\) and \(5, 8\) for one sample"):
        Condition.cat([condition, longer])
    with pytest.raises(InputError, match="where the same inputs have rows"):
        Condition.cat([condition, condition.telling(timestep_cond=torch.zeros(2, 4))])
    with pytest.raises(InputError, match="where they share cross_attention_kwargs; encode them at one size"):
        Condition.cat([condition, condition.telling(cross_attention_kwargs=1.0)])
    with pytest.raises(InputError, match="cond/cross_attention_kwargs is a function, which cannot be written"):
        condition.telling(cross_attention_kwargs=lambda: 0).save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors does not exist"):
        Condition.load(tmp_path / "a.safetensors")


def test_damaged_files_are_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a.safetensors holds no condition"):
        Condition.load(tmp_path / "a.safetensors")
    header = {"format": "fewstep-condition-1", "condition": '{"layout": {}}'}
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", header)
    with pytest.raises(InputError, match=r"b.safetensors is corrupted"):
        Condition.load(tmp_path / "b.safetensors")


def test_a_network_that_answers_less_is_refused():
    _, first, condition, _ = stable()
    with pytest.raises(InputError, match=r"predicts \(3, 8, 8\) for samples of shape \(4, 8, 8\)"):
        predict(lambda **_: (torch.zeros(2, 3, 8, 8),), first.step.process, first.step.x, 5.0, condition)


def test_another_size_than_the_layouts_is_refused():
    family = ZOO["stable-diffusion"]
    pipe, _, condition, _ = stable()
    with pytest.raises(InputError, match=r"shape \(4, 16, 16\) and the layout says \(4, 8, 8\); give every call"):
        encode(pipe, arguments(family, pipe, height=32, width=32), condition.layout)


def test_a_plan_on_the_pipeline_is_refused():
    family = ZOO["ddim"]
    pipe = family.build()
    with attach(pipe, Plan()), pytest.raises(InputError, match="attached to this pipeline already"):
        encode(pipe, arguments(family, pipe))


def test_process_and_denoisers_of_a_pipeline_are_enough():
    """A network of the pipeline, its scheduler's process and a condition, with no call in progress."""
    family = ZOO["dit"]
    pipe = family.build()
    condition = encode(pipe, {"class_labels": [3, 4, 5], "num_inference_steps": 2})
    (network,) = denoisers(pipe).values()
    prediction = predict(
        network,
        Process.from_scheduler(pipe.scheduler),
        torch.randn(3, 4, 4, 4),
        torch.tensor([1.0, 500.5, 999.0]),
        condition,
    )
    assert prediction.x0.shape == (3, *condition.layout.shape)
    assert condition.cond.inputs["class_labels"].tolist() == [3, 4, 5]
    assert condition.uncond.inputs["class_labels"].tolist() == [1000] * 3
