"""The methods that ship, one file each; importing this package registers them."""

from .cd import CD
from .ect import ECT
from .guided import Guided
from .guided_lora import GuidedLora
from .instaflow import InstaFlow
from .lcf import LCF
from .lcm import LCM
from .lcm_lora import LCMLora
from .pcm import PCM
from .progressive import Progressive
from .reflow import Reflow
from .scm import SCM
from .tcd import TCD
from .tscd import TSCD

__all__ = [
    "CD",
    "ECT",
    "LCF",
    "LCM",
    "PCM",
    "SCM",
    "TCD",
    "TSCD",
    "Guided",
    "GuidedLora",
    "InstaFlow",
    "LCMLora",
    "Progressive",
    "Reflow",
]
