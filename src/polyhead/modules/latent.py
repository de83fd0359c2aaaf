"""Multi-head latent attention (DeepSeek): keys and values of all heads from one small latent."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.backends import BackendChoice
from polyhead.cache import Cache, KVCache
from polyhead.cache_view import CacheView
from polyhead.call import Aux, AuxRequest
from polyhead.errors import ArgumentError, DtypeError
from polyhead.functional import attention
from polyhead.mask import Mask
from polyhead.modules.caching import fitting_cache
from polyhead.modules.linear import onednn_linear
from polyhead.modules.validate import (
    check_cache,
    check_dropout,
    check_input,
    check_mask,
    check_norm,
    check_rope,
    check_sizes,
    combine_masks,
    split_heads,
)
from polyhead.modules.weights import describe_layer, takes_what_it_holds
from polyhead.positions import Rope, apply_rope
from polyhead.type_hints import signature_of
from polyhead.validate import (
    cached_query_offset,
    check_request,
    check_scale,
    mask_cached_rows,
)

__all__ = ["MultiHeadLatentAttention"]

_RMS_NORM = functools.partial(nn.RMSNorm, eps=1e-6)  # DeepSeek's


class MultiHeadLatentAttention(nn.Module):
    """Heads whose keys and values are made of one latent a token, which is all that is cached.

        [c, k_rope] = [norm(down[: kv_rank]), rope(down[kv_rank :])]     down = x W_kv_down
        [q_nope, q_rope] = split(c_q W_query), q_rope turned by rope     c_q = norm(x W_query_down)
        k, v = [split(c W_key), k_rope], split(c W_value)                k_rope: one for all heads
        y = merge(softmax(scale * [q_nope, q_rope] k^T) v) W_out

    W_key and W_value need not act on every key: W_key can act on the queries instead, and W_value
    on the weighted sums. This **absorbed** form is the same function, of H query heads that share
    one key/value head:

        y = merge((softmax(scale * [q_nope W_key^T, q_rope] [c, k_rope]^T) c) W_value) W_out

    Row block h of W_query, W_key and W_value is head h; in W_query's, q_nope comes before q_rope.

    Args:
        d_in: features of the input.
        d_out: features of the output.
        context_length: the most tokens it accepts. It costs no memory.
        dropout: probability with which an attention weight is dropped in training, in [0, 1).
        num_heads: how many heads, H.
        kv_rank: size of the latent c.
        query_rank: size of the queries' own latent c_q; None: there is none, W_query reads x.
        nope_head_dim: size of a head's queries and keys that rope leaves alone.
        rope_head_dim: size of the part that rope turns; its key is the same for all heads.
        value_head_dim: size of a head's values.
        rope: rotary positions of that part; DeepSeek's is `Rope(interleaved=True)`. Or None.
        norm: makes the norm of a latent from its size (`kv_norm`, `q_norm`).
        qkv_bias: whether W_kv_down and W_query_down have a bias. W_query, W_key and W_value have
            none.
        out_bias: whether out_proj has a bias.
        mask: who may attend to whom; None: everybody.
        scale: factor on the scores; None: 1 / sqrt(nope_head_dim + rope_head_dim). (DeepSeek with
            YaRN multiplies this by (0.1 mscale_all_dim log(factor) + 1) ** 2.)
        backend: as in `polyhead.attention`.
        device, dtype: of the parameters.

    Shapes:
        x (B, T, d_in) -> (B, T, d_out)

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; DeepSeek-V3 (arXiv
    2412.19437), section 2.1.1.

    >>> mla = MultiHeadLatentAttention(16, 16, context_length=8, dropout=0.0, num_heads=4,
    ...     kv_rank=6, nope_head_dim=4, rope_head_dim=2, value_head_dim=4, rope=Rope())
    >>> mla(torch.ones(1, 8, 16)).shape
    torch.Size([1, 8, 16])
    >>> mla.make_cache(batch=1, preallocate=True).nbytes == 8 * (6 + 2) * 4     # float32
    True
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        *,
        kv_rank: int,
        query_rank: int | None = None,
        nope_head_dim: int,
        rope_head_dim: int,
        value_head_dim: int,
        rope: Rope | None,
        norm: Callable[[int], nn.Module] = _RMS_NORM,
        qkv_bias: bool = False,
        out_bias: bool = False,
        mask: Mask | None = polyhead.mask.causal(),
        scale: float | None = None,
        backend: BackendChoice = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out, context_length=context_length, num_heads=num_heads)
        check_dropout(dropout)
        check_sizes(kv_rank=kv_rank, nope_head_dim=nope_head_dim, rope_head_dim=rope_head_dim)
        check_sizes(value_head_dim=value_head_dim)
        if query_rank is not None:
            check_sizes(query_rank=query_rank)
        check_rope(rope, rope_head_dim, "rope_head_dim")
        check_mask(mask)
        check_norm("norm", norm)
        check_scale(scale)
        self.d_in = d_in
        self.d_out = d_out
        self.context_length = context_length
        self.num_heads = num_heads
        self.kv_rank = kv_rank
        self.query_rank = query_rank
        self.nope_head_dim = nope_head_dim
        self.rope_head_dim = rope_head_dim
        self.value_head_dim = value_head_dim
        self.rope = rope
        self.mask = mask
        # The head size that attention() would take it from is another in the absorbed form.
        self.scale = 1.0 / math.sqrt(nope_head_dim + rope_head_dim) if scale is None else scale
        self.backend = backend

        def linear(features: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(features, out, bias=bias, device=device, dtype=dtype)

        self.W_query_down = None if query_rank is None else linear(d_in, query_rank, qkv_bias)
        self.q_norm = None if query_rank is None else norm(query_rank).to(device, dtype)
        self.W_query = linear(query_rank or d_in, num_heads * (nope_head_dim + rope_head_dim))
        self.W_kv_down = linear(d_in, kv_rank + rope_head_dim, qkv_bias)
        self.kv_norm = norm(kv_rank).to(device, dtype)
        self.W_key = linear(kv_rank, num_heads * nope_head_dim)
        self.W_value = linear(kv_rank, num_heads * value_head_dim)
        self.out_proj = linear(num_heads * value_head_dim, d_out, out_bias)
        self.dropout = nn.Dropout(dropout)

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_aux: None = None,
        absorb: bool | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        *,
        return_aux: AuxRequest,
        absorb: bool | None = None,
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_aux: AuxRequest | None = None,
        absorb: bool | None = None,
    ) -> Tensor | tuple[Tensor, Aux]:
        """Attend.

        Args:
            x: (B, T, d_in) what queries, keys and values are made of.
            mask: who may attend, together with the module's own mask (both must allow). With a
                cache its keys are all tokens so far, cached ones included.
            cache: latents of the tokens before x (`make_cache`); those of x are added to it.
                Without gradients only.
            positions: (T,) or (B, T) for rope; None: x stands behind what is cached.
            return_aux: what to return beside the output; the same in both forms.
            absorb: whether to compute the absorbed form; None: if it takes fewer multiplications
                (few queries against many keys, as in decoding) and W_key and W_value are plain.

        Returns:
            (B, T, d_out), or (output, Aux) if `return_aux` is given.

        Raises:
            ArgumentError: absorb=True, and W_key or W_value is no plain nn.Linear (adapters,
                quantisation): there is no one weight to absorb.

        >>> mla = MultiHeadLatentAttention(16, 16, context_length=8, dropout=0.0, num_heads=4,
        ...     kv_rank=6, nope_head_dim=4, rope_head_dim=2, value_head_dim=4, rope=Rope())
        >>> x = torch.randn(1, 8, 16)
        >>> with torch.no_grad():
        ...     cache = mla.make_cache(batch=1)
        ...     prompt, token = mla(x[:, :7], cache=cache), mla(x[:, 7:], cache=cache)
        ...     torch.allclose(torch.cat([prompt, token], dim=1), mla(x), atol=1e-6)
        True
        """
        rule = combine_masks(self.mask, mask)
        self._check_absorb(absorb)
        request = check_request(return_aux)
        if cache is not None:
            check_cache(cache, rule, x, None, self.num_heads, self.context_length)
            if positions is None and self.rope is not None:
                positions = cache.next_positions(x.shape[1])
        with onednn_linear(x, self):
            q_nope_bhtn, q_rope_bhtr, new_b1td = self._project(x, positions)
        latent_b1sd: Tensor | CacheView = new_b1td
        if cache is not None:
            latent_b1sd, _ = cache.append_as_views(new_b1td, new_b1td[..., :0])
            rule = None if rule is None else rule.for_keys(cache.start, cache.length)
        if absorb is None:
            absorb = self._absorbing_is_less(x.shape[1], latent_b1sd.shape[2])
        form: Callable[..., tuple[Tensor, Tensor | CacheView, Tensor | CacheView]]
        form = self._absorbed if absorb else self._expanded
        # The expanded form makes tensors of the view, and with them its lengths would be lost.
        query_offset = None if absorb else cached_query_offset(latent_b1sd, x.shape[1])
        if query_offset is not None:
            rule = mask_cached_rows(latent_b1sd, rule)
        with onednn_linear(q_nope_bhtn, self):
            query, key, value = form(q_nope_bhtn, q_rope_bhtr, latent_b1sd)
        contexts_bhte, aux = attention(
            query,
            key,
            value,
            mask=rule,
            scale=self.scale,
            dropout=self.dropout.p if self.training else 0.0,
            query_offset=query_offset,
            backend=self.backend,
            return_aux=request,
        )
        if absorb:
            contexts_bhte = self._values_of(contexts_bhte)
        y = contexts_bhte.transpose(1, 2).flatten(2)
        with onednn_linear(y, self):
            y = self.out_proj(y)
        return y if return_aux is None else (y, aux)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def make_cache(self, batch: int, max_tokens: int | None = None, **options: Any) -> KVCache:
        """An empty `KVCache` for this module's latents, in its dtype and on its device.

        A token takes kv_rank + rope_head_dim numbers, however many heads there are: [c, k_rope] is
        the key of one head, and its values are empty.

        Args:
            batch: rows.
            max_tokens: None: context_length.
            options: more of `KVCache`'s keywords, such as window= or storage_dtype=torch.int8.
        """
        most = self.context_length if max_tokens is None else max_tokens
        return fitting_cache(self, batch, most, 1, self.kv_rank + self.rope_head_dim, 0, options)

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts of the queries, (B, H, T, ...), and [c, k_rope], (B, 1, T, C + R)."""
        check_input("x", x, self.W_kv_down, self.d_in, self.context_length)
        source = x
        if self.W_query_down is not None and self.q_norm is not None:
            source = self.q_norm(self.W_query_down(x))
        q_sizes = (self.nope_head_dim, self.rope_head_dim)
        query_bhtd = split_heads("W_query", self.W_query(source), self.num_heads, sum(q_sizes))
        q_nope_bhtn, q_rope_bhtr = query_bhtd.split(q_sizes, dim=-1)
        down_b1td = self.W_kv_down(x)[:, None]
        c_b1tc, k_rope_b1tr = down_b1td.split((self.kv_rank, self.rope_head_dim), dim=-1)
        # Under autocast a norm may answer in float32, and the key would be float32 with it.
        c_b1tc = self.kv_norm(c_b1tc).to(down_b1td.dtype)
        if self.rope is not None:
            q_rope_bhtr, k_rope_b1tr = apply_rope(
                self.rope, q_rope_bhtr, k_rope_b1tr, positions, None
            )
        return q_nope_bhtn, q_rope_bhtr, torch.cat((c_b1tc, k_rope_b1tr), dim=-1)

    def _expanded(
        self, q_nope_bhtn: Tensor, q_rope_bhtr: Tensor, latent_b1sd: Tensor | CacheView
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of H heads: W_key and W_value act on the latent of every key."""
        if isinstance(latent_b1sd, CacheView):
            latent_b1sd = latent_b1sd.materialize_valid()
        c_bsc = latent_b1sd[:, 0, :, : self.kv_rank]
        k_rope_bhsr = latent_b1sd[..., self.kv_rank :].expand(-1, self.num_heads, -1, -1)
        k_nope_bhsn = split_heads("W_key", self.W_key(c_bsc), self.num_heads, self.nope_head_dim)
        value_bhse = split_heads(
            "W_value", self.W_value(c_bsc), self.num_heads, self.value_head_dim
        )
        query_bhtd = torch.cat((q_nope_bhtn, q_rope_bhtr), dim=-1)
        return query_bhtd, torch.cat((k_nope_bhsn, k_rope_bhsr), dim=-1), value_bhse

    def _absorbed(
        self, q_nope_bhtn: Tensor, q_rope_bhtr: Tensor, latent_b1sd: Tensor | CacheView
    ) -> tuple[Tensor, Tensor | CacheView, Tensor | CacheView]:
        """Queries on which W_key has acted; the latent is their one key, and its c their value."""
        W_key_hnc = self.W_key.weight.unflatten(0, (self.num_heads, self.nope_head_dim))
        q_latent_bhtc = torch.einsum("bhtn,hnc->bhtc", q_nope_bhtn, W_key_hnc)
        query_bhtd = torch.cat((q_latent_bhtc, q_rope_bhtr), dim=-1)
        if isinstance(latent_b1sd, CacheView):
            # A backend that takes tensors makes one, for both.
            latent_b1sd = replace(latent_b1sd, materialize=functools.cache(latent_b1sd.materialize))
            return query_bhtd, latent_b1sd, latent_b1sd.narrow(self.kv_rank)
        return query_bhtd, latent_b1sd, latent_b1sd[..., : self.kv_rank]

    def _values_of(self, contexts_bhtc: Tensor) -> Tensor:
        """W_value on each head's weighted sum of latents, (B, H, T, value_head_dim)."""
        W_value_hec = self.W_value.weight.unflatten(0, (self.num_heads, self.value_head_dim))
        return torch.einsum("bhtc,hec->bhte", contexts_bhtc, W_value_hec)

    def _absorbing_is_less(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for T queries against S keys.

        Those of one batch row and head; N = nope_head_dim, R = rope_head_dim, C = kv_rank:

            expanded    S C (N + E) for keys and values           T S (N + R + E) to attend
            absorbed    T C (N + E) for queries and contexts      T S (C + R + C) to attend
        """
        if not self._plain:
            return False
        by_head = self.nope_head_dim + self.value_head_dim
        expanded = S * self.kv_rank * by_head + T * S * (by_head + self.rope_head_dim)
        absorbed = T * self.kv_rank * by_head + T * S * (2 * self.kv_rank + self.rope_head_dim)
        return absorbed < expanded

    @property
    def _plain(self) -> bool:
        return takes_what_it_holds(self.W_key) and takes_what_it_holds(self.W_value)

    def _check_absorb(self, absorb: bool | None) -> None:
        if absorb is not None and not isinstance(absorb, bool):
            raise DtypeError(
                "absorb", "must be True, False or None", repr(absorb), "leave it out to have chosen"
            )
        if absorb and not self._plain:
            kinds = f"{describe_layer(self.W_key)}, {describe_layer(self.W_value)}"
            raise ArgumentError(
                "absorb",
                "needs plain nn.Linear W_key and W_value, without hooks",
                kinds,
                "leave absorb out, or merge adapters and remove hooks first",
            )

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, kv_rank={self.kv_rank}, query_rank={self.query_rank}"
        return (
            f"{sizes}, nope_head_dim={self.nope_head_dim}, rope_head_dim={self.rope_head_dim}, "
            f"value_head_dim={self.value_head_dim}, context_length={self.context_length}, "
            f"mask={self.mask!r}, rope={self.rope}, scale={self.scale}"
        )
