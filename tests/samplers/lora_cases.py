"""Plans with a random LoRA beside them."""

import pytest
import torch
from tiny import call_arguments

from fewstep.distill.export_lora import export_lora
from fewstep.distill.lora import Lora, LoraSetting, adapted_layers
from fewstep.samplers import InputError, LoraWeights, Plan, SpacingGrid, attach, denoisers

SETTING = LoraSetting(rank=3, alpha=5.0)


def random_lora(network, setting=SETTING, seed=3):
    """A LoRA that changes much."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name in adapted_layers(network, setting):
        weight = network.get_submodule(name).weight
        shapes = {
            "A": (setting.rank, *weight.shape[1:]),
            "B": (len(weight), setting.rank, *(1,) * (weight.ndim - 2)),
        }
        for side, shape in shapes.items():
            tensors[f"{name}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=draw)
    return Lora(setting, tensors)


def saved(folder, pipe, setting=SETTING, seed=3, steps=3, **plan):
    """A plan whose LoRA is beside it, and what else stands there."""
    component, network = next(iter(denoisers(pipe).items()))
    files = export_lora(pipe, component, random_lora(network, setting, seed), folder)
    part = LoraWeights(file=files.paths[0].name)
    return loaded(folder, weights=part, grid=SpacingGrid(steps=steps), **plan), files


def loaded(folder, **fields):
    Plan(**fields).save(folder / "plan.json")
    return Plan.load(folder / "plan.json")


def stock(pipe, files, folder):
    """The pipeline once the line of the export has loaded the files."""
    exec(f"{files.imports}\n{files.load.replace('FOLDER', str(folder))}", {"pipe": pipe})
    next(iter(denoisers(pipe).values())).requires_grad_(False)  # torch multiplies those that do in another order
    return pipe


def images_of(pipe, plan=None, **arguments):
    arguments = call_arguments(pipe) | arguments
    if plan is None:
        return pipe(**arguments).images
    with attach(pipe, plan):
        return pipe(**arguments).images


def modules_of(pipe):
    """All that a module of the denoiser is, apart from the values of its tensors."""
    network = next(iter(denoisers(pipe).values()))
    return [(name, type(module), len(module._forward_hooks)) for name, module in network.named_modules()]


def refused(pipe, plan, words):
    before, state = dict(vars(pipe)), modules_of(pipe)
    with pytest.raises(InputError) as caught:
        attach(pipe, plan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vars(pipe) == before
    assert modules_of(pipe) == state
