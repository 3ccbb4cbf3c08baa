"""Distillation trainers: students that sample in few steps, as stock diffusers loads them."""

from . import methods  # noqa: F401  registers them
from .conditions import Condition
from .deploy import consistency_plan, landing_plan, spread
from .loop import Loop, Outcome
from .loop_options import LoopOptions
from .lora import LoraSetting
from .method import METHODS, Loss, Method, Moment
from .options import DistillOptions
from .predict import Prediction, guided, predict
from .role_kinds import Adapter, Base, Ema, Extra, FullCopy, Kind
from .roles import Roles
from .run import distill
from .schedule import Average, Schedule, Stage
from .sources import Batch
from .team import Team, noise_like

__all__ = [
    "METHODS",
    "Adapter",
    "Average",
    "Base",
    "Batch",
    "Condition",
    "DistillOptions",
    "Ema",
    "Extra",
    "FullCopy",
    "Kind",
    "Loop",
    "LoopOptions",
    "LoraSetting",
    "Loss",
    "Method",
    "Moment",
    "Outcome",
    "Prediction",
    "Roles",
    "Schedule",
    "Stage",
    "Team",
    "consistency_plan",
    "distill",
    "guided",
    "landing_plan",
    "noise_like",
    "predict",
    "spread",
]
