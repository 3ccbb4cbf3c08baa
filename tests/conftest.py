import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files whose tests fork come first: in a child that is forked beside threads of autograd no gradient flows."""
    items.sort(key=lambda item: "forked" not in dir(getattr(item, "module", None)))
