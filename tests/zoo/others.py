"""Families of sound and of tokens."""

import torch

from .family import Family, assembled, generators, rows, texts


def _stable_audio():
    from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        channel_multiples=[1, 2],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32)
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    return assembled(
        "StableAudioPipeline", transformer=transformer, vae=vae, projection_model=projection, scheduler=scheduler
    )


def _stable_audio_arguments(pipe, batch, seed):
    attended = {name: torch.ones(batch, 4, dtype=torch.long) for name in ("attention_mask", "negative_attention_mask")}
    return {"generator": generators(batch, seed), "output_type": "np"} | texts(batch, seed, 8) | attended


def _amused():
    from diffusers import AmusedScheduler, UVit2DModel, VQModel

    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=16,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=32,
        codebook_size=16,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=3,
        block_num_heads=2,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        sample_size=4,
    )
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=16,
        sample_size=16,
    )
    scheduler = AmusedScheduler(mask_token_id=31)
    return assembled("AmusedPipeline", transformer=transformer, vqvae=vqvae, scheduler=scheduler)


def _amused_arguments(pipe, batch, seed):
    names = {"encoder_hidden_states": 0, "negative_encoder_hidden_states": 1}
    whole = {"prompt_embeds": rows(batch, seed, (8,), 2), "negative_prompt_embeds": rows(batch, seed, (8,), 3)}
    sizes = {"height": 8, "width": 8}
    # the scheduler draws with torch.multinomial, which takes one generator for the whole batch
    one = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
    return one | texts(batch, seed, 8, names=names) | whole | sizes


FAMILIES = (
    Family("stable-audio", _stable_audio, _stable_audio_arguments, "transformer", "doubled"),
    Family("amused", _amused, _amused_arguments, "transformer", "doubled", tokens=True),
)
