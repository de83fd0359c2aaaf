"""KV cache for transformers models: a new token is appended without copying the others."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from polyhead.cache import KVCache
from polyhead.errors import ArgumentError
from polyhead.integrations.transformers.lazy_cache import wrap
from polyhead.validate import autocasts

__all__ = ["Layer", "PolyheadCache"]


class PolyheadCache(transformers.Cache):
    """One `polyhead.KVCache` per layer: pass it as `past_key_values`.

    transformers' own dynamic cache copies all tokens for each new one; this cache writes the new
    token into preallocated memory and returns views.

    Args:
        config: of the model; layers with a sliding window or chunks keep only these tokens.
        max_tokens: capacity in tokens; None: the model's `max_position_embeddings`.
        storage_dtype: as in `KVCache`; torch.int8 takes a quarter of float32's memory, and
            attn_implementation="polyhead" reads it in place.
        preallocate: as in `KVCache`.

    Raises:
        ArgumentError: a layer keeps state other than keys and values; or as `KVCache` raises.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=31, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
    ...     pad_token_id=0, eos_token_id=None,
    ... )
    >>> model, cache = LlamaForCausalLM(config).eval(), PolyheadCache(config)
    >>> model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=4).shape
    torch.Size([1, 7])
    >>> cache.get_seq_length()                                # all but the newest, not yet read
    6
    """

    def __init__(
        self,
        config: transformers.PreTrainedConfig,
        max_tokens: int | None = None,
        *,
        storage_dtype: torch.dtype | None = None,
        preallocate: bool = False,
    ) -> None:
        # transformers' own layers, made from the config, have the window of each layer.
        theirs = transformers.DynamicCache(config=config).layers
        text_config: Any = config.get_text_config(decoder=True)
        kinds = getattr(text_config, "layer_types", None) or []
        if max_tokens is None:
            max_tokens = getattr(text_config, "max_position_embeddings", None)
        layers: list[Any] = []
        for index, layer in enumerate(theirs):
            if type(layer).__name__ == "DummyLayer":  # shares another layer's keys
                layers.append(layer)
                continue
            window = getattr(layer, "sliding_window", None)
            # transformers 4 makes a layer of keys and values of every kind.
            kind = kinds[index] if index < len(kinds) else "attention"
            known = type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
            if not known or not kind.endswith("attention") or kind == "linear_attention":
                raise ArgumentError(
                    "config",
                    "must describe layers that keep keys and values",
                    f"layer {index}: {kind}",
                    "use transformers' own DynamicCache for this model",
                )
            layers.append(
                Layer(max_tokens, window, storage_dtype=storage_dtype, preallocate=preallocate)
            )
        super().__init__(layers=layers)

    def activate_past_recording(self) -> None:
        """Keep tokens that leave a window, from the next token until the next `crop`.

        transformers calls it to verify drafts; call it before tokens that may be removed again.
        """
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n of them, or (as before transformers 5) all but n.

        Raises:
            ArgumentError: a window has dropped the tokens before them. No layer is changed.
        """
        for layer in self.layers:
            if isinstance(layer, Layer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


class Layer(transformers.cache_utils.CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `PolyheadCache`. It takes its sizes from the first keys.

    Args:
        max_tokens: capacity in tokens; None, only with a window: no limit.
        sliding_window: keys that a query sees, its own included; None: all.
        storage_dtype, preallocate: as in `KVCache`.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        max_tokens: int | None,
        sliding_window: int | None = None,
        *,
        storage_dtype: torch.dtype | None = None,
        preallocate: bool = False,
    ) -> None:
        # Not super().__init__(), which sets keys and values: properties here.
        self.max_tokens = max_tokens
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._options = {"storage_dtype": storage_dtype, "preallocate": preallocate}
        self._cache: KVCache | None = None
        self.record_past = False
        self._since_crop = 0  # tokens that may be removed again

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._cache is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, D) keys that the newest token needs; None before the first."""
        return None if self._cache is None else wrap(self._cache.read_as_views()[0])

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, E) values that the newest token needs; None before the first."""
        return None if self._cache is None else wrap(self._cache.read_as_views()[1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        window = None if self.sliding_window is None else self.sliding_window - 1
        self._cache = KVCache(
            B,
            self.max_tokens,
            G,
            D,
            value_head_dim=value_states.shape[-1],
            dtype=key_states.dtype,
            device=key_states.device,
            window=window,
            **self._options,  # type: ignore[arg-type]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return the keys and values they need, as views where possible.

        Int8 values are not dequantized: polyhead's attention reads them in place, and for another
        attention they are materialized on first use.
        """
        if self._cache is None or self._is_of_another_batch(key_states):
            self.lazy_initialization(key_states, value_states)
        assert self._cache is not None
        if autocasts(key_states):  # then a model may rotate its keys in another dtype
            dtype = self._cache.dtype
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        since_crop = self._since_crop + key_states.shape[2] if self.record_past else 0
        if self.is_sliding:
            self._cache.max_rewind = since_crop
        key, value = self._cache.append_as_views(key_states, value_states)
        self._since_crop = since_crop
        return wrap(key), wrap(value)

    def _is_of_another_batch(self, key_states: Tensor) -> bool:
        """True if the cache is empty, as after `reset`, and was made for another batch size."""
        assert self._cache is not None
        return self._cache.length == 0 and self._cache.batch != key_states.shape[0]

    def get_seq_length(self) -> int:
        return 0 if self._cache is None else self._cache.length

    def get_max_length(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the number of keys that `update` will return, and the position of the first."""
        if isinstance(query_length, Tensor):  # the positions of the queries, before transformers 5
            query_length = query_length.shape[0]
        length = self.get_seq_length()
        first = 0 if self.sliding_window is None else max(0, length - self.sliding_window + 1)
        return length + query_length - first, first

    def activate_past_recording(self) -> None:
        """As `PolyheadCache.activate_past_recording`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """As `PolyheadCache.crop`."""
        if self._cache is None:
            return
        self.check_crop(tokens_to_remove)
        self._cache.rewind(self._removed(tokens_to_remove))
        self._since_crop = 0

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise if `crop` would; nothing is changed."""
        if self._cache is None:
            return
        try:
            self._cache.check_rewind(self._removed(tokens_to_remove))
        except ArgumentError as error:
            raise ArgumentError(
                "tokens_to_remove",
                error.rule,
                tokens_to_remove,
                "call cache.activate_past_recording() before tokens that may be removed again",
            ) from None

    def _removed(self, tokens_to_remove: int) -> int:
        assert self._cache is not None
        length = self._cache.length
        if tokens_to_remove > 0:
            return max(0, length - tokens_to_remove)
        return min(length, -tokens_to_remove)

    def reset(self) -> None:
        self._since_crop = 0
        if self._cache is not None:
            self._cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._cache is not None:
            self._cache.reorder(beam_idx.to(self._cache.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._cache is not None:
            rows = torch.arange(self._cache.batch, device=self._cache.device)
            self._cache.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._cache is not None:
            rows = torch.arange(self._cache.batch, device=self._cache.device)
            self._cache.reorder(rows[indices.to(self._cache.device)])
