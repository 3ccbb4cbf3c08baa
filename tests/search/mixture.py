"""A pipeline whose network is exact: the noise of a Gaussian mixture, in closed form, under diffusers' DDIMPipeline."""

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from fewstep.samplers import Process


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """E[eps | x] or E[v | x] of sum_c w_c N(mean_c, spread_c^2 I) on pictures of 1 channel."""

    @register_to_config
    def __init__(self, sample_size=2, in_channels=1, components=4, seed=0, prediction_type="epsilon"):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        shape = (components, in_channels, sample_size, sample_size)
        means = torch.rand(shape, generator=draw, dtype=torch.float64) * 1.4 - 0.7
        spreads = 0.05 + 0.15 * torch.rand(components, generator=draw, dtype=torch.float64)
        self.register_buffer("means", means)
        self.register_buffer("spreads", spreads)
        self.register_buffer("weights", torch.rand(components, generator=draw, dtype=torch.float64) + 0.5)
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # gives the module a dtype
        self.process = Process.from_scheduler(mixture_scheduler(prediction_type))

    def x0(self, x, alpha, sigma):
        """E[x0 | x] (B, ...) at levels (B, 1)."""
        flat, means = x.flatten(1), self.means.flatten(1)
        away = flat[:, None] - alpha[..., None] * means
        variance = (alpha * self.spreads) ** 2 + sigma**2
        log = self.weights.log() - away.square().sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
        shift = (alpha * self.spreads**2 / variance)[..., None] * away
        return (log.softmax(1)[..., None] * (means + shift)).sum(1).reshape(x.shape)

    def forward(self, sample, timestep, return_dict=True):
        time = torch.as_tensor(timestep).reshape(-1).double().cpu().expand(len(sample))
        alpha, sigma = self.process.alpha(time)[:, None], self.process.sigma(time)[:, None]
        x = sample.double()
        x0 = self.x0(x, alpha, sigma)
        out = self.process.from_x0(x0, x, time).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def mixture_scheduler(prediction_type="epsilon"):
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


def mixture_pipeline(dtype=torch.float64, **options):
    """DDIMPipeline with an exact denoiser; pictures of 2 x 2 in about -1 to 1."""
    network = MixtureDenoiser(**options)
    network.anchor.data = network.anchor.data.to(dtype)
    pipe = DDIMPipeline(unet=network.eval(), scheduler=mixture_scheduler(options.get("prediction_type", "epsilon")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixture_call(numbers):
    """Arguments of a call for some samples, by their numbers."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    return {"batch_size": len(generators), "generator": generators, "output_type": "np"}
