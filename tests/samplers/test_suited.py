"""Solvers of another process than the pipeline's are refused before the pipeline is touched, and no others."""

import diffusers
import pytest
from tiny import tiny_dit, tiny_scheduler, tiny_sd3, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, RuleGrid, attach
from fewstep.samplers.explicit import EXPLICIT
from fewstep.samplers.suited import check_solver

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_MATCHING = [name for name in EXPLICIT.names() if "Flow" in name or "RF" in name]
EDM = [name for name in EXPLICIT.names() if "EDM" in name or "Cosine" in name]
OTHERS = [name for name in EXPLICIT.names() if name not in (*FLOW_MATCHING, *EDM)]


def make(name, **options):
    return getattr(diffusers, name)(**options)


def solver(name, own, **config):
    """As a plan has it."""
    return getattr(diffusers, name).from_config(own.config, **config)


@pytest.mark.parametrize(
    ("build", "name", "config", "words"),
    [
        (
            tiny_dit,
            "FlowMatchEulerDiscreteScheduler",
            {},
            "FlowMatchEulerDiscreteScheduler samples flow matching, and the pipeline's DDIMScheduler a variance "
            "preserving process; use a solver of that, such as DDIMScheduler",
        ),
        (
            tiny_unet,
            "EDMEulerScheduler",
            {},
            "EDMEulerScheduler samples an EDM process, and the pipeline's DDIMScheduler a variance preserving process; "
            "use a solver of that, such as DDIMScheduler",
        ),
        (
            tiny_sd3,
            "DDIMScheduler",
            {},
            "DDIMScheduler samples a variance preserving process, and the pipeline's FlowMatchEulerDiscreteScheduler "
            "flow matching; use a solver of that, such as FlowMatchEulerDiscreteScheduler",
        ),
        (
            tiny_sd3,
            "UniPCMultistepScheduler",
            {},
            "UniPCMultistepScheduler samples a variance preserving process, and the pipeline's "
            "FlowMatchEulerDiscreteScheduler flow matching; set use_flow_sigmas=true and "
            "prediction_type='flow_prediction' in the solver's config",
        ),
        (
            tiny_sd3,
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True},
            "DPMSolverMultistepScheduler takes the output for epsilon, and the pipeline's "
            "FlowMatchEulerDiscreteScheduler flow matching with flow_prediction; set use_flow_sigmas=true and",
        ),
        (
            lambda: tiny_sd3(make("UniPCMultistepScheduler", **FLOW)),
            "DDIMScheduler",
            {},
            "DDIMScheduler samples a variance preserving process, and the pipeline's UniPCMultistepScheduler flow",
        ),
        (
            lambda: tiny_sd3(make("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)),
            "FlowMatchHeunDiscreteScheduler",
            {},
            "FlowMatchHeunDiscreteScheduler samples flow matching, and the pipeline's FlowMatchEulerDiscreteScheduler "
            "flow matching with its time towards data",
        ),
    ],
)
def test_a_solver_of_another_process_is_refused(build, name, config, words):
    pipe = build()
    before = vars(pipe).copy()
    with pytest.raises(InputError) as caught:
        attach(pipe, Plan(solver=DiffusersSolver(scheduler=name, config=config)))
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert vars(pipe) == before


def test_every_solver_of_the_same_process_passes():
    own = tiny_scheduler()
    for name in OTHERS:
        check_solver(own, solver(name, own))
        check_solver(make(name), solver("DDIMScheduler", make(name)))
    own = make("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True)
    for name in FLOW_MATCHING:
        check_solver(own, solver(name, own))
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"):
        check_solver(own, solver(name, own, **FLOW))
        check_solver(make(name, **FLOW), solver("FlowMatchEulerDiscreteScheduler", make(name, **FLOW)))
    video = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    check_solver(video, solver("EDMEulerScheduler", video))
    for own in (make("EDMEulerScheduler"), make("EDMDPMSolverMultistepScheduler", prediction_type="v_prediction")):
        check_solver(own, solver("EDMEulerScheduler", own))
        check_solver(own, solver("EDMDPMSolverMultistepScheduler", own))


def test_other_betas_predictions_and_zero_snr_are_the_plans_affair():
    pipe, part = tiny_dit(), {"scheduler": "DPMSolverMultistepScheduler"}
    for config in (
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample"},
        {"final_sigmas_type": "zero"},
    ):
        attach(pipe, Plan(solver=DiffusersSolver(**part, config=config))).detach()
    attach(pipe, Plan(solver=DiffusersSolver(**part, config={"rescale_betas_zero_snr": True}))).detach()
    attach(pipe, Plan(solver=DiffusersSolver(**part), grid=RuleGrid(rule="trailing-zero-snr", steps=3))).detach()
    attach(pipe, Plan(grid=ExplicitGrid(timesteps=(900, 30)))).detach()


def test_schedulers_that_are_not_known_pass():
    check_solver(make("CMStochasticIterativeScheduler"), make("DDIMScheduler"))
    check_solver(make("DDIMScheduler"), make("CMStochasticIterativeScheduler"))
