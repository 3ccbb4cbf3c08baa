"""Families of images whose denoiser is a transformer."""

import torch

from .family import Family, assembled, generators, kl_vae, pooled, text_masks, texts, tiny_pipeline


def _common(batch, seed, size=16):
    return {"generator": generators(batch, seed), "output_type": "latent", "height": size, "width": size}


def _dit_arguments(pipe, batch, seed):
    labels = [(seed + index) % 10 for index in range(batch)]
    return {"generator": generators(batch, seed), "output_type": "np", "class_labels": labels}


def _pixart(kind, **options):
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=8,
        **options,
    )
    scheduler = DPMSolverMultistepScheduler()
    return assembled(kind, transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def _pixart_arguments(pipe, batch, seed):
    plain = {"negative_prompt": None, "use_resolution_binning": False}
    return _common(batch, seed) | texts(batch, seed, 8) | text_masks(batch) | plain


def _sd3_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 16) | pooled(batch, seed, 16)


def _sana_arguments(pipe, batch, seed):
    return _pixart_arguments(pipe, batch, seed) | {"height": 32, "width": 32}


def _sana():
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return assembled("SanaPipeline", transformer=transformer, vae=vae, scheduler=scheduler)


def _aura():
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    # with its own initial values the text hardly reaches the output
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return assembled("AuraFlowPipeline", transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def _masked_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8) | text_masks(batch)


def _hunyuan():
    from diffusers import DDPMScheduler, HunyuanDiT2DModel

    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=4,
        text_len_t5=4,
    )
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=0.018)
    return assembled(
        "HunyuanDiTPipeline", transformer=transformer, vae=kl_vae(), scheduler=scheduler, requires_safety_checker=False
    )


def _hunyuan_arguments(pipe, batch, seed):
    second = texts(batch, seed, 8, names={"prompt_embeds_2": 2, "negative_prompt_embeds_2": 3})
    plain = text_masks(batch, suffix="_2") | {"use_resolution_binning": False, "original_size": (16, 16)}
    return _masked_arguments(pipe, batch, seed) | second | plain


def _lumina():
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=8,
    )
    return assembled(
        "Lumina2Pipeline", transformer=transformer, vae=kl_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0)
    )


def _lumina_arguments(pipe, batch, seed):
    return _masked_arguments(pipe, batch, seed) | {"height": 64, "width": 64}


def _cogview():
    from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        rope_axes_dim=(16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return assembled("CogView4Pipeline", transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def _cogview_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8)


def _qwen_arguments(pipe, batch, seed):
    attended = {f"{name}_mask": torch.ones(batch, 4, dtype=torch.long) for name in texts(batch, seed, 8)}
    return _common(batch, seed, size=32) | texts(batch, seed, 8) | attended


def _z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    return assembled(
        "ZImagePipeline",
        transformer=transformer,
        vae=kl_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _z_image_arguments(pipe, batch, seed):
    lists = {name: list(embeddings) for name, embeddings in texts(batch, seed, 8).items()}
    return _common(batch, seed) | lists


FAMILIES = (
    Family(
        "dit",
        lambda: tiny_pipeline("tiny_dit", layers=3),
        _dit_arguments,
        "transformer",
        "doubled",
        conditional_first=True,
    ),
    Family(
        "pixart-alpha",
        # told the size of the image, which the pipeline does at this sample size alone
        lambda: _pixart("PixArtAlphaPipeline", sample_size=128, use_additional_conditions=True),
        _pixart_arguments,
        "transformer",
        "doubled",
    ),
    Family(
        "pixart-sigma",
        lambda: _pixart("PixArtSigmaPipeline", sample_size=8, use_additional_conditions=False),
        _pixart_arguments,
        "transformer",
        "doubled",
    ),
    Family("sd3", lambda: tiny_pipeline("tiny_sd3", layers=3), _sd3_arguments, "transformer", "doubled"),
    Family("sana", _sana, _sana_arguments, "transformer", "doubled"),
    Family("auraflow", _aura, _masked_arguments, "transformer", "doubled"),
    Family("hunyuan-dit", _hunyuan, _hunyuan_arguments, "transformer", "doubled"),
    Family("lumina2", _lumina, _lumina_arguments, "transformer", "separate"),
    Family("cogview4", _cogview, _cogview_arguments, "transformer", "separate"),
    Family(
        "qwen-image",
        lambda: tiny_pipeline("tiny_qwen", layers=3),
        _qwen_arguments,
        "transformer",
        "separate",
        "true_cfg_scale",
    ),
    Family("z-image", _z_image, _z_image_arguments, "transformer", "doubled", conditional_first=True),
)
