"""torch's `flex_attention`, compiled, as a peer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyhead.bench.cases import Case
from polyhead.bench.peers.attention import Peer, attention_run

__all__ = ["FLEX", "flex_attend", "flex_reasons"]


def _compiler_reasons() -> list[str]:
    """Reasons why torch.compile cannot generate CPU code on this machine."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if any(shutil.which(name) for name in compilers):
        return []
    return ["torch.compile needs a C++ compiler; none was found"]


def flex_reasons(case: Case) -> list[str]:
    reasons = _compiler_reasons()
    if case.train:
        reasons.append("flex_attention has no backward pass on CPU")
    return reasons


def flex_attend(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return flex attention of (query, key, value), compiled for this case at the first call."""
    # Imported here: flex takes a second to import.
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    block_mask = None if case.mask is None else _block_mask(case)
    enable_gqa = case.H != case.G
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa)


def _block_mask(case: Case) -> Any:
    """Causal mask, and the window if there is one, as flex's `BlockMask`.

    Blocks are classified by their corners: `create_block_mask` would materialize T x S cells.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = 128
    window = case.T if case.window is None else case.window

    def rule(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window)

    first = torch.arange(0, case.T, size)
    # Distance from the first key of a block to the first query of a block.
    distance = first[:, None] - first
    some = (distance + size > 0) & (distance - size < window)
    whole = (distance - size + 1 >= 0) & (distance + size - 1 <= window)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(some & ~whole),
        *ordered(whole),
        BLOCK_SIZE=size,
        mask_mod=rule,
        seq_lengths=(case.T, case.S),
    )


FLEX = Peer(
    "flex",
    flex_reasons,
    lambda case, inputs: attention_run(case, inputs, flex_attend(case)),
    compiles=True,
)
