"""A scheduler made from another's configuration is of the same network."""

import diffusers
import pytest
import torch

from fewstep.samplers.solver import make_scheduler

ON_A_TABLE = (
    "DDIM",
    "DDPM",
    "PNDM",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "DEISMultistep",
    "LCM",
    "TCD",
    "EulerDiscrete",
)


@pytest.mark.parametrize("name", ON_A_TABLE)
@pytest.mark.parametrize("base", ["DDIM", "LCM"])
def test_what_nobody_has_set_of_the_process_stays_what_it_was(name, base):
    """``from_config`` would give it the new class's default: LCM's betas are others than DDIM's."""
    like = getattr(diffusers, f"{base}Scheduler")()
    made = make_scheduler(getattr(diffusers, f"{name}Scheduler"), like, {})
    assert torch.equal(made.alphas_cumprod, like.alphas_cumprod)


def test_what_nobody_has_set_of_the_sampling_is_the_new_ones_default():
    made = make_scheduler(diffusers.DPMSolverMultistepScheduler, diffusers.DDIMScheduler(), {})
    assert made.config.timestep_spacing == "linspace"
