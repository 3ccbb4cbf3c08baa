"""The methods that ship, one file each; importing this package registers them."""

from .lcm import LCM
from .lcm_lora import LCMLora

__all__ = ["LCM", "LCMLora"]
