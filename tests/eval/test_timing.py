import time

import pytest
import torch
from tiny import tiny_dit, tiny_unet
from torch import nn

from fewstep.eval.conditions import Conditions
from fewstep.eval.environment import environment
from fewstep.eval.shares import Clock, Shares, component_shares, network_shares
from fewstep.eval.timing import PeakMemory, Spread, count_flops, measure, measure_calls, timed, weights_bytes
from fewstep.eval.timing_files import load_timing, save_timing, timing_conditions
from fewstep.samplers import InputError, Plan, attach

LABELS = Conditions("labels", (0, 1, 2))
CPU = torch.device("cpu")


def plan(steps, scale=1.5):
    return Plan.from_json(
        {
            "fewstep_plan": 1,
            "grid": {"type": "spacing", "steps": steps},
            "guidance": {"type": "constant", "scale": scale},
        }
    )


def measured(steps=2, scale=1.5, **options):
    pipe = tiny_dit()
    with attach(pipe, plan(steps, scale)):
        return measure(pipe, LABELS, {}, first_seed=0, **({"batch_size": 4, "repeats": 5} | options))


def test_shares_sum_to_the_whole_within_one_percent():
    shares = measured().shares_s
    parts = shares.encode_s + shares.denoise_s + shares.decode_s + shares.other_s
    assert parts == pytest.approx(shares.total_s, rel=0.01, abs=5e-4)
    assert shares.adds_up
    assert shares.encode_s == 0
    assert min(shares.denoise_s, shares.decode_s, shares.other_s) > 0


def test_share_of_a_component_is_the_time_it_takes():
    pipe = tiny_dit()
    hooks = [
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.02)),
        pipe.vae.decoder.register_forward_pre_hook(lambda *_: time.sleep(0.05)),
    ]
    with attach(pipe, plan(3)):
        shares = measure(pipe, LABELS, {}, first_seed=0, batch_size=1, repeats=1).shares_s
    for hook in hooks:
        hook.remove()
    assert shares.denoise_s == pytest.approx(0.06, abs=0.05)
    assert shares.decode_s == pytest.approx(0.05, abs=0.04)
    assert shares.denoise_s >= 0.06
    assert shares.decode_s >= 0.05
    assert shares.other_s < 0.05


def test_nested_parts_are_counted_once():
    clock = Clock(CPU)

    def call():
        clock.enter("encode_s")
        time.sleep(0.02)
        clock.enter("denoise_s")
        time.sleep(0.03)
        clock.leave()
        clock.leave()

    shares = clock.seconds(call)
    assert shares.encode_s == pytest.approx(0.02, abs=0.015)
    assert shares.denoise_s == pytest.approx(0.03, abs=0.015)
    assert shares.adds_up


def test_shares_that_miss_the_whole_do_not_add_up():
    assert not Shares(0.0, 0.5, 0.2, 0.2, 1.0).adds_up
    assert Shares(0.0, 0.5, 0.2, 0.295, 1.0).adds_up


def test_pipeline_is_as_before_after_timing():
    pipe = tiny_dit()
    component_shares(pipe, lambda: pipe(class_labels=[1], num_inference_steps=1), 1.0)
    assert "decode" not in pipe.vae.__dict__
    assert "encode" not in pipe.vae.__dict__
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_pipeline_is_as_before_after_a_call_that_raised():
    pipe = tiny_dit()

    def fail():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        component_shares(pipe, fail, 1.0)
    assert "decode" not in pipe.vae.__dict__
    assert not pipe.transformer._forward_hooks


def test_all_repeats_are_kept_and_latency_is_not_throughput():
    timing = measured(repeats=5)
    assert len(timing.latency_s.values) == 5
    assert timing.latency_s.q1 <= timing.latency_s.median <= timing.latency_s.q3
    assert len(timing.throughput.values_s) == 3
    assert timing.throughput.batch == 4
    assert timing.throughput.images_per_s == pytest.approx(4 / sorted(timing.throughput.values_s)[1])


def test_a_batch_beyond_patience_is_timed_once():
    calls = []
    shares = Shares(0, 0, 0, 0, 1.0)

    def timing(patience_s):
        calls.clear()
        return measure_calls(
            [lambda: None] * 4, lambda: calls.append(1), batch_size=2, device=CPU,
            shares_of=lambda *_: (shares, ()), weights_bytes=0, patience_s=patience_s,
        )  # fmt: skip

    assert len(timing(0.0).throughput.values_s) == len(calls) == 1
    assert len(timing(100.0).throughput.values_s) == len(calls) - 1 == 3


def test_shares_of_networks_and_the_rest():
    network = nn.Linear(2, 2)
    network.register_forward_hook(lambda *_: time.sleep(0.02))

    def call():
        network(torch.zeros(1, 2))
        time.sleep(0.03)

    shares, warnings = network_shares([network], CPU, call, 0.05)
    assert shares.denoise_s == pytest.approx(0.02, abs=0.015)
    assert shares.other_s == pytest.approx(0.03, abs=0.015)
    assert shares.adds_up
    assert not network._forward_pre_hooks
    assert warnings == () or "busy machine" in warnings[0]


def test_quartiles():
    spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread((7.0,), 7.0, 7.0, 7.0)


def test_flops_are_twice_the_multiply_adds():
    linear = nn.Linear(30, 50, bias=False)
    assert count_flops(lambda: linear(torch.zeros(7, 30))) == 2 * 7 * 30 * 50


def test_flops_grow_by_the_denoiser_alone():
    """Guidance and steps multiply the denoiser's share and leave the decoder's."""
    decoder_and_two, decoder_and_four, decoder_and_one = (
        measured(steps, scale, repeats=1).flops for steps, scale in ((1, 1.5), (2, 1.5), (1, 1.0))
    )
    evaluation = decoder_and_two - decoder_and_one
    assert evaluation > 0
    assert decoder_and_four == decoder_and_two + 2 * evaluation


def test_weights_are_counted_once():
    pipe = tiny_unet()
    expected = sum(p.numel() * 4 for p in pipe.unet.parameters())
    assert weights_bytes(pipe) == expected
    pipe.unet.half()
    assert weights_bytes(pipe) == expected // 2


def test_peak_memory_sees_what_came_and_went():
    memory = PeakMemory(CPU)
    before = memory.read()
    block = torch.ones(256 * 2**20, dtype=torch.uint8)
    del block
    if memory.kind == "rss":  # the system may take back pages of files meanwhile
        assert memory.read() - before >= 192 * 2**20


def test_timed_waits_for_the_call():
    assert timed(lambda: time.sleep(0.02), CPU) >= 0.02


def test_timing_survives_its_file(tmp_path):
    timing = measured(repeats=2)
    conditions = timing_conditions("cpu", 4, 2)
    save_timing(tmp_path / "t.json", conditions, timing)
    assert load_timing(tmp_path / "t.json", conditions) == timing
    assert load_timing(tmp_path / "t.json", conditions | {"batch_size": 8}) is None
    assert load_timing(tmp_path / "none.json", conditions) is None


def test_damaged_timing_is_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"conditions": {}, "timing": {"latency_s": 3}}')
    with pytest.raises(InputError, match="is not a timing of this version of fewstep; delete it"):
        load_timing(path, {})


def test_environment_names_versions_and_device_but_no_path():
    env = environment("cpu")
    assert env["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert env["device"] == env["cpu"]
    assert "/" not in str(env["device"])
    assert set(env) >= {"platform", "python", "torch_threads", "matmul_precision", "attention", "revision"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shares_and_memory_on_cuda():
    pipe = tiny_dit().to("cuda")
    with attach(pipe, plan(4)):
        timing = measure(pipe, LABELS, {}, first_seed=0, batch_size=16, repeats=5)
    assert timing.shares_s.adds_up
    assert timing.peak_kind == "cuda_allocated"
    assert timing.peak_bytes >= timing.weights_bytes
    assert timing.flops == measured(4).flops
    assert environment("cuda")["device"] == torch.cuda.get_device_name()
