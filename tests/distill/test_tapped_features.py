"""Features of a network at its blocks: which blocks, how wide, and what reaches whom."""

import pytest
import torch
from method_cases import TinySource, method_of, team_of
from tiny import tiny_dit
from zoo import ZOO

from fewstep.distill.encode import encode
from fewstep.distill.features import blocks_to_tap, features_of, tapped
from fewstep.distill.role_kinds import Base
from fewstep.distill.roles import Roles
from fewstep.distill.team import Team
from fewstep.samplers import InputError, Process

FAMILIES = ("stable-diffusion", "stable-video", "sana", "sd3", "flux", "latte", "lumina2")


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_give_samples_features_of_the_width_that_was_said(name):
    """In convolutional and in joint networks, where the text's stream is the other half of a block's output."""
    pipe = ZOO[name].build()
    network = getattr(pipe, ZOO[name].denoiser)
    taps = blocks_to_tap(network, 99)
    with tapped(network, [tap.name for tap in taps]) as kept:
        ZOO[name].call(pipe, batch=2, steps=2)
    assert [tap.channels for tap in taps] == [kept[tap.name].shape[2] for tap in taps]
    assert not any(module._forward_hooks for module in network.modules())


def test_of_two_streams_the_samples_is_taken():
    pipe = ZOO["sd3"].build()
    seen = {}
    block = pipe.transformer.transformer_blocks[1]
    block.register_forward_hook(lambda module, args, output: seen.update(text=output[0], sample=output[1]))
    with tapped(pipe.transformer, ["transformer_blocks.1"]) as kept:
        ZOO["sd3"].call(pipe, batch=2, steps=2)
    assert torch.equal(kept["transformer_blocks.1"], seen["sample"])
    assert kept["transformer_blocks.1"].shape[1] != seen["text"].shape[1]


def test_blocks_are_spread_over_the_depth_and_one_is_the_middle():
    unet = ZOO["stable-diffusion"].build().unet
    assert [tap.name for tap in blocks_to_tap(unet, 1)] == ["mid_block"]
    assert [tap.name for tap in blocks_to_tap(unet, 2)] == ["down_blocks.1", "up_blocks.0"]
    dit = tiny_dit(layers=12).transformer
    assert [tap.name.rpartition(".")[2] for tap in blocks_to_tap(dit, 4)] == ["1", "4", "7", "10"]
    assert [tap.name.rpartition(".")[2] for tap in blocks_to_tap(dit, 1)] == ["6"]
    with pytest.raises(InputError, match="features are taken at 1 block or more; got 0"):
        blocks_to_tap(dit, 0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_features_are_those_of_the_role_and_their_gradient_reaches_the_state_alone(lora, checkpointing):
    team = team_of(method_of("lcm"), lora)
    condition = TinySource().batch(0, range(2)).condition
    t = torch.tensor([500.0, 900.0])
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted, gradients = {}, {}
    for role in ("teacher", "student"):
        leaf = x.clone().requires_grad_()
        with team.roles.use(role, frozen=True) as network:
            block = network.transformer_blocks[0]
            handle = block.register_forward_hook(lambda m, a, out, role=role: wanted.update({role: out}))
            network(leaf, t, class_labels=condition.cond.inputs["class_labels"])
            handle.remove()
        gradients[role] = torch.autograd.grad(wanted[role].square().sum(), leaf)[0]
    if checkpointing:
        team.roles.enable_gradient_checkpointing()
    for role in ("teacher", "student"):
        leaf = x.clone().requires_grad_()
        (found,) = features_of(team, role, condition, 1)(leaf, t)
        torch.testing.assert_close(found, wanted[role])
        found.square().sum().backward()
        torch.testing.assert_close(leaf.grad, gradients[role])
        assert all(p.grad is None for name in team.roles.trained for p in team.trainable(name).values())
        assert not features_of(team, role, condition, 1, grad=False)(leaf, t)[0].requires_grad
    assert not torch.allclose(wanted["teacher"], wanted["student"])


def test_rows_of_one_sample_are_its_tokens():
    """Latte puts frames, and then patches, in rows of their own: each sample has the features it has alone."""
    pipe = ZOO["latte"].build()
    process = Process.from_scheduler(pipe.scheduler)
    team = Team(Roles(pipe.transformer, {"teacher": Base()}), process)
    condition = encode(pipe, ZOO["latte"].arguments(pipe, 2, 0))
    x = torch.randn(2, *condition.layout.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100.0, 700.0])
    together = features_of(team, "teacher", condition, 99)(x, t)
    for row in (0, 1):
        alone = features_of(team, "teacher", condition.rows([row]), 99)(x[row : row + 1], t[row : row + 1])
        for both, one in zip(together, alone, strict=True):
            assert len(both) == 2
            torch.testing.assert_close(both[row : row + 1], one)
