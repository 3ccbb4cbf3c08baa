"""The model switch: the right network in the right step, counted, and nothing else."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import TINY, call_arguments, tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import DiffusersSolver, InputError, Plan, SpacingGrid, attach, denoisers
from fewstep.samplers.model_switch import ModelSwitch


def other_network(pipe, seed=5):
    """A network like the pipeline's, with other weights."""
    network = copy.deepcopy(next(iter(denoisers(pipe).values())))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return network


def with_network(pipe, network):
    """The pipeline with its denoiser replaced by hand."""
    name = next(iter(denoisers(pipe)))
    parts = dict(pipe.components) | {name: network, "scheduler": copy.deepcopy(pipe.scheduler)}
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}
    made = type(pipe)(**parts, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def plan_of(count=4, /, **options):
    return Plan(grid=SpacingGrid(steps=count), models=ModelSwitch(**options))


@pytest.mark.parametrize("name", TINY)
def test_the_same_network_or_a_copy_of_it_changes_nothing(name):
    pipe = TINY[name]()
    same = next(iter(denoisers(pipe).values()))
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    for small in (same, copy.deepcopy(same)):
        with attach(pipe, plan_of(networks=("self", "small"), steps=(2,)), {"small": small}):
            np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, plain)


@pytest.mark.parametrize("name", TINY)
def test_one_network_for_all_steps_is_that_networks_own_pipeline(name):
    pipe = TINY[name]()
    small = other_network(pipe)
    expected = with_network(pipe, small)
    expected = expected(**call_arguments(pipe), num_inference_steps=4).images
    own = pipe(**call_arguments(pipe), num_inference_steps=4).images
    assert np.abs(expected - own).max() > 1e-3
    for options in (
        {"networks": ("small",)},
        {"networks": ("self", "small"), "steps": (0,)},
        {"networks": ("small", "self"), "steps": (4,)},
        {"networks": ("self", "small"), "times": (1000.0,)},
        {"networks": ("small", "self"), "times": (-1.0,)},
    ):
        with attach(pipe, plan_of(**options), {"small": small}):
            np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    with attach(pipe, plan_of(networks=("self", "small"), steps=(4,)), {"small": small}):
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, own)


def test_each_step_runs_its_network_and_rows_are_counted_by_network():
    """Against a second implementation: a pipeline whose network is swapped by hand between the steps."""
    pipe = tiny_stable_diffusion()
    own, small = pipe.unet, other_network(pipe)

    def swap(pipe, step, timestep, kwargs):
        pipe.unet = small if step + 1 >= 3 else own
        return kwargs

    by_hand = with_network(pipe, own)
    expected = by_hand(**call_arguments(pipe), num_inference_steps=5, callback_on_step_end=swap).images
    with attach(pipe, plan_of(5, networks=("self", "small"), steps=(3,)), {"small": small}) as handle:
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    assert [step.network for step in handle.stats.steps] == ["unet"] * 3 + ["small"] * 2
    assert handle.stats.rows_by_network == {"unet": 12, "small": 8}
    assert handle.stats.rows == 20
    with attach(pipe, plan_of(5, networks=("self", "small"), times=(500.0,)), {"small": small}) as handle:
        pipe(**call_arguments(pipe))
    assert [step.network for step in handle.stats.steps] == [
        "small" if step.timestep <= 500 else "unet" for step in handle.stats.steps
    ]


def test_both_evaluations_of_a_step_and_multistep_history():
    pipe = tiny_unet()
    small = other_network(pipe)
    plan = Plan(
        solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler"),
        grid=SpacingGrid(steps=5),
        models=ModelSwitch(networks=("self", "small", "self"), steps=(1, 3)),
    )
    with attach(pipe, plan, {"small": small}) as handle:
        mixed = pipe(**call_arguments(pipe)).images
    assert [step.network for step in handle.stats.steps] == ["unet", "small", "small", "unet", "unet"]
    with attach(pipe, plan.model_copy(update={"models": None})):
        assert np.abs(mixed - pipe(**call_arguments(pipe)).images).max() > 1e-4


def saved(tmp_path, pipe, network, **changes):
    network.save_pretrained(tmp_path / "small")
    plan_of(networks=("self", "small"), steps=(2,), folders={"small": "small"}, **changes).save(tmp_path / "plan.json")
    return Plan.load(tmp_path / "plan.json")


def test_a_folder_beside_the_plan(tmp_path):
    pipe = tiny_dit()
    small = other_network(pipe)
    plan = saved(tmp_path, pipe, small)
    with attach(pipe, plan_of(networks=("self", "small"), steps=(2,)), {"small": small}):
        expected = pipe(**call_arguments(pipe)).images
    with attach(pipe, plan):
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    with attach(pipe, plan):
        pipe(**call_arguments(pipe))


@pytest.mark.parametrize("damage", ["class", "missing", "tensor", "outside", "link", "shard", "pickle"])
def test_a_folder_that_cannot_be_used(tmp_path, damage):
    pipe = tiny_dit()
    plan = saved(tmp_path / "plan", pipe, other_network(pipe))
    folder = tmp_path / "plan" / "small"
    weights = folder / "diffusion_pytorch_model.safetensors"
    words = {
        "class": "holds a UNet2DModel, and the pipeline runs a DiTTransformer2DModel",
        "missing": "cannot load ",
        "tensor": "lacks 1 tensors, such as 'proj_out_2.bias'",
        "outside": "names '../small/config.json', outside the plan's folder",
        "link": "outside the plan's folder",
        "shard": "outside the plan's folder",
        "pickle": "cannot load ",
    }[damage]
    if damage == "class":
        config = json.loads((folder / "config.json").read_text()) | {"_class_name": "UNet2DModel"}
        (folder / "config.json").write_text(json.dumps(config))
    elif damage == "missing":
        weights.unlink()
    elif damage == "tensor":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["proj_out_2.bias"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "outside":
        plan = plan.model_copy(update={"models": plan.models.model_copy(update={"folders": {"small": "../small"}})})
        plan._folder = tmp_path / "plan"
    elif damage == "link":
        weights.rename(tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "elsewhere.safetensors")
    elif damage == "shard":
        weights.rename(tmp_path / "elsewhere.safetensors")
        index = {"weight_map": {"proj_out_2.bias": "../../elsewhere.safetensors"}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    else:
        weights.unlink()
        torch.save(pipe.transformer.state_dict(), folder / "diffusion_pytorch_model.bin")
    before = dict(vars(pipe))
    with pytest.raises(InputError) as caught:
        attach(pipe, plan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vars(pipe) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.train(), "network 'small' is in training mode; call .eval() on it first"),
        (lambda n: n.half(), "network 'small' has torch.float16 weights and the pipeline's own torch.float32"),
        (lambda n: n.to("meta"), "network 'small' is on meta and the pipeline on cpu; move it there"),
        (lambda n: tiny_unet().unet, "network 'small' has in_channels=1 and the pipeline's own 4; they must agree"),
        (
            lambda n: torch.nn.Linear(2, 2).eval(),
            "network 'small' takes no 'sample', which the pipeline's own one does",
        ),
        (lambda n: "path", "network 'small' is a str; give a torch module"),
    ],
)
def test_a_network_that_does_not_fit(change, words):
    pipe = tiny_stable_diffusion()
    with pytest.raises(InputError) as caught:
        attach(pipe, plan_of(networks=("self", "small"), steps=(2,)), {"small": change(other_network(pipe))})
    assert words in str(caught.value)
    assert "_fewstep_attachment" not in vars(pipe)


def test_other_text_widths_and_missing_networks_are_refused():
    pipe = tiny_stable_diffusion()
    wide = type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=16).eval()
    plan = plan_of(networks=("self", "small"), steps=(2,))
    with pytest.raises(InputError, match="network 'small' has cross_attention_dim=16 and the pipeline's own 8"):
        attach(pipe, plan, {"small": wide})
    with pytest.raises(InputError, match="the model-switch part needs 'small'; hand it over with attach"):
        attach(pipe, plan)
    with pytest.raises(InputError, match="unknown denoiser of the pipeline 'unte'; did you mean 'unet'"):
        attach(pipe, plan_of(networks=("self",), component="unte"))
    with pytest.raises(InputError, match=r"load the plan with Plan\.load"):
        attach(pipe, plan_of(networks=("small",), folders={"small": "small"}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"networks": ("self", "a")}, "2 networks need 1 steps or times; got 0"),
        ({"networks": ("self", "a", "b"), "steps": (3, 3)}, r"steps must increase from 0 or more; got \[3, 3\]"),
        ({"networks": ("self", "a"), "steps": (-1,)}, r"steps must increase from 0 or more; got \[-1\]"),
        ({"networks": ("self", "a", "b"), "times": (300, 500)}, r"times must decrease; got \[300\.0, 500\.0\]"),
        ({"networks": ("self", "a"), "steps": (1,), "times": (5,)}, "give steps or times, not both"),
        ({"networks": ("self",), "folders": {"a": "a"}}, "folder 'a' is for no network of this part"),
    ],
)
def test_parts_that_contradict_themselves(options, words):
    with pytest.raises(ValueError, match=words):
        ModelSwitch(**options)
