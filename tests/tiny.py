"""Tiny random-weight pipelines, built from configurations: for mechanism, never for quality."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)


def tiny_scheduler(**options):
    return DDIMScheduler(clip_sample=False, **({"prediction_type": "v_prediction"} | options))


def tiny_dit(scheduler=None, layers=1) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )
    # the last layers of a fresh DiT are zero: give it something to say
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=1.0,
    )
    pipe = DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler or tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(pipeline=DDIMPipeline, scheduler=None, layers=1) -> DDIMPipeline | DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=layers,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    pipe = pipeline(unet=unet.eval(), scheduler=scheduler or tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_stable_diffusion(scheduler=None, layers=1, **unet_options):
    """StableDiffusionPipeline without a text encoder: prompts are given as embeddings (B, 4, 8)."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **unet_options,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=scheduler or tiny_scheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3(scheduler=None, layers=1):
    """StableDiffusion3Pipeline (flow matching) without text encoders: prompts are given as embeddings."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(names),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_causal_vae(cls):
    torch.manual_seed(1)
    return cls(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])


def tiny_wan(scheduler=None, layers=1):
    """WanPipeline, which evaluates its two branches of guidance in turn; prompts are given as embeddings."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    vae = _tiny_causal_vae(AutoencoderKLWan)
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=layers
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_qwen(scheduler=None, layers=1):
    """QwenImagePipeline: two branches in turn, whose combination is brought to the norm of the conditional one."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    vae = _tiny_causal_vae(AutoencoderKLQwenImage)
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=layers, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(4, 6, 6)
    )
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = QwenImagePipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=None, tokenizer=None, transformer=transformer.eval()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def call_arguments(pipe, batch=2, seed=0):
    """Arguments that every one of these pipelines needs for ``batch`` images."""
    draw = torch.Generator().manual_seed(99)
    common = {"generator": generators(batch, seed), "output_type": "np"}
    name = type(pipe).__name__
    if name == "DiTPipeline":
        return common | {"class_labels": [index % 10 for index in range(batch)]}
    if name in ("DDIMPipeline", "DDPMPipeline"):
        return common | {"batch_size": batch}
    embeds = {
        "prompt_embeds": torch.randn(batch, 4, 8, generator=draw),
        "negative_prompt_embeds": torch.randn(batch, 4, 8, generator=draw),
    }
    if name == "WanPipeline":
        return common | embeds | {"height": 16, "width": 16, "num_frames": 1, "output_type": "latent"}
    if name == "QwenImagePipeline":
        masks = {f"{key}_mask": torch.ones(batch, 4, dtype=torch.long) for key in embeds}
        return common | embeds | masks | {"height": 32, "width": 32, "output_type": "latent"}
    if name == "StableDiffusionPipeline":
        return common | embeds | {"height": 16, "width": 16}
    wide = {key: torch.randn(batch, 4, 16, generator=draw) for key in embeds}
    pooled = {
        "pooled_prompt_embeds": torch.randn(batch, 16, generator=draw),
        "negative_pooled_prompt_embeds": torch.randn(batch, 16, generator=draw),
    }
    return common | wide | pooled | {"height": 16, "width": 16}


TINY = {
    "dit": tiny_dit,
    "unet": tiny_unet,
    "stable-diffusion": tiny_stable_diffusion,
    "sd3": tiny_sd3,
}
