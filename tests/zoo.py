"""Toy configurations of diffusers 0.42's denoisers, with random weights: what erg.rectify meets in each.

config: arguments of the constructor; inputs: of a forward of two samples.
calls: the numbers of ("self", "cross") calls of F.scaled_dot_product_attention in a forward.
kind: the kind of those by which the image (the video, the audio) attends; "self" by default.
joint: a range of these calls, those in which the image takes part; all by default.
image: the slice of the queries of these calls that the image takes; all by default.
folds: the rows of these calls are not the samples.
main: the argument that holds the noisy image; "hidden_states" by default.
output: a function of what the forward returns: a tensor that all calls reach; its first tensor by default.
tolerance: of the comparison with attention by hand, where a model computes it in bfloat16; 1e-5 by default.
"""
import torch
from torch import nn

randn, zeros, ones = torch.randn, torch.zeros, torch.ones


def full(n, value):
    return torch.full((n,), value)


def given(image, time, text=None, **more):
    """Inputs by their usual names; the shapes of image and text are those of one of two samples."""
    texts = {} if text is None else dict(encoder_hidden_states=randn(2, *text))
    return dict(hidden_states=randn(2, *image), timestep=full(2, time), **texts, **more)


def normal(*shape, seed=1):
    """The same numbers at each call, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(model, seed=0):
    """The model in float64, every weight random and attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            nn.init.constant_(p, 2.0)
        else:
            nn.init.normal_(p, std=p[0].numel()**-0.5 if p.dim() > 1 else 0.3, generator=generator)
    return model.double().eval().requires_grad_(False)


# What several configurations share

HEADS = dict(num_attention_heads=2, attention_head_dim=8)
TWO = dict(HEADS, num_layers=2)
JOINT = dict(TWO, in_channels=4, out_channels=4)
SD3 = dict(JOINT, sample_size=8, caption_projection_dim=16, pos_embed_max_size=8)
COGVIEW = dict(JOINT, text_embed_dim=8, time_embed_dim=8, condition_dim=2)
COGVIDEO = dict(JOINT, time_embed_dim=8, text_embed_dim=8, sample_width=8, sample_height=8, sample_frames=9,
                max_text_seq_length=5)
FLUX = dict(HEADS, in_channels=4, num_layers=1, num_single_layers=1)
WAN = dict(JOINT, attention_head_dim=12, freq_dim=8, ffn_dim=16)
KANDINSKY = dict(in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=16, ff_dim=16, num_visual_blocks=2)
UNET = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1)
CROSS = dict(UNET, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=6)
FLAT = dict(CROSS, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4)

ZOO = {
    "AceStepTransformer1DModel": dict(  # self 0: sliding window; self 1: full
        config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4,
                    sliding_window=2, encoder_hidden_size=8),
        inputs=lambda: given((16, 4), 0.5, (5, 8), timestep_r=full(2, 0.5), context_latents=randn(2, 16, 8)),
        calls=(2, 2)),
    "AllegroTransformer3DModel": dict(
        config=dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
                    sample_height=8, sample_width=8, sample_frames=3, caption_channels=8),
        inputs=lambda: given((4, 3, 8, 8), 500, (5, 8), encoder_attention_mask=ones(2, 5),
                             image_rotary_emb=(((randn(48, 4),) * 2,) * 3, (torch.arange(48)[None],) * 3)),
        calls=(2, 2)),
    "AnyFlowTransformer3DModel": dict(
        config=dict(WAN, text_dim=8, rope_max_seq_len=16),
        inputs=lambda: dict(hidden_states=randn(2, 2, 4, 8, 8), timestep=500 + zeros(2, 2),
                            r_timestep=400 + zeros(2, 2), encoder_hidden_states=randn(2, 5, 8)),
        calls=(2, 2)),
    "AudioLDM2UNet2DConditionModel": dict(
        config=FLAT,
        inputs=lambda: dict(sample=randn(2, 4, 8, 8), timestep=500, encoder_hidden_states=randn(2, 3, 6)),
        calls=(4, 4), main="sample"),
    "AuraFlowTransformer2DModel": dict(  # 8 register tokens, text, image
        config=dict(HEADS, sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, pos_embed_max_size=16,
                    joint_attention_dim=8, caption_projection_dim=16),
        inputs=lambda: given((4, 8, 8), 0.5, (5, 8)), calls=(2, 0), image=slice(13, 29)),
    "BriaFibo2Transformer2DModel": dict(  # self 0: image; self 1: gist of the text; then gist, image
        config=dict(in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=8,
                    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4,
                    max_num_gist_tokens=4, gist_step=2, gist_min_text_len=4, gist_max_text_len=8,
                    axes_dims=(4, 4, 4), axes_lens=(16, 8, 8)),
        inputs=lambda: given((4, 8, 8), 0.5, (2, 5, 8)), calls=(4, 2), joint=range(2, 4), image=slice(4, 20)),
    "BriaFiboTransformer2DModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=8, axes_dims_rope=[4, 2, 2], text_encoder_dim=8),
        inputs=lambda: given((16, 4), 500., (5, 8), img_ids=randn(16, 3), txt_ids=zeros(5, 3),
                             text_encoder_layers=[randn(2, 5, 8)] * 2),
        calls=(2, 0), image=slice(5, 21)),
    "BriaTransformer2DModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=8, axes_dims_rope=[4, 2, 2]),
        inputs=lambda: given((16, 4), 500., (5, 8), img_ids=randn(16, 3), txt_ids=zeros(5, 3)),
        calls=(2, 0), image=slice(5, 21)),
    "ChromaTransformer2DModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=8, axes_dims_rope=(4, 2, 2), approximator_num_channels=8,
                    approximator_hidden_dim=8, approximator_layers=1),
        inputs=lambda: given((16, 4), 0.5, (5, 8), img_ids=randn(16, 3), txt_ids=zeros(5, 3)),
        calls=(2, 0), image=slice(5, 21)),
    "ChronoEditTransformer3DModel": dict(  # with an image condition, two cross calls a layer: image, text
        config=dict(WAN, text_dim=8, rope_max_seq_len=16),
        inputs=lambda: given((4, 2, 8, 8), 500, (5, 8)), calls=(2, 2)),
    "CogVideoXTransformer3DModel": dict(  # text, video
        config=COGVIDEO,
        inputs=lambda: given((3, 4, 8, 8), 500, (5, 8)), calls=(2, 0), image=slice(5, 53)),
    "CogView3PlusTransformer2DModel": dict(  # text, image
        config=dict(COGVIEW, pos_embed_max_size=8, sample_size=8),
        inputs=lambda: given((4, 8, 8), 500, (5, 8), original_size=ones(2, 2), target_size=ones(2, 2),
                             crop_coords=zeros(2, 2)),
        calls=(2, 0), image=slice(5, 21)),
    "CogView4Transformer2DModel": dict(  # text, image
        config=dict(COGVIEW, rope_axes_dim=(8, 8)),
        inputs=lambda: given((4, 8, 8), 500, (5, 8), original_size=ones(2, 2), target_size=ones(2, 2),
                             crop_coords=zeros(2, 2)),
        calls=(2, 0), image=slice(5, 21)),
    # text, video; out of reach: the attention to a face (softmax by hand)
    "ConsisIDTransformer3DModel": dict(
        config=COGVIDEO,
        inputs=lambda: given((3, 4, 8, 8), 500, (5, 8)), calls=(2, 0), image=slice(5, 53)),
    # cross: the image's queries, which see all; self: the text; one packed sample
    "Cosmos3OmniTransformer": dict(
        config=dict(head_dim=8, hidden_size=16, intermediate_size=16, latent_channel=4, num_attention_heads=2,
                    num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=8,
                    rope_axes_dim=[2, 1, 1]),
        inputs=lambda: dict(input_ids=torch.arange(5), text_indexes=torch.arange(5), und_len=5,
                            sequence_length=21, position_ids=torch.arange(21)[None].repeat(3, 1),
                            vision_tokens=[randn(1, 4, 1, 8, 8)], vision_token_shapes=[(1, 4, 4)],
                            vision_sequence_indexes=torch.arange(5, 21),
                            vision_mse_loss_indexes=torch.arange(5, 21), vision_timesteps=full(16, 500),
                            vision_noisy_frame_indexes=[torch.arange(1)]),
        calls=(2, 2), kind="cross", main="vision_tokens", folds=True),
    "CosmosTransformer3DModel": dict(
        config=dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                    text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), concat_padding_mask=False),
        inputs=lambda: given((4, 2, 8, 8), 0.5, (5, 8)), calls=(2, 2)),
    "DiTTransformer2DModel": dict(
        config=dict(JOINT, sample_size=8, norm_num_groups=2, num_embeds_ada_norm=1000),
        inputs=lambda: given((4, 8, 8), 500, class_labels=torch.arange(2)), calls=(2, 0)),
    "DreamLiteTransformer2DModel": dict(
        config=dict(TWO, in_channels=8, norm_num_groups=2, cross_attention_dim=8),
        inputs=lambda: dict(hidden_states=randn(2, 8, 4, 4), encoder_hidden_states=randn(2, 5, 8)),
        calls=(2, 2)),
    "EasyAnimateTransformer3DModel": dict(  # text, video
        config=dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
                    sample_width=8, sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=8,
                    text_embed_dim=8),
        inputs=lambda: given((4, 2, 8, 8), 500, (5, 8)), calls=(2, 0), image=slice(5, 37)),
    "ErnieImageTransformer2DModel": dict(  # image, text
        config=dict(hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=16, in_channels=4,
                    out_channels=4, text_in_dim=8, rope_axes_dim=(4, 2, 2)),
        inputs=lambda: given((4, 4, 4), 500, text_bth=randn(2, 5, 8), text_lens=torch.tensor([5, 4])),
        calls=(2, 0), image=slice(0, 16)),
    "Flux2Transformer2DModel": dict(  # text, image; with its key-value cache: kind "cross"
        config=dict(FLUX, joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (5, 8), img_ids=randn(16, 4), txt_ids=zeros(5, 4),
                             guidance=full(2, 1.)),
        calls=(2, 0), image=slice(5, 21)),
    "Flux3Transformer2DModel": dict(  # self 0: text; self 1: image; then text, image
        config=dict(HEADS, in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2,
                    joint_attention_dim=8, timestep_channels=8, axes_dims_rope=(2, 2, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (5, 8), img_ids=randn(16, 4), txt_ids=zeros(5, 4)),
        calls=(4, 0), joint=range(2, 4), image=slice(5, 21)),
    "FluxControlNetModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (3, 6), controlnet_cond=randn(2, 16, 4),
                             pooled_projections=randn(2, 5), img_ids=zeros(16, 3), txt_ids=zeros(3, 3)),
        calls=(2, 0), image=slice(3, 19), output=lambda out: out[1][-1]),
    "FluxTransformer2DModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (5, 8), pooled_projections=randn(2, 8), img_ids=zeros(16, 3),
                             txt_ids=zeros(5, 3)),
        calls=(2, 0), image=slice(5, 21)),
    "GlmImageTransformer2DModel": dict(  # text, image; where it reads its key-value cache: kind "cross"
        config=dict(COGVIEW, prior_vq_quantizer_codebook_size=8),
        inputs=lambda: given((4, 8, 8), 500, (5, 8), prior_token_id=zeros(2, 16).long(),
                             prior_token_drop=zeros(2).bool(), target_size=ones(2, 2),
                             crop_coords=zeros(2, 2)),
        calls=(2, 0), image=slice(5, 21)),
    "HeliosTransformer3DModel": dict(  # earlier frames, current frames
        config=dict(WAN, text_dim=8, rope_dim=(4, 4, 4)),
        inputs=lambda: given((4, 2, 8, 8), 500, (5, 8), latents_history_short=randn(2, 4, 1, 8, 8),
                             indices_hidden_states=ones(2, 2), indices_latents_history_short=zeros(2, 1)),
        calls=(2, 2), image=slice(16, 48)),
    "HiDreamImageTransformer2DModel": dict(  # image, texts
        config=dict(FLUX, patch_size=2, caption_channels=[6, 5], text_emb_dim=7, num_routed_experts=1,
                    num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8),
                    llama_layers=[0, 1]),
        inputs=lambda: dict(hidden_states=randn(2, 4, 8, 8), timesteps=full(2, 500.0),
                            encoder_hidden_states_t5=randn(2, 3, 6),
                            encoder_hidden_states_llama3=[randn(2, 3, 5), randn(2, 3, 5)],
                            pooled_embeds=randn(2, 7)),
        calls=(2, 0), image=slice(0, 16)),
    "HunyuanDiT2DModel": dict(  # cross 0: pooling of the T5 tokens (nn.MultiheadAttention)
        config=dict(HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=4,
                    cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=3,
                    text_len_t5=4),
        inputs=lambda: given((4, 8, 8), 500., (3, 8), text_embedding_mask=ones(2, 3),
                             encoder_hidden_states_t5=randn(2, 4, 8), text_embedding_mask_t5=ones(2, 4),
                             image_meta_size=ones(2, 6), style=zeros(2).long(),
                             image_rotary_emb=(randn(16, 8), randn(16, 8))),
        calls=(4, 5)),
    "HunyuanImageTransformer2DModel": dict(  # self 0: text refiner; then image, text
        config=dict(FLUX, out_channels=4, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=6,
                    rope_axes_dim=(4, 4)),
        inputs=lambda: given((4, 4, 4), 500.0, (3, 6), encoder_attention_mask=ones(2, 3)),
        calls=(3, 0), joint=range(1, 3), image=slice(0, 16)),
    "HunyuanVideo15Transformer3DModel": dict(  # self 0: text refiner; then video, image condition, texts
        config=dict(JOINT, num_refiner_layers=1, text_embed_dim=6, text_embed_2_dim=5, image_embed_dim=7,
                    rope_axes_dim=(4, 2, 2)),
        inputs=lambda: given((4, 2, 2, 2), 500.0, (3, 6), image_embeds=randn(2, 3, 7),
                             encoder_attention_mask=ones(2, 3), encoder_hidden_states_2=randn(2, 2, 5),
                             encoder_attention_mask_2=ones(2, 2)),
        calls=(3, 0), joint=range(1, 3), image=slice(0, 8)),
    "HunyuanVideoFramepackTransformer3DModel": dict(  # self 0: text refiner; then earlier frames, video, text
        config=dict(FLUX, out_channels=4, num_refiner_layers=1, patch_size=2, guidance_embeds=False,
                    text_embed_dim=6, pooled_projection_dim=5, rope_axes_dim=(4, 2, 2), has_image_proj=True,
                    image_proj_dim=7, has_clean_x_embedder=True),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6), pooled_projections=randn(2, 5),
                             encoder_attention_mask=ones(2, 3).long(), image_embeds=randn(2, 2, 7),
                             indices_latents=torch.arange(2), latents_clean=randn(2, 4, 1, 4, 4),
                             indices_latents_clean=zeros(1).long(), latents_history_2x=randn(2, 4, 2, 4, 4),
                             indices_latents_history_2x=torch.arange(2),
                             latents_history_4x=randn(2, 4, 4, 8, 8),
                             indices_latents_history_4x=torch.arange(4)),
        calls=(3, 0), joint=range(1, 3), image=slice(6, 14)),
    "HunyuanVideoTransformer3DModel": dict(  # self 0: text refiner; then video, text
        config=dict(FLUX, out_channels=4, num_refiner_layers=1, patch_size=2, guidance_embeds=False,
                    text_embed_dim=6, pooled_projection_dim=5, rope_axes_dim=(4, 2, 2)),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6), pooled_projections=randn(2, 5),
                             encoder_attention_mask=ones(2, 3).long()),
        calls=(3, 0), joint=range(1, 3), image=slice(0, 8)),
    # self 0: image latents over time; self 3, 6, ...: space, frames folded; the others: time
    "I2VGenXLUNet": dict(
        config=dict(UNET, block_out_channels=(32, 64),
                    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), norm_num_groups=4,
                    cross_attention_dim=8, num_attention_heads=2, attention_head_dim=4),
        inputs=lambda: dict(sample=randn(2, 4, 2, 8, 8), timestep=500, fps=full(2, 8),
                            image_embeddings=randn(2, 8), image_latents=randn(2, 4, 2, 8, 8),
                            encoder_hidden_states=randn(2, 3, 8)),
        calls=(15, 4), joint=range(1, 15), main="sample", folds=True),
    "Ideogram4Transformer2DModel": dict(  # text, image
        config=dict(in_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
                    intermediate_size=16, adaln_dim=8, llm_features_dim=6, mrope_section=(2, 2, 2)),
        inputs=lambda: given((11, 4), 0.5, (11, 6), position_ids=zeros(2, 11, 3), segment_ids=zeros(2, 11),
                             indicator=torch.tensor([[3] * 3 + [2] * 8] * 2)),
        calls=(2, 0), image=slice(3, 11)),
    "JoyImageEditPlusTransformer3DModel": dict(  # image, text
        config=dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=6, num_layers=2,
                    rope_dim_list=[4, 2, 2]),
        inputs=lambda: given((8, 4, 1, 2, 2), 500.0, (3, 6), shape_list=[[(2, 2, 2)]] * 2),
        calls=(2, 0), image=slice(0, 8)),
    "JoyImageEditTransformer3DModel": dict(  # image, text
        config=dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=6, num_layers=2,
                    rope_dim_list=[4, 2, 2]),
        inputs=lambda: given((4, 2, 4, 4), 500.0, (3, 6)), calls=(2, 0), image=slice(0, 8)),
    "Kandinsky3UNet": dict(
        config=dict(time_embedding_dim=16, groups=2, attention_head_dim=4, layers_per_block=2,
                    block_out_channels=(8, 16), cross_attention_dim=8, encoder_hid_dim=6),
        inputs=lambda: dict(sample=randn(2, 4, 16, 16), timestep=500, encoder_hidden_states=randn(2, 3, 6),
                            encoder_attention_mask=ones(2, 3)),
        calls=(3, 7), main="sample"),
    "Kandinsky5Transformer3DModel": dict(  # self 0: text; then video
        config=dict(KANDINSKY, in_text_dim=6, in_text_dim2=5, num_text_blocks=1, axes_dims=(4, 2, 2)),
        inputs=lambda: given((2, 4, 4, 4), 500.0, (3, 6), pooled_projections=randn(2, 5),
                             visual_rope_pos=[torch.arange(2)] * 3, text_rope_pos=torch.arange(3)),
        calls=(3, 2), joint=range(1, 3)),
    # self 0, 1: text for video, for audio; 2, 4, ...: video; 3, 5, ...: audio
    "Kandinsky6Transformer3DModel": dict(
        config=dict(KANDINSKY, in_text_dim=6, in_text_dim2=5, num_text_blocks=1, axes_dims=(4, 2, 2),
                    visual_cond=False, in_audio_dim=4, out_audio_dim=4),
        inputs=lambda: given((2, 4, 4, 4), 500.0, (3, 6), pooled_projections=randn(2, 5),
                             audio_hidden_states=randn(2, 5, 4)),
        calls=(6, 8), joint=range(2, 6, 2)),
    # self 0: the text's layers, its tokens folded; self 1: text; then text, image
    "Krea2Transformer2DModel": dict(
        config=dict(TWO, in_channels=4, num_key_value_heads=1, intermediate_size=16, timestep_embed_dim=8,
                    text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
                    text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
                    num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (5, 3, 16), position_ids=zeros(21, 3)),
        calls=(4, 0), joint=range(2, 4), image=slice(5, 21)),
    # self 0, 2, ...: space, a row a frame; self 1, 3, ...: time, a row a place
    "LatteTransformer3DModel": dict(
        config=dict(TWO, in_channels=4, cross_attention_dim=16, sample_size=8, patch_size=2,
                    norm_type="ada_norm_single", caption_channels=8, video_length=3, num_embeds_ada_norm=1000,
                    norm_elementwise_affine=False),
        inputs=lambda: given((4, 3, 8, 8), 500, (5, 8)), calls=(4, 2), folds=True),
    "LongCatAudioDiTTransformer": dict(
        config=dict(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=6, latent_dim=4),
        inputs=lambda: given((8, 4), 0.5, (3, 6), encoder_attention_mask=ones(2, 3).bool()), calls=(2, 2)),
    "LongCatImageTransformer2DModel": dict(  # text, image
        config=dict(FLUX, joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=[4, 2, 2]),
        inputs=lambda: given((16, 4), 0.5, (3, 6), img_ids=zeros(16, 3), txt_ids=zeros(3, 3)),
        calls=(2, 0), image=slice(3, 19)),
    "LTX2VideoTransformer3DModel": dict(  # self 0, 2, ...: video; self 1, 3, ...: audio
        config=dict(JOINT, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
                    audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
                    caption_channels=6),
        inputs=lambda: given((8, 4), 500.0, (3, 6), audio_hidden_states=randn(2, 5, 4),
                             audio_encoder_hidden_states=randn(2, 3, 6), num_frames=2, height=2, width=2,
                             audio_num_frames=5),
        calls=(4, 8), joint=range(0, 4, 2)),
    "LTXVideoTransformer3DModel": dict(
        config=dict(JOINT, cross_attention_dim=16, caption_channels=6),
        inputs=lambda: given((8, 4), 500, (3, 6), num_frames=2, height=2,
                             encoder_attention_mask=ones(2, 3).bool(), width=2),
        calls=(2, 2)),
    "Lumina2Transformer2DModel": dict(  # self 0: text; self 1: image; then text, image
        config=dict(sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
                    num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2),
                    axes_lens=(8, 8, 8), cap_feat_dim=6),
        inputs=lambda: given((4, 8, 8), 0.5, (3, 6), encoder_attention_mask=ones(2, 3).bool()),
        calls=(4, 0), joint=range(2, 4), image=slice(3, 19)),
    "LuminaNextDiT2DModel": dict(
        config=dict(sample_size=8, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
                    multiple_of=8, cross_attention_dim=8),
        inputs=lambda: given((4, 8, 8), 0.5, (5, 8), encoder_mask=ones(2, 5), cross_attention_kwargs={},
                             image_rotary_emb=torch.polar(ones(4, 4, 4), randn(4, 4, 4))),
        calls=(2, 2)),
    "MiniMaxH3Transformer3DModel": dict(  # self 0: text refiner; then text, video, audio, as the indices say
        config=dict(TWO, hidden_size=16, num_refiner_layers=1, ffn_dim=16, in_channels=1, audio_in_channels=3,
                    text_dim=6, freq_dim=8, time_embed_hidden_dim=8, time_embed_dim=8, rope_freq_dim=1),
        inputs=lambda: dict(hidden_states=randn(2, 8, 4), audio_hidden_states=randn(2, 2, 3),
                            timestep=full(1, 0.5), encoder_hidden_states=randn(2, 3, 6),
                            timestep_indices=zeros(13).long(),
                            token_tags=torch.tensor([1] * 3 + [0] * 8 + [2] * 2), position_ids=zeros(13, 3),
                            video_indices=torch.arange(3, 11), audio_indices=torch.arange(11, 13),
                            text_indices=torch.arange(3)),
        calls=(3, 0), joint=range(1, 3), image=slice(3, 11)),
    "MiniMaxMusic3Transformer1DModel": dict(  # time, audio (its condition is added to it)
        config=dict(TWO, in_channels=4, condition_dim=6, ff_inner_dim=16, rotary_dim=4,
                    fourier_embedding_dim=8),
        inputs=lambda: given((4, 8), 0.5, (8, 6)), calls=(2, 0), image=slice(1, 9)),
    # video, text; a call per row: self 0, 1 are layer 0; cross 0: text pooling
    "MochiTransformer3DModel": dict(
        config=dict(TWO, patch_size=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=8,
                    time_embed_dim=4, max_sequence_length=3),
        inputs=lambda: given((4, 2, 4, 4), 500.0, (3, 8), encoder_attention_mask=ones(2, 3).bool()),
        calls=(4, 1), image=slice(0, 8), folds=True),
    # video, text; in the decoder's layers (here self 2) video, encoded video
    "MotifVideoTransformer3DModel": dict(
        config=dict(HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2,
                    num_decoder_layers=1, text_embed_dim=6, rope_axes_dim=(4, 2, 2),
                    enable_text_cross_attention_dual=True),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6)), calls=(3, 1), joint=range(2), image=slice(0, 8)),
    "NucleusMoEImageTransformer2DModel": dict(  # the image's queries see [image, text]: kind "cross"
        config=dict(JOINT, patch_size=1, joint_attention_dim=6, axes_dims_rope=(4, 2, 2), moe_enabled=False,
                    mlp_ratio=12.0, capacity_factors=[1.0, 1.0]),
        inputs=lambda: given((16, 4), 0.5, (3, 6), img_shapes=[(1, 4, 4)] * 2), calls=(0, 2), kind="cross"),
    "OmniGenTransformer2DModel": dict(  # text, timestep, image
        config=dict(in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
                    intermediate_size=16, num_layers=2, pad_token_id=0, vocab_size=10, pos_embed_max_size=8,
                    time_step_dim=4, rope_scaling=dict(long_factor=[1.0] * 4, short_factor=[1.0] * 4)),
        inputs=lambda: given((4, 8, 8), 0.5, input_img_latents=[], input_ids=torch.tensor([[1, 2, 3]] * 2),
                             input_image_sizes={}, attention_mask=ones(2, 20, 20),
                             position_ids=torch.arange(20).expand(2, 20)),
        calls=(2, 0), image=slice(4, 20)),
    "OvisImageTransformer2DModel": dict(  # text, image
        config=dict(FLUX, out_channels=4, joint_attention_dim=6, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (3, 6), img_ids=zeros(16, 3), txt_ids=zeros(3, 3)),
        calls=(2, 0), image=slice(3, 19)),
    "PixArtTransformer2DModel": dict(
        config=dict(TWO, in_channels=4, out_channels=8, cross_attention_dim=16, sample_size=8,
                    caption_channels=8, use_additional_conditions=False),
        inputs=lambda: given((4, 8, 8), 500, (5, 8)), calls=(2, 2)),
    # text, CLIP embedding, timestep, noisy embedding, a token that alone is read in the end
    "PriorTransformer": dict(
        config=dict(TWO, embedding_dim=8, num_embeddings=5),
        inputs=lambda: dict(hidden_states=randn(2, 8), timestep=500, proj_embedding=randn(2, 8),
                            encoder_hidden_states=randn(2, 5, 8), attention_mask=ones(2, 5)),
        calls=(2, 0), joint=range(1), image=slice(7, 8)),
    "PRXTransformer2DModel": dict(  # the image's queries see [text, image]: kind "cross"
        config=dict(in_channels=4, context_in_dim=6, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]),
        inputs=lambda: given((4, 8, 8), 0.5, (3, 6)), calls=(0, 2), kind="cross"),
    # cross: the image's queries, which see [text, image]; self: the text alone
    "QwenImage21Transformer2DModel": dict(
        config=dict(JOINT, context_in_dim=6, mlp_ratio=1, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: dict(hidden_states=randn(2, 16, 4), encoder_hidden_states=randn(2, 3, 6),
                            timestep=full(1, 0.5), img_shapes=[[(1, 4, 4)]] * 2,
                            img_mask=torch.tensor([[False] * 3 + [True] * 4] * 2)),
        calls=(2, 2), kind="cross"),
    "QwenImageTransformer2DModel": dict(  # text, image
        config=dict(JOINT, patch_size=1, joint_attention_dim=6, axes_dims_rope=(4, 2, 2)),
        inputs=lambda: given((16, 4), 0.5, (3, 6), img_shapes=[[(1, 4, 4)]] * 2),
        calls=(2, 0), image=slice(3, 19)),
    "SanaWMLTX2RefinerTransformer3DModel": dict(
        config=dict(JOINT, cross_attention_dim=16, caption_channels=6, audio_in_channels=4,
                    audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
                    audio_cross_attention_dim=8),
        inputs=lambda: dict(hidden_states=randn(2, 8, 4), encoder_hidden_states=randn(2, 3, 6),
                            timestep=full(16, 500.0).view(2, 8),
                            video_rotary_emb=(ones(2, 8, 16), zeros(2, 8, 16))),
        calls=(2, 2)),
    "SanaWMTransformer3DModel": dict(  # self 0 is block 1; block 0 is a gated delta rule, out of reach
        config=dict(in_channels=4, num_layers=2, hidden_size=24, num_attention_heads=2, softmax_every_n=2,
                    linear_head_dim=12, chunk_plucker_channels=4, chunk_plucker_post_attn_blocks=0,
                    use_chunk_plucker_post_attn=False, caption_channels=6, mlp_ratio=1.0),
        inputs=lambda: dict(hidden_states=randn(2, 4, 2, 2, 2),
                            timestep=full(2, 500.0).view(2, 1, 1).expand(2, 1, 2),
                            encoder_hidden_states=randn(2, 1, 3, 6), encoder_attention_mask=ones(2, 3)),
        calls=(1, 2), tolerance=1e-3),
    "SD3ControlNetModel": dict(  # image, text
        config=dict(SD3, joint_attention_dim=6, pooled_projection_dim=5),
        inputs=lambda: given((4, 8, 8), 500, (3, 6), controlnet_cond=randn(2, 4, 8, 8),
                             pooled_projections=randn(2, 5)),
        calls=(2, 0), image=slice(0, 16), output=lambda out: out[0][-1]),
    # image, text; self 1: image, the dual attention of 3.5 medium (here in layer 0)
    "SD3Transformer2DModel": dict(
        config=dict(SD3, joint_attention_dim=8, pooled_projection_dim=8, dual_attention_layers=(0,)),
        inputs=lambda: given((4, 8, 8), 500, (5, 8), pooled_projections=randn(2, 8)),
        calls=(3, 0), joint=range(0, 3, 2), image=slice(0, 16)),
    "SkyReelsV2Transformer3DModel": dict(
        config=dict(WAN, text_dim=6, rope_max_seq_len=8),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6)), calls=(2, 2)),
    # memory, audio; differential attention: self 0, 1 are the halves of layer 0
    "StableAudio3DiTModel": dict(
        config=dict(io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=6, global_cond_dim=5,
                    local_add_cond_dim=3, timestep_features_dim=8, num_memory_tokens=2),
        inputs=lambda: given((4, 8), 0.5, (3, 6), global_hidden_states=randn(2, 5)),
        calls=(4, 4), image=slice(2, 10)),
    "StableAudioDiTModel": dict(  # one global token, audio
        config=dict(sample_size=12, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                    num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
                    global_states_input_dim=8, cross_attention_input_dim=8),
        inputs=lambda: given((4, 12), 0.5, (5, 8), global_hidden_states=randn(2, 1, 8),
                             rotary_embedding=(randn(13, 8), randn(13, 8))),
        calls=(2, 2), image=slice(1, 13)),
    "StableCascadeUNet": dict(  # the image's queries see [image, text]: kind "cross"
        config=dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=8,
                    block_out_channels=(8, 8), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
                    up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=6, clip_seq=2),
        inputs=lambda: dict(sample=randn(2, 4, 8, 8), timestep_ratio=full(2, 0.5),
                            clip_text_pooled=randn(2, 1, 6)),
        calls=(0, 4), main="sample", kind="cross"),
    "Transformer2DModel": dict(
        config=dict(TWO, in_channels=8, norm_num_groups=2, cross_attention_dim=8),
        inputs=lambda: dict(hidden_states=randn(2, 8, 4, 4), encoder_hidden_states=randn(2, 5, 8)),
        calls=(2, 2)),
    "TransformerTemporalModel": dict(  # time; space is folded into the batch
        config=dict(HEADS, in_channels=4, norm_num_groups=2),
        inputs=lambda: dict(hidden_states=randn(2, 2, 4, 4, 4).flatten(0, 1), num_frames=2),
        calls=(2, 0), folds=True),
    "UNet2DConditionModel": dict(
        config=FLAT,
        inputs=lambda: dict(sample=randn(2, 4, 8, 8), timestep=500, encoder_hidden_states=randn(2, 3, 6)),
        calls=(4, 4), main="sample"),
    "UNet2DModel": dict(
        config=dict(UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16),
                    norm_num_groups=4),
        inputs=lambda: dict(sample=randn(2, 4, 8, 8), timestep=500), calls=(4, 0), main="sample"),
    "UNet3DConditionModel": dict(  # self 2, 5, ...: space, frames folded; the others: time, space folded
        config=dict(CROSS, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4),
        inputs=lambda: dict(sample=randn(2, 4, 2, 8, 8), timestep=500, encoder_hidden_states=randn(2, 3, 6)),
        calls=(14, 4), main="sample", folds=True),
    # self 0, 1, ...: two over space, frames folded, then two over time, space folded
    "UNetMotionModel": dict(
        config=dict(CROSS, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                    motion_num_attention_heads=2, up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
                    num_attention_heads=2, motion_max_seq_length=4),
        inputs=lambda: dict(sample=randn(2, 4, 2, 8, 8), timestep=500,
                            encoder_hidden_states=randn(2, 3, 6).repeat_interleave(2, 0)),
        calls=(18, 4), folds=True, main="sample"),
    "UNetSpatioTemporalConditionModel": dict(  # self 0, 2, ...: space, frames folded; self 1, 3, ...: time
        config=dict(UNET, block_out_channels=(32, 64),
                    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                    cross_attention_dim=6, num_attention_heads=(1, 2), addition_time_embed_dim=4,
                    projection_class_embeddings_input_dim=12),
        inputs=lambda: dict(sample=randn(2, 2, 4, 8, 8), timestep=500, encoder_hidden_states=randn(2, 1, 6),
                            added_time_ids=ones(2, 3)),
        calls=(8, 8), main="sample", folds=True),
    "UVit2DModel": dict(
        config=dict(hidden_size=16, cond_embed_dim=6, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
                    encoder_hidden_size=6, vocab_size=10, codebook_size=8, in_channels=8,
                    block_out_channels=8, num_res_blocks=1, block_num_heads=2, num_hidden_layers=2,
                    num_attention_heads=2, intermediate_size=16, sample_size=4),
        inputs=lambda: dict(input_ids=torch.arange(16).view(1, 4, 4).expand(2, 4, 4) % 8,
                            encoder_hidden_states=randn(2, 3, 6), pooled_text_emb=randn(2, 6),
                            micro_conds=ones(2, 5)),
        calls=(2, 6), main="input_ids"),
    "WanAnimateTransformer3DModel": dict(
        config=dict(num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4,
                    out_channels=4, text_dim=6, freq_dim=8, ffn_dim=16, num_layers=2, image_dim=None,
                    rope_max_seq_len=8, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
                    motion_encoder_size=16, motion_style_dim=8, motion_dim=2, motion_encoder_dim=8,
                    face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2),
        inputs=lambda: given((12, 3, 4, 4), 500, (3, 6), pose_hidden_states=randn(2, 4, 2, 4, 4),
                             face_pixel_values=randn(2, 3, 5, 16, 16)),
        calls=(2, 3)),
    "WanTransformer3DModel": dict(
        config=dict(WAN, text_dim=6, rope_max_seq_len=8),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6)), calls=(2, 2)),
    "WanVACETransformer3DModel": dict(
        config=dict(WAN, text_dim=6, rope_max_seq_len=8, vace_layers=[0], vace_in_channels=5),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6), control_hidden_states=randn(2, 5, 2, 4, 4)),
        calls=(3, 3)),
    # self 0: image; self 1: text; then image, text, each padded to a multiple of 32
    "ZImageTransformer2DModel": dict(
        config=dict(in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                    cap_feat_dim=6, axes_dims=[4, 2, 2], axes_lens=[128, 8, 8]),
        inputs=lambda: dict(x=list(randn(2, 4, 1, 16, 16)), t=full(2, 0.5), cap_feats=list(randn(2, 3, 6))),
        calls=(4, 0), joint=range(2, 4), image=slice(0, 64), main="x",
        output=lambda out: torch.stack(out[0])),
}

UNREACHABLE = {
    "AnyFlowFARTransformer3DModel": dict(
        config=dict(WAN, text_dim=8, rope_max_seq_len=16, chunk_partition=(1, 1)),
        inputs=lambda: dict(hidden_states=randn(2, 2, 4, 8, 8), timestep=500 + zeros(2, 2),
                            r_timestep=400 + zeros(2, 2), encoder_hidden_states=randn(2, 5, 8),
                            chunk_partition=[1, 1]),
        calls=(0, 2)),  # block-causal self-attention by flex_attention; the cross-attention is reached
    "Kandinsky6SRTransformer3DModel": dict(  # flex_attention, for a sparse mask
        config=dict(KANDINSKY, axes_dims=(4, 6, 6)),
        inputs=lambda: given((1, 16, 16, 9), 500.0), calls=(0, 0)),
    # linear self-attention (SanaLinearAttnProcessor2_0, no softmax); the cross-attention is reached
    "SanaTransformer2DModel": dict(
        config=dict(JOINT, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
                    caption_channels=8, sample_size=4),
        inputs=lambda: given((4, 4, 4), 500, (5, 8)), calls=(0, 2)),
    "SanaVideoTransformer3DModel": dict(
        config=dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
                    num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
                    caption_channels=6, sample_size=4, rope_max_seq_len=8),
        inputs=lambda: given((4, 2, 4, 4), 500, (3, 6)),
        calls=(0, 2)),  # self-attention is linear, without softmax; cross 0, 1 attend to the text
    # its Attention modules have scale_qk=False, for which diffusers takes AttnProcessor: baddbmm and softmax
    "T5FilmDecoder": dict(
        config=dict(input_dims=8, targets_length=12, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16),
        inputs=lambda: dict(encodings_and_masks=[(randn(2, 5, 16), ones(2, 5))],
                            decoder_input_tokens=randn(2, 12, 8), decoder_noise_time=full(2, 0.5)),
        calls=(0, 0)),
}
