"""Families of video whose denoiser is a transformer."""

import torch

from .family import Family, assembled, generators, kl_vae, rows, text_masks, texts, tiny_pipeline


def _common(batch, seed, frames=5):
    sizes = {"height": 32, "width": 32, "num_frames": frames}
    return {"generator": generators(batch, seed), "output_type": "latent"} | sizes


def _cogvideo():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=4,
    )
    vae = AutoencoderKLCogVideoX(block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2)
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return assembled("CogVideoXPipeline", transformer=transformer, vae=vae, scheduler=scheduler)


def _plain_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8)


def _flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=8,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    scheduler = _flow()
    return assembled("LTXPipeline", transformer=transformer, vae=vae, scheduler=scheduler)


def _masked_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8) | text_masks(batch)


def _mochi():
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel

    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=8,
        text_embed_dim=8,
        time_embed_dim=8,
        max_sequence_length=4,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return assembled("MochiPipeline", transformer=transformer, vae=vae, scheduler=scheduler)


def _mochi_arguments(pipe, batch, seed):
    return _common(batch, seed, frames=7) | texts(batch, seed, 8) | text_masks(batch)


def _hunyuan_vae():
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )


def _hunyuan():
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 2, 2),
    )
    return assembled("HunyuanVideoPipeline", transformer=transformer, vae=_hunyuan_vae(), scheduler=_flow())


def _hunyuan_arguments(pipe, batch, seed):
    prompt = {"prompt_embeds": rows(batch, seed, (4, 8)), "pooled_prompt_embeds": rows(batch, seed, (8,), 2)}
    mask = {"prompt_attention_mask": torch.ones(batch, 4, dtype=torch.long)}
    return _common(batch, seed) | prompt | mask


def _allegro():
    from diffusers import AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=8,
    )
    vae = AutoencoderKLAllegro(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
    scheduler = EulerAncestralDiscreteScheduler()
    return assembled("AllegroPipeline", transformer=transformer, vae=vae, scheduler=scheduler)


def _allegro_arguments(pipe, batch, seed):
    return _masked_arguments(pipe, batch, seed) | {"num_frames": 8, "negative_prompt": None}


def _latte():
    from diffusers import DDIMScheduler, LatteTransformer3DModel

    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return assembled("LattePipeline", transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def _latte_arguments(pipe, batch, seed):
    plain = {"height": 16, "width": 16, "video_length": 2, "negative_prompt": None, "mask_feature": False}
    return {"generator": generators(batch, seed), "output_type": "latent"} | texts(batch, seed, 8) | plain


def _kandinsky():
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=3,
        num_visual_blocks=3,
        axes_dims=(4, 2, 2),
    )
    return assembled("Kandinsky5T2VPipeline", transformer=transformer, vae=_hunyuan_vae(), scheduler=_flow())


def _kandinsky_arguments(pipe, batch, seed):
    names = {"prompt_embeds_qwen": 0, "negative_prompt_embeds_qwen": 1}
    clip = {
        f"{side}prompt_embeds_clip": rows(batch, seed, (8,), salt) for salt, side in enumerate(("", "negative_"), 2)
    }
    lengths = torch.arange(0, 4 * batch + 1, 4, dtype=torch.int32)
    edges = {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}
    return _common(batch, seed) | texts(batch, seed, 8, names=names) | clip | edges


FAMILIES = (
    Family("cogvideox", _cogvideo, _plain_arguments, "transformer", "doubled"),
    Family("wan", lambda: tiny_pipeline("tiny_wan", layers=3), _plain_arguments, "transformer", "separate"),
    Family("ltx", _ltx, _masked_arguments, "transformer", "doubled"),
    Family("mochi", _mochi, _mochi_arguments, "transformer", "doubled"),
    Family("hunyuan-video", _hunyuan, _hunyuan_arguments, "transformer", "embedded"),
    Family("allegro", _allegro, _allegro_arguments, "transformer", "doubled"),
    Family("latte", _latte, _latte_arguments, "transformer", "doubled"),
    Family("kandinsky5", _kandinsky, _kandinsky_arguments, "transformer", "separate"),
)
