"""The methods that ship, one file each; importing this package registers them."""

from .adversarial_consistency import AdversarialConsistency
from .cd import CD
from .dmd2 import DMD2
from .ect import ECT
from .guided import Guided
from .guided_lora import GuidedLora
from .icd import ICD
from .instaflow import InstaFlow
from .lcf import LCF
from .lcm import LCM
from .lcm_lora import LCMLora
from .mmd import Discrepancy
from .pcm import PCM
from .progressive import Progressive
from .reflow import Reflow
from .scm import SCM
from .sim import ScoreImplicit
from .swiftbrush import SwiftBrush
from .tcd import TCD
from .tscd import TSCD

__all__ = [
    "CD",
    "DMD2",
    "ECT",
    "ICD",
    "LCF",
    "LCM",
    "PCM",
    "SCM",
    "TCD",
    "TSCD",
    "AdversarialConsistency",
    "Discrepancy",
    "Guided",
    "GuidedLora",
    "InstaFlow",
    "LCMLora",
    "Progressive",
    "Reflow",
    "ScoreImplicit",
    "SwiftBrush",
]
