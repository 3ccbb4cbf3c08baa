"""Which weights a loss reaches, whichever roles ran on the same network in between."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny import tiny_sd3, tiny_stable_diffusion, tiny_unet
from torch import nn
from zoo import ZOO

from fewstep.distill.lora import LoraSetting, adapted_layers, default_targets
from fewstep.distill.role_kinds import Adapter, Base, Ema, Extra, FullCopy
from fewstep.distill.roles import Roles
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_tensors, write_tensors

LORA = LoraSetting(rank=2, alpha=3.0)
TRAINED = {"module": FullCopy(), "adapter": Adapter(LORA)}


def dit(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
        dropout=dropout,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.to(dtype) if dtype != torch.float32 else network


def inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 4, 4, generator=draw)
    return {"hidden_states": x, "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 9])}


def run(network, **changes):
    return network(**inputs() | changes).sample


def four_roles(kind, dropout=0.0, checkpointing=False):
    """Student and fake of one kind, the base as teacher, and an average; no two of them agree."""
    kinds = {"student": TRAINED[kind], "teacher": Base(), "target": Ema("student"), "fake": TRAINED[kind]}
    roles = Roles(dit(dropout), kinds)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in roles.trained:
            for parameter in roles.trainable(name).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    roles.update_ema("target", 0.5)
    if checkpointing:
        roles.enable_gradient_checkpointing()
    return roles


def reached(roles):
    """Roles with a gradient in each of their tensors; a role with gradients in some of them fails."""
    found = set()
    for name in roles.trained:
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in roles.trainable(name).values()]
        if any(grads):
            assert sum(grads) >= 0.8 * len(grads)  # labels that are not in the batch, keys' biases
            found.add(name)
    with roles.use("teacher") as base:
        own = {id(p) for name in roles.trained for p in roles.trainable(name).values()}
        assert all(p.grad is None for p in base.parameters() if id(p) not in own)
    return found


def reference(roles, name, loss):
    """Gradients of ``loss(network)`` by functional calls: copied weights, or W + alpha / rank B A."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in roles.trainable(name).items()}
    weights = dict(leaves)
    if any("lora" in key for key in leaves):
        layers = [key.removesuffix(".lora_A.weight") for key in leaves if key.endswith("lora_A.weight")]
        plain = dict(dit().named_parameters())
        weights = {
            f"{layer}.weight": plain[f"{layer}.weight"]
            + LORA.alpha / LORA.rank * leaves[f"{layer}.lora_B.weight"] @ leaves[f"{layer}.lora_A.weight"]
            for layer in layers
        }
    network = dit().eval()
    value = loss(lambda **kwargs: torch.func.functional_call(network, weights, (), kwargs))
    return dict(zip(leaves, torch.autograd.grad(value, leaves.values(), allow_unused=True), strict=True))


def assert_gradients(roles, name, expected):
    for key, parameter in roles.trainable(name).items():
        if expected[key] is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", ["student", "fake"])
def test_a_loss_reaches_its_role_alone_whatever_runs_before_it_is_backpropagated(kind, checkpointing, name):
    roles = four_roles(kind, checkpointing=checkpointing)
    with roles.use(name) as network:
        output = run(network)
        with roles.use("teacher", grad=False) as teacher:
            wanted = run(teacher)
    with roles.use("target", grad=False) as target:
        wanted = wanted + run(target)
    assert not wanted.requires_grad
    (output - wanted).square().sum().backward()
    assert reached(roles) == {name}
    expected = reference(roles, name, lambda call: (run(call) - wanted).square().sum())
    assert_gradients(roles, name, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("through", ["fake", "teacher", "target"])
def test_a_loss_through_a_frozen_role_reaches_what_made_its_input(kind, checkpointing, through):
    roles = four_roles(kind, checkpointing=checkpointing)
    with roles.use("student") as student:
        made = run(student)[:, :4]
    with roles.use(through, frozen=True) as network:
        score = run(network, hidden_states=made).square().sum()
    with roles.use("fake") as fake:
        run(fake)
    score.backward()
    assert reached(roles) == {"student"}

    with roles.use(through, grad=False, frozen=True) as network:
        other = copy.deepcopy(network)
    expected = reference(roles, "student", lambda call: run(other, hidden_states=run(call)[:, :4]).square().sum())
    assert_gradients(roles, "student", expected)


@pytest.mark.parametrize("kind", TRAINED)
def test_dropout_is_recomputed_as_it_was(kind):
    grads = []
    for recompute in (False, True):
        roles = four_roles(kind, dropout=0.5, checkpointing=recompute)
        torch.manual_seed(7)
        with roles.use("student") as network:
            value = run(network).square().sum()
        value.backward()
        grads.append([p.grad for p in roles.trainable("student").values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", TRAINED)
def test_the_teacher_is_the_base_bit_for_bit_and_blocks_restore_on_exceptions(kind):
    roles = four_roles(kind)
    plain = run(dit().eval())
    outputs = {}
    for name in ("student", "target", "fake"):
        with roles.use(name, grad=False) as network:
            outputs[name] = run(network)
            with roles.use("teacher", grad=False) as teacher:
                assert torch.equal(run(teacher), plain)
            with pytest.raises(TypeError), roles.use("teacher", grad=False) as teacher:
                teacher(what="fails")
            assert torch.equal(run(network), outputs[name])
    assert not torch.equal(outputs["student"], outputs["fake"])
    assert not torch.equal(outputs["student"], plain)
    with roles.use("student", frozen=True):
        assert not any(p.requires_grad for p in roles.trainable("student").values())
    assert all(p.requires_grad for name in roles.trained for p in roles.trainable(name).values())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_weights_are_float32_on_a_half_precision_base(kind):
    roles = Roles(dit(dtype=torch.bfloat16), {"student": TRAINED[kind], "target": Ema("student"), "teacher": Base()})
    assert {p.dtype for p in roles.trainable("student").values()} == {torch.float32}
    assert {value.dtype for value in roles.state().values()} == {torch.float32}
    with roles.use("teacher") as base:
        assert next(base.parameters()).dtype == torch.bfloat16
    with roles.use("student") as network, torch.autocast("cpu", torch.bfloat16):
        run(network).sum().backward()
    assert roles.trainable("student").keys() == {
        key for key, p in roles.trainable("student").items() if p.grad is not None
    }


def test_the_average_is_the_geometric_sum():
    head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    kinds = {"a": Adapter(LORA), "m": FullCopy(), "e": Extra(head)}
    roles = Roles(dit(), kinds | {f"{name}_mean": Ema(name) for name in kinds})
    head[1].running_mean.fill_(5.0)
    for name in kinds:
        start = {key: value.clone() for key, value in roles.state().items() if key.startswith(f"{name}_mean/")}
        with torch.no_grad():
            for parameter in roles.trainable(name).values():
                parameter.add_(1.0)
        for _ in range(3):
            roles.update_ema(f"{name}_mean", 0.5)
        for key, live in roles.trainable(name).items():
            moved = roles.state()[f"{name}_mean/{key}"] - start[f"{name}_mean/{key}"]
            torch.testing.assert_close(moved, torch.full_like(live, 1 - 0.5**3))
    assert (roles.state()["e_mean/1.running_mean"] == 5).all()


@pytest.mark.parametrize("kind", TRAINED)
def test_state_goes_through_a_file_into_the_same_parameters(kind, tmp_path):
    roles = four_roles(kind)
    write_tensors(tmp_path / "roles.safetensors", roles.state())
    fresh = Roles(dit(), {"student": TRAINED[kind], "teacher": Base(), "target": Ema("student"), "fake": TRAINED[kind]})
    before = list(fresh.trainable("student").values())
    fresh.load_state(read_tensors(tmp_path / "roles.safetensors")[0])
    assert all(a is b for a, b in zip(before, fresh.trainable("student").values(), strict=True))
    for name in ("student", "teacher", "target", "fake"):
        with roles.use(name, grad=False) as old, fresh.use(name, grad=False) as new:
            assert torch.equal(run(old), run(new))


def test_a_state_of_other_roles_or_shapes_changes_nothing():
    roles = four_roles("adapter")
    state = roles.state()
    first = next(iter(state))
    cases = {
        "resume with the roles and layers": {key: value for key, value in state.items() if key != first},
        "in the checkpoint, .* here; resume with the network and rank": state | {first: torch.zeros(1)},
        "which no role holds": state | {"critic/weight": torch.zeros(1)},
    }
    for words, other in cases.items():
        with pytest.raises(InputError, match=words):
            roles.load_state({key: torch.zeros_like(value) for key, value in other.items()})
    assert all(torch.equal(value, state[key]) for key, value in roles.state().items())


def test_paired_blocks_draw_the_same_dropout_and_leave_the_stream_as_one_block_does():
    roles = Roles(dit(dropout=0.5), {"student": FullCopy(), "target": Ema("student"), "teacher": Base()})
    torch.manual_seed(5)
    with roles.paired_noise():
        with roles.use("student", grad=False) as network:
            first = run(network)
        between = torch.randn(1)
        with roles.use("target", grad=False) as network:
            assert torch.equal(run(network), first)
    after = torch.randn(1)
    with roles.use("target", grad=False) as network:
        assert not torch.equal(run(network), first)
    torch.manual_seed(5)
    with roles.use("student", grad=False) as network:
        run(network)
    assert torch.equal(between, torch.randn(1))
    assert torch.equal(after, torch.randn(1))


def test_modes():
    heads = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    base = dit(dropout=0.5)
    roles = Roles(base, {"student": Adapter(LORA), "teacher": Base(), "target": Ema("student"), "heads": Extra(heads)})
    plain = run(dit(dropout=0.5).eval())
    for name, frozen, drops in (("student", False, True), ("target", False, True), ("student", True, False)):
        with roles.use(name, grad=False, frozen=frozen) as network:
            assert torch.equal(run(network), plain) is not drops
            # labels are dropped in training mode by chance, in each block on its own
            assert not any(m.training for m in network.modules() if type(m).__name__ == "LabelEmbedding")
    with roles.use("teacher", grad=False) as network:
        assert torch.equal(run(network), plain)
    assert torch.equal(run(base), plain)
    for frozen in (False, True):
        with roles.use("heads", frozen=frozen) as network:
            assert network[1].training is not frozen
    assert not heads.training


def test_checkpointing_of_the_host_is_refused():
    roles = four_roles("adapter")
    with roles.use("student") as network:
        network.enable_gradient_checkpointing()
    with pytest.raises(InputError, match=r"call roles.enable_gradient_checkpointing\(\)"), roles.use("student"):
        pass
    with pytest.raises(InputError, match="Linear has no gradient checkpointing; leave"):
        Roles(nn.Linear(2, 2), {"teacher": Base()}).enable_gradient_checkpointing()


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"a b": Base()}, "letters, digits and underscores; got 'a b'"),
        ({"t": Ema("studnt"), "student": FullCopy()}, "did you mean 'student'"),
        ({"t": Ema("teacher"), "teacher": Base()}, "averages 'teacher', which is not trained"),
        ({"s": Adapter(LoraSetting(2, 2, ("to_w",)))}, "unknown layer of DiTTransformer2DModel 'to_w'; did you mean"),
        ({"s": Adapter(LoraSetting(2, 2, ("attn1",)))}, "cannot adapt transformer_blocks.0.attn1, a Attention"),
    ],
)
def test_impossible_roles_are_refused_before_the_base_is_touched(kinds, words):
    base = dit()
    with pytest.raises(InputError, match=words):
        Roles(base, {"first": Adapter(LORA)} | kinds)
    assert base.state_dict().keys() == dit().state_dict().keys()
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_misuse_is_named():
    roles = four_roles("adapter")
    with pytest.raises(InputError, match="unknown role 'studet'; did you mean 'student'"), roles.use("studet"):
        pass
    with pytest.raises(InputError, match="role 'teacher' is not trained: it is a Base; trained are student, fake"):
        roles.trainable("teacher")
    with pytest.raises(InputError, match="role 'student' is no moving average: it is a Adapter"):
        roles.update_ema("student", 0.9)
    with pytest.raises(InputError, match=r"lies in \[0, 1\]; got 1.5"):
        roles.update_ema("target", 1.5)
    with pytest.raises(InputError, match="role 'teacher' is no adapter"):
        roles.lora("teacher")
    with roles.use("teacher") as base, pytest.raises(InputError, match="already carries adapters"):
        Roles(base, {"teacher": Base()})


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"rank": 0, "alpha": 1}, "at least 1; got 0"),
        ({"rank": 1, "alpha": 0}, "above 0; got 0"),
        ({"rank": 1, "alpha": 1, "dropout": 1.0}, r"\[0, 1\); got 1"),
    ],
)
def test_settings_out_of_range(numbers, words):
    with pytest.raises(InputError, match=words):
        LoraSetting(**numbers)


def test_default_targets():
    unet = tiny_stable_diffusion().unet
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    left = layers - set(default_targets(unet))
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert set(default_targets(tiny_unet().unet)) < {name for name, _ in tiny_unet().unet.named_modules()}

    inside = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    blocks = [f"transformer_blocks.{index}" for index in range(2)]
    assert default_targets(dit()) == tuple(f"{block}.{name}" for block in blocks for name in inside)
    more = set(default_targets(dit(), modulation=True)) - set(default_targets(dit()))
    assert more == {f"{block}.norm1.linear" for block in blocks}

    assert adapted_layers(dit(), LORA) == default_targets(dit())
    joint = tiny_sd3().transformer
    assert any(name.endswith("add_k_proj") for name in default_targets(joint))
    assert not any("norm" in name for name in default_targets(joint))
    assert len(adapted_layers(dit(), LoraSetting(1, 1, ("to_q",)))) == 2


def test_motion_modules_are_adapted_but_for_what_they_call_by_keyword():
    unet = ZOO["animatediff"].build().unet
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    left = {name for name in layers - set(default_targets(unet)) if "motion_modules" in name}
    assert left
    assert left == {name for name in layers if "motion_modules" in name and ".proj_" in name}
    words = r"cannot adapt \S*motion_modules\.0\.proj_in, which AnimateDiff calls with input=.*; name layers by more"
    with pytest.raises(InputError, match=words):
        adapted_layers(unet, LoraSetting(1, 1, ("proj_in",)))
    spatial = adapted_layers(unet, LoraSetting(1, 1, ("attentions.0.proj_in",)))
    assert spatial
    assert all(".motion_modules." not in name for name in spatial)


def test_an_adapter_cannot_be_called_what_torch_keeps_for_itself():
    with pytest.raises(InputError, match="torch does not let an adapter be called 'forward'; give"):
        Roles(tiny_unet().unet, {"forward": Adapter(LoraSetting(2, 2.0))})
    Roles(tiny_unet().unet, {"forward": FullCopy()})
