"""The input for the guidance scale: silent at first, and told exactly what stock pipelines tell."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.distill.deploy import landing_plan
from fewstep.distill.encode import encode
from fewstep.distill.guidance_embedding import told, with_guidance_embedding
from fewstep.distill.predict import predict
from fewstep.distill.row_trees import same
from fewstep.samplers import InputError, Process, attach


def listening(network):
    """A fitted network that has learned to listen."""
    fitted = with_guidance_embedding(network)
    generator = torch.Generator().manual_seed(1)
    weight = fitted.time_embedding.cond_proj.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return fitted


def captured(pipe, **options):
    return encode(pipe, {key: value for key, value in call_arguments(pipe).items() if key != "output_type"} | options)


def test_it_predicts_what_the_network_does_until_it_is_trained():
    network = tiny_stable_diffusion().unet
    fitted = with_guidance_embedding(network)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        wanted = network(x, 500, text).sample
        assert torch.equal(fitted(x, 500, text).sample, wanted)
        assert torch.equal(fitted(x, 500, text, timestep_cond=torch.randn(2, 256)).sample, wanted)
        assert not torch.equal(listening(network)(x, 500, text, timestep_cond=torch.randn(2, 256)).sample, wanted)
    assert network.config.time_cond_proj_dim is None
    assert network.time_embedding.cond_proj is None


def test_its_weights_are_the_networks_own_and_diffusers_knows_the_rest(tmp_path):
    network = tiny_stable_diffusion().unet
    fitted = listening(network)
    own, shared = dict(network.named_parameters()), dict(fitted.named_parameters())
    assert all(shared[name] is own[name] for name in own)
    assert shared.keys() - own.keys() == {"time_embedding.cond_proj.weight"}
    fitted.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    x, text, scale = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8), torch.randn(2, 256)
    with torch.no_grad():
        assert torch.equal(again(x, 500, text, scale).sample, fitted(x, 500, text, scale).sample)


@pytest.mark.parametrize("scale", [1.7, 7.5, 14.0])
def test_it_is_told_what_the_stock_pipeline_tells(scale):
    pipe = tiny_stable_diffusion()
    plain = captured(pipe, guidance_scale=2.0)
    pipe.unet = listening(pipe.unet)
    stock = captured(pipe, guidance_scale=scale)
    ours = told(plain, torch.tensor([scale, scale], dtype=torch.float64))
    assert stock.uncond is None
    assert same(dict(ours.cond.inputs), dict(stock.cond.inputs))
    assert torch.equal(ours.cond.inputs["timestep_cond"], ours.uncond.inputs["timestep_cond"])


def test_a_step_of_the_stock_pipeline_is_the_students():
    """One DDIM step from noise, each sample with a scale of its own in training."""
    pipe = tiny_stable_diffusion()
    plain = captured(pipe, guidance_scale=2.0)
    pipe.unet = listening(pipe.unet)
    process, x = Process.from_scheduler(pipe.scheduler), torch.randn(2, 4, 8, 8)
    scales = torch.tensor([3.0, 9.0], dtype=torch.float64)
    with torch.no_grad():
        ours = predict(pipe.unet, process, x, 999.0, told(plain, scales)).x0
    arguments = call_arguments(pipe) | {"latents": x, "output_type": "latent"}
    for row, scale in enumerate(scales.tolist()):
        with attach(pipe, landing_plan(process, [999.0])) as fast:
            images = pipe(**arguments, guidance_scale=scale).images
        assert fast.stats.steps[0].evaluations == 1
        torch.testing.assert_close(images[row], ours[row], rtol=1e-4, atol=1e-5)
    assert (ours[0] - images[0]).abs().max() > 0.01


@pytest.mark.parametrize(("pipeline", "name"), [(tiny_dit, "DiT"), (tiny_sd3, "SD3"), (tiny_unet, "UNet2DModel")])
def test_networks_without_the_input_are_refused(pipeline, name):
    pipe = pipeline()
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with pytest.raises(InputError, match=rf"{name}.* has no input for the guidance scale; set embed_guidance to false"):
        with_guidance_embedding(network)


def test_networks_that_are_told_already_are_refused():
    network = with_guidance_embedding(tiny_stable_diffusion().unet)
    with pytest.raises(InputError, match="UNet2DConditionModel is told the guidance scale already, as one that was"):
        with_guidance_embedding(network)


def test_pipelines_that_would_not_tell_are_refused():
    condition = encode(tiny_dit(), {"class_labels": [0, 1], "guidance_scale": 2.0})
    with pytest.raises(InputError, match="DiTPipeline does not tell its network the guidance scale; set embed_guid"):
        told(condition, torch.ones(2))
