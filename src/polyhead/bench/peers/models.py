"""Model peers: whole models of other libraries as they are, and within `ph.drop_in.use_for_sdpa`.

Weights are random. A model's own code is unchanged: it calls `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers.attention import Peer, Results, Run
from polyhead.drop_in import use_for_sdpa

__all__ = ["AS_IT_IS", "MODELS"]


class _Recipe(NamedTuple):
    """Builder of a model.

    Attributes:
        package: what it needs.
        build: the model of a case, with random weights.
        call: its output for `x`, (B, T, width).
    """

    package: str
    build: Callable[[Case], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor]


def _vit(case: Case) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    side = int((case.T - 1) ** 0.5) * 16
    model: nn.Module = timm.create_model(
        "vit_small_patch16_224", pretrained=False, img_size=side, num_classes=16
    )
    return model


def _call_vit(model: nn.Module, x: Tensor) -> Tensor:
    """Patches of an image are features: the ViT's own layers, without its pixels."""
    side = int((x.shape[1] - 1) ** 0.5)
    pixels = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))[:, :3]
    image = F.interpolate(pixels, scale_factor=16, mode="nearest")
    y: Tensor = model(image)
    return y


class _WindowedEncoder(nn.Module):
    """Encoder of tokens that attend to those near them, by a dense mask, as Swin's stages do."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            case.width, case.H, 4 * case.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        at = torch.arange(case.T)
        self.register_buffer("forbidden", (at[:, None] - at).abs() > 128)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x, mask=self.forbidden, is_causal=False)
        return y


def _unet_block(case: Case) -> nn.Module:
    blocks: Any = importlib.import_module("diffusers.models.unets.unet_2d_blocks")
    model: nn.Module = blocks.CrossAttnDownBlock2D(
        in_channels=case.width,
        out_channels=case.width,
        temb_channels=64,
        num_layers=1,
        num_attention_heads=case.H,
        cross_attention_dim=64,
        resnet_groups=8,
        add_downsample=False,
    )
    return model


def _call_unet(model: nn.Module, x: Tensor) -> Tensor:
    side = int(x.shape[1] ** 0.5)
    image = x.transpose(1, 2).unflatten(2, (side, side))
    text = x[:, :77, :64]
    y: Tensor = model(image, x[:, 0, :64], encoder_hidden_states=text)[0]
    return y


def _whisper(part: str, case: Case) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.WhisperConfig(
        vocab_size=128,
        d_model=case.width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=case.H,
        decoder_attention_heads=case.H,
        encoder_ffn_dim=4 * case.width,
        decoder_ffn_dim=4 * case.width,
        num_mel_bins=80,
        max_source_positions=case.S,
        max_target_positions=case.T,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation="sdpa",
    )
    model = transformers.WhisperModel(config)
    half: nn.Module = model.get_encoder() if part == "encoder" else model.get_decoder()
    return half


def _call_encoder(model: nn.Module, x: Tensor) -> Tensor:
    sound = x[..., :80].transpose(1, 2).repeat_interleave(2, dim=2)  # two frames a position
    y: Tensor = model(sound).last_hidden_state
    return y


def _call_decoder(model: nn.Module, x: Tensor) -> Tensor:
    config: Any = model.config
    tokens = config.max_source_positions
    heard = x.repeat(1, -(-tokens // x.shape[1]), 1)[:, :tokens]
    y: Tensor = model(inputs_embeds=x, encoder_hidden_states=heard, use_cache=False)[0]
    return y


_RECIPES = {
    "timm ViT-S": _Recipe("timm", _vit, _call_vit),
    "dense window": _Recipe("torch", _WindowedEncoder, lambda model, x: model(x)),
    "diffusers UNet block": _Recipe("diffusers", _unet_block, _call_unet),
    "Whisper encoder": _Recipe("transformers", partial(_whisper, "encoder"), _call_encoder),
    "Whisper decoder": _Recipe("transformers", partial(_whisper, "decoder"), _call_decoder),
}


def _reasons(case: Case) -> list[str]:
    package = _RECIPES[case.model].package
    if importlib.util.find_spec(package) is None:
        return [f"{package} is not installed"]
    try:
        importlib.import_module(package)
    except Exception as error:  # a package built for another torch raises what it likes
        return [f"{package} cannot be imported: {type(error).__name__}: {error}"]
    return []


def _prepare(is_ours: bool, case: Case, inputs: Inputs) -> Run:
    recipe = _RECIPES[case.model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.build(case).to(case.dtype).eval()
    if is_ours:
        use_for_sdpa(model)
    x = inputs["x"]

    def run() -> Results:
        if not case.train:
            return {"output": recipe.call(model, x)}
        leaf = x.detach().requires_grad_()
        output = recipe.call(model, leaf)
        (dx,) = torch.autograd.grad(output.square().sum(), leaf)
        return {"output": output.detach(), "dx": dx}

    return run


AS_IT_IS = Peer("as it is", _reasons, partial(_prepare, False))

MODELS: tuple[Peer, ...] = (
    Peer("polyhead", _reasons, partial(_prepare, True), ours=True),
    AS_IT_IS,
)
