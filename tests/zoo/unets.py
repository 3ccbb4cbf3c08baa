"""Families whose denoiser is a U-Net."""

import torch

from .family import Family, assembled, generators, masks, pictures, pooled, rows, texts, tiny_pipeline


def _common(batch, seed):
    return {"generator": generators(batch, seed), "output_type": "np"}


def _ddpm():
    from diffusers import DDPMPipeline, DDPMScheduler

    return tiny_pipeline("tiny_unet", DDPMPipeline, DDPMScheduler(), layers=2)


def _unconditional(pipe, batch, seed):
    return _common(batch, seed) | {"batch_size": batch}


def _stable_diffusion(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8) | {"height": 16, "width": 16}


def _stable_parts(**unet_options):
    pipe = tiny_pipeline("tiny_stable_diffusion", layers=2, **unet_options)
    return {"unet": pipe.unet, "vae": pipe.vae, "scheduler": pipe.scheduler}


def _stable(kind, **parts):
    return assembled(kind, requires_safety_checker=False, **parts)


def _image_to_image():
    return _stable("StableDiffusionImg2ImgPipeline", **_stable_parts())


def _image_to_image_arguments(pipe, batch, seed):
    return _common(batch, seed) | texts(batch, seed, 8) | {"image": pictures(batch, seed), "strength": 0.5}


def _inpaint():
    return _stable("StableDiffusionInpaintPipeline", **_stable_parts(in_channels=9))


def _inpaint_arguments(pipe, batch, seed):
    images = {"image": pictures(batch, seed), "mask_image": masks(batch)}
    return _stable_diffusion(pipe, batch, seed) | images


def _controlnet():
    from diffusers import ControlNetModel

    parts = _stable_parts()
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return _stable("StableDiffusionControlNetPipeline", **parts, controlnet=controlnet)


def _controlnet_arguments(pipe, batch, seed):
    return _stable_diffusion(pipe, batch, seed) | {"image": pictures(batch, seed)}


def _ip_adapter():
    parts = _stable_parts()
    torch.manual_seed(1)
    unet = parts["unet"]
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    keys = {
        f"{2 * index + 1}.to_{part}_ip.weight": 0.2 * torch.randn(8, 8)
        for index, _ in enumerate(crossed)
        for part in "kv"
    }
    image = {"proj.weight": torch.randn(4 * 8, 6), "proj.bias": torch.randn(4 * 8)}
    norm = {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    unet._load_ip_adapter_weights([{"image_proj": image | norm, "ip_adapter": keys}])
    return _stable("StableDiffusionPipeline", **parts)


def _ip_adapter_arguments(pipe, batch, seed):
    # one image for the whole batch: the pipeline repeats what it is given once per prompt
    images = torch.cat([rows(1, 0, (1, 6), salt) for salt in (4, 5)])
    return _stable_diffusion(pipe, batch, seed) | {"ip_adapter_image_embeds": [images]}


def _sdxl():
    from diffusers import EulerDiscreteScheduler

    parts = _stable_parts(
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return assembled("StableDiffusionXLPipeline", **parts | {"scheduler": scheduler, "add_watermarker": False})


def _sdxl_arguments(pipe, batch, seed):
    return _stable_diffusion(pipe, batch, seed) | pooled(batch, seed, 8)


def _stable_video():
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        num_attention_heads=2,
        cross_attention_dim=8,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=3 * 4,
        num_frames=2,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    return assembled(
        "StableVideoDiffusionPipeline",
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(),
    )


def _stable_video_arguments(pipe, batch, seed):
    sizes = {"height": 16, "width": 16, "num_frames": 2, "min_guidance_scale": 1.5}
    return _common(batch, seed) | sizes | {"image": pictures(batch, seed), "output_type": "latent"}


def _animate():
    from diffusers import MotionAdapter

    parts = _stable_parts()
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=2,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    return assembled("AnimateDiffPipeline", **parts, motion_adapter=adapter)


def _animate_arguments(pipe, batch, seed):
    return _stable_diffusion(pipe, batch, seed) | {"num_frames": 2, "output_type": "latent"}


FAMILIES = (
    Family("ddim", lambda: tiny_pipeline("tiny_unet", layers=2), _unconditional, "unet", "none"),
    Family("ddpm", _ddpm, _unconditional, "unet", "none"),
    Family(
        "stable-diffusion",
        lambda: tiny_pipeline("tiny_stable_diffusion", layers=2),
        _stable_diffusion,
        "unet",
        "doubled",
    ),
    Family("img2img", _image_to_image, _image_to_image_arguments, "unet", "doubled", share=0.5),
    Family("inpaint", _inpaint, _inpaint_arguments, "unet", "doubled"),
    Family("controlnet", _controlnet, _controlnet_arguments, "unet", "doubled"),
    Family("ip-adapter", _ip_adapter, _ip_adapter_arguments, "unet", "doubled"),
    Family("sdxl", _sdxl, _sdxl_arguments, "unet", "doubled"),
    Family("stable-video", _stable_video, _stable_video_arguments, "unet", "doubled", "max_guidance_scale"),
    Family("animatediff", _animate, _animate_arguments, "unet", "doubled"),
)
