"""The Flux families, and Chroma, which descends from them."""

import torch

from .family import Family, assembled, generators, kl_vae, masks, pictures, pooled, rows, text_masks, texts

VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}


def _common(batch, seed):
    return {"generator": generators(batch, seed), "output_type": "latent", "height": 16, "width": 16}


def _scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _flux(kind="FluxPipeline", **options):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 2, 2),
    }
    transformer = FluxTransformer2DModel(**sizes | options)
    vae = kl_vae(**VAE)
    return assembled(kind, transformer=transformer, vae=vae, scheduler=_scheduler())


def _flux_arguments(pipe, batch, seed):
    prompt = {"prompt_embeds": rows(batch, seed, (4, 8)), "pooled_prompt_embeds": rows(batch, seed, (8,), 2)}
    return _common(batch, seed) | prompt


def _true_guidance_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8) | pooled(batch, seed, 8) | {"true_cfg_scale": 3.0}


def _image_to_image_arguments(pipe, batch, seed):
    return _flux_arguments(pipe, batch, seed) | {"image": pictures(batch, seed), "strength": 0.5}


def _fill_arguments(pipe, batch, seed):
    return _flux_arguments(pipe, batch, seed) | {"image": pictures(batch, seed), "mask_image": masks(batch)}


def _kontext_arguments(pipe, batch, seed):
    sizes = {"max_area": 256, "_auto_resize": False}
    return _flux_arguments(pipe, batch, seed) | {"image": pictures(batch, seed)} | sizes


def _flux2():
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return assembled("Flux2Pipeline", transformer=transformer, vae=vae, scheduler=_scheduler())


def _flux2_arguments(pipe, batch, seed):
    return _common(batch, seed) | {"prompt_embeds": rows(batch, seed, (4, 8))}


def _chroma():
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    vae = kl_vae(**VAE)
    return assembled("ChromaPipeline", transformer=transformer, vae=vae, scheduler=_scheduler())


def _chroma_arguments(pipe, batch, seed):
    # the network takes masks of bools alone
    attended = {name: mask.bool() for name, mask in text_masks(batch).items()}
    return _common(batch, seed) | texts(batch, seed, 8) | attended


FAMILIES = (
    Family("flux", _flux, _flux_arguments, "transformer", "embedded"),
    Family("flux-true-cfg", _flux, _true_guidance_arguments, "transformer", "separate", "true_cfg_scale"),
    Family(
        "flux-img2img",
        lambda: _flux("FluxImg2ImgPipeline"),
        _image_to_image_arguments,
        "transformer",
        "embedded",
        share=0.5,
    ),
    Family(
        "flux-fill",
        lambda: _flux("FluxFillPipeline", in_channels=48, out_channels=16),
        _fill_arguments,
        "transformer",
        "embedded",
    ),
    Family("flux-kontext", lambda: _flux("FluxKontextPipeline"), _kontext_arguments, "transformer", "embedded"),
    Family("flux2", _flux2, _flux2_arguments, "transformer", "embedded"),
    Family("chroma", _chroma, _chroma_arguments, "transformer", "separate"),
)
