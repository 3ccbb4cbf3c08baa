"""The methods that ship, one file each; importing this package registers them."""

from .cd import CD
from .ect import ECT
from .lcf import LCF
from .lcm import LCM
from .lcm_lora import LCMLora
from .pcm import PCM
from .tcd import TCD
from .tscd import TSCD

__all__ = ["CD", "ECT", "LCF", "LCM", "LCMLora", "PCM", "TCD", "TSCD"]
