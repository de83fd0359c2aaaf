"""Models of timm, torchvision and diffusers with random weights: as torch computes them.

Each skips where its package is not installed, or was built for another torch.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from polyhead.drop_in import sdpa, use_for_sdpa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the packages
]


def _package(name):
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


def _timm_vit():
    timm = _package("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=96, depth=3)
    return model, [torch.randn(2, 3, 96, 96)], 3


def _timm_eva():
    timm = _package("timm")
    model = timm.create_model("eva02_tiny_patch14_224", pretrained=False, img_size=70, depth=2)
    return model, [torch.randn(2, 3, 70, 70)], 2


def _torchvision_vit():
    models = _package("torchvision.models")
    model = models.VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=10)
    torch.nn.init.normal_(model.heads[-1].weight)
    return model, [torch.randn(2, 3, 64, 64)], 2


def _diffusers_unet():
    diffusers = _package("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, [torch.randn(2, 4, 16, 16), torch.tensor(3.0), torch.randn(2, 7, 32)], 8


def _whisper():
    transformers = _package("transformers")
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation="sdpa",
    )
    model = transformers.WhisperModel(config).get_encoder()
    return model, [torch.randn(2, 16, 80)], 2


BUILDERS = {
    "timm ViT": _timm_vit,
    "timm EVA-02": _timm_eva,
    "torchvision ViT": _torchvision_vit,
    "diffusers UNet": _diffusers_unet,
    "Whisper encoder": _whisper,
}


def _run(model, inputs):
    """Output, and the gradients of all parameters."""
    model.zero_grad()
    output = model(*inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.sin().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


@pytest.mark.parametrize("name", BUILDERS)
def test_model_in_the_mode_is_torchs_model(any_size, name):
    """Output and every gradient, by twice torch's own error against float64, and rounding."""
    torch.manual_seed(0)
    model, inputs, calls_per_run = BUILDERS[name]()
    model.eval()
    theirs = _run(model, inputs)
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = _run(copy.deepcopy(model).double(), double)
    with sdpa() as calls:
        by_context = _run(model, inputs)
    use = use_for_sdpa(model)
    by_hooks = _run(model, inputs)
    use.remove()
    assert (calls.polyhead, calls.torch) == (calls_per_run, 0)
    assert (use.calls.polyhead, use.calls.torch) == (calls_per_run, 0)
    # Gradients that cancel (a key's bias has none) are rounding of the largest ones.
    largest = max(x.abs().max().item() for x in exact.values())
    for ours in (by_context, by_hooks):
        assert ours.keys() == exact.keys()
        for part, truth in exact.items():
            error = (theirs[part].double() - truth).abs().max().item()
            allowed = 2 * error + 8 * torch.finfo(torch.float32).eps * max(
                truth.abs().max().item(), 1e-2 * largest
            )
            assert (ours[part].double() - truth).abs().max().item() <= allowed, part
