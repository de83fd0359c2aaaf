"""Names below an attention layer that are not its weights: old buffers, adapters, quantizers.

Buffers of older code (GPT-2's causal mask, Llama's rotary frequencies) are not trained, and newer
modules compute them: they are dropped. Every other name belongs to an adapter, a quantizer or
another kind of layer; moving the rest without it would change the function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from polyhead.errors import ConversionError

__all__ = ["check_mask", "is_buffer", "is_mask", "is_old_buffer_of_a_model", "remedy_for"]

# Last parts of names: each is computed from the config.
_COMPUTED = {
    "masked_bias",
    "inv_freq",
    "original_inv_freq",
    "long_inv_freq",
    "short_inv_freq",
    "cos_cached",
    "sin_cached",
    "freqs_cis",
    "position_ids",
}
# A layer's own square masks, directly in it (or in one of the lecture's stacked heads).
_MASKS = re.compile(r"(?:heads\.\d+\.)?(?:bias|mask|causal_mask|attn_mask|attention_mask|tril)")
# Buffers of whole models that transformers saved once and does not save now.
_OF_A_MODEL = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|embeddings\.position_ids)")

_DEQUANTIZE = (
    "dequantize the model first, as model.dequantize() of transformers does, and save that one"
)
# Pattern of a name's part, its meaning, and the remedy. The first match counts.
_SIGNS = (
    (
        r"base_layer|modules_to_save|original_module|(lora|hada|lokr|oft|boft|ia3|vera|hra|fourierft"
        r"|road|bone|miss|shira|loha|adalora|dora)_\w*|lora|ranknum|adapters?|\w+_adapter",
        "an adapter",
        "merge it first, as model.merge_and_unload() of peft does, and save that model",
    ),
    (
        r"absmax|quant_map|quant_state|nested_absmax|nested_quant_map|bitsandbytes__\w+|SCB|CB"
        r"|weight_format",
        "a part of bitsandbytes' quantized weights",
        _DEQUANTIZE,
    ),
    (
        r"qweight|qzeros|qscales?|scales?|zeros|zero_points?|g_idx|perm|weight_scales?"
        r"|weight_scale_\w+|weight_packed|weight_shape|weight_zero_point|weight_g_idx|\w*_blocks"
        r"|\w+_scales?|\w+_scale_inv|\w+_scale_ub|\w+_zero_point|W_q|meta|codes|codebooks?"
        r"|centroids|indices|Qidxs|SU|SV|trellis|suh|svh|_packed_params\w*|_data|_scale|_shift"
        r"|qtype|activation_qtype|\w*_quantizer|_amax|weight_quantizer|input_quantizer|lut"
        r"|rows|cols|vals|dense_weights|quantized_weight|weight_global_scale|input_global_scale",
        "a part of quantized weights",
        _DEQUANTIZE,
    ),
    (
        r"parametrizations|weight_g|weight_v|weight_orig|weight_mask|bias_orig|bias_mask|weight_u"
        r"|original\d?",
        "a part of a parametrized weight",
        "make it a plain weight first (torch.nn.utils.parametrize.remove_parametrizations, "
        "torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), and save that model",
    ),
    (
        r"_orig_mod|module|_module|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
        r"|_flat_param|_forward_module|wrapped|inner|linear|conv",
        "a part of a wrapped layer",
        "take the wrapper's word out of the names, or save the model inside it",
    ),
)


def is_mask(below: str, tensor: object) -> bool:
    """True if a tensor below a layer is a saved mask, such as GPT-2's bias."""
    if not isinstance(tensor, Tensor):
        return False
    square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2]
    return square and _MASKS.fullmatch(below) is not None


def is_buffer(below: str) -> bool:
    """True if a name below a layer is a buffer that newer code computes."""
    return below.rpartition(".")[2] in _COMPUTED


def is_old_buffer_of_a_model(name: str) -> bool:
    """True if transformers once saved a buffer of this name outside of attention."""
    return _OF_A_MODEL.fullmatch(name) is not None


def check_mask(name: str, mask: Tensor) -> None:
    """Raise unless a mask that is dropped is causal or allows everything.

    Raises:
        ConversionError: it is another mask, such as a window.

    >>> check_mask("attn.bias", torch.ones(1, 1, 3, 3).tril())
    """
    square = mask.reshape(-1, *mask.shape[-2:])
    if mask.dtype.is_floating_point and bool((square < 0).any()):
        square = square > -1.0  # additive: 0 where a token may attend
    allowed = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    ones = square.bool()
    # 1 allows (GPT-2), or 1 forbids (the lecture).
    if not any(bool((ones == known).all()) for known in (allowed, ~allowed, allowed | True)):
        raise ConversionError(
            f"{name} must be causal to be dropped, as mask=causal() replaces it; got another "
            f"{tuple(mask.shape)} mask; build the modules with that mask, and delete this entry "
            "first"
        )


def remedy_for(names: Iterable[str]) -> tuple[str, str]:
    """Return the meaning of unknown names of a layer, and the remedy."""
    parts = [part for name in names for part in name.split(".")]
    for pattern, what, remedy in _SIGNS:
        if any(re.fullmatch(pattern, part) for part in parts):
            return what, remedy
    return (
        "which is none of its tensors",
        "choose the layout that has them, or save plain nn.Linear",
    )
