"""What only sampling needs rests on the host while a student trains."""

import pytest
import torch
from test_model_card import sd_with_text
from torch import nn

from fewstep.distill.idle import idle_parts, placed

HOST, OTHER = torch.device("cpu"), torch.device("meta")


def test_text_encoders_are_idle_once_all_is_encoded():
    pipe = sd_with_text()
    assert idle_parts(pipe, encodes=False) == [pipe.vae, pipe.text_encoder]
    assert idle_parts(pipe, encodes=True) == [pipe.vae]


def test_parts_are_back_for_a_while_and_in_the_end(monkeypatch):
    moves = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append((self, device)))
    part = nn.Linear(1, 1)
    with placed([part], HOST, OTHER):
        with placed([part], OTHER, HOST):
            assert moves == [(part, HOST), (part, OTHER)]
        assert moves[2:] == [(part, HOST)]
    assert moves[3:] == [(part, OTHER)]
    with pytest.raises(KeyError), placed([part], HOST, OTHER):
        raise KeyError
    assert moves[4:] == [(part, HOST), (part, OTHER)]
    count = len(moves)
    with placed([part], HOST, HOST):
        pass
    assert len(moves) == count
