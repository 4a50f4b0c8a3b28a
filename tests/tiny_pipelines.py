"""Tiny random pipelines of the diffusers classes that people use, as diffusers itself builds and saves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

TOKENS = 77
WIDTH = 16  # of every hidden state


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    from evalbench.models.pipelines import Folder

    folder = Folder.find("evalbench:models/zoo/fashion-sd").path
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _clip_text(projection: bool, width: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, T5EncoderModel(config).eval()


def _vae(latents: int, scale: float = 0.5, shift: float | None = None) -> Any:
    """Half the side of the images, so that a latent of 8 makes 16 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()


def _text_unet(cross: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        **more,
    ).eval()


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DModel

    facts = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(facts | more)).eval()


def _vp() -> Any:
    """DDIM from the last training step down, the last step to the clean sample."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1)


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def ddim() -> Any:
    from diffusers import DDIMPipeline

    return DDIMPipeline(_unet(), _vp())


def ldm() -> Any:
    from diffusers import LDMPipeline, VQModel

    vae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).eval()
    return LDMPipeline(vae, _unet(), _vp())


def consistency() -> Any:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    return ConsistencyModelPipeline(_unet(num_class_embeds=4), CMStochasticIterativeScheduler())


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    ).eval()
    return DiTPipeline(network, _vae(4), _vp())


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        _vae(4), _clip_text(False), _clip_tokenizer(), _text_unet(WIDTH), _vp(), None, None, None, False
    )


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = _text_unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    texts = (_clip_text(False), _clip_text(True), _clip_tokenizer(), _clip_tokenizer())
    return StableDiffusionXLPipeline(_vae(4), *texts, unet, _vp(), add_watermarker=False)


def _pixart(kind: str) -> Any:
    import diffusers

    tokenizer, text = _t5()
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    ).eval()
    return getattr(diffusers, kind)(tokenizer, text, _vae(4), network, _vp())


def pixart_alpha() -> Any:
    return _pixart("PixArtAlphaPipeline")


def pixart_sigma() -> Any:
    return _pixart("PixArtSigmaPipeline")


def stable_diffusion_3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    ).eval()
    tokenizer, text = _t5_of(2 * WIDTH)
    return StableDiffusion3Pipeline(
        network,
        _flow(),
        _vae(4, 1.5, 0.06),
        _clip_text(True),
        _clip_tokenizer(),
        _clip_text(True),
        _clip_tokenizer(),
        text,
        tokenizer,
    )


def _t5_of(width: int) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    tokenizer, _ = _t5()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, T5EncoderModel(config).eval()


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    tokenizer, text = _t5()
    return FluxPipeline(_flow(), _vae(4, 0.36, 0.12), _clip_text(False), _clip_tokenizer(), text, tokenizer, network)


PIPELINES: dict[str, Callable[[], Any]] = {
    found.__name__: found
    for found in (
        ddim,
        ldm,
        consistency,
        dit,
        stable_diffusion,
        stable_diffusion_xl,
        pixart_alpha,
        pixart_sigma,
        stable_diffusion_3,
        flux,
    )
}


@cache
def pipeline(name: str) -> Any:
    """The pipeline of a name, its random weights large enough that conditions and times change the output."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(sum(map(ord, name)))
    found = PIPELINES[name]()
    for part in found.components.values():
        if isinstance(part, torch.nn.Module):
            with torch.no_grad():
                for weight in part.parameters():
                    if weight.ndim > 1 or not bool(weight.any()):  # layers that start at zero would hide what they see
                        weight.add_(0.05 * torch.randn_like(weight))
    found.set_progress_bar_config(disable=True)
    return found


def saved(name: str, where: Path) -> Path:
    """The folder that diffusers writes of a pipeline."""
    folder = where / name
    if not folder.exists():
        pipeline(name).save_pretrained(folder)
    return folder
