"""Model families. A family is one file here, and one line in `FAMILIES`."""

from polyhead.convert.families import (
    bert,
    bloom,
    deepseek,
    falcon,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    neox,
    opt,
    phi3,
    qwen3,
    t5,
    vit,
)
from polyhead.convert.family import Family

__all__ = ["FAMILIES"]

# In the order in which messages list them.
FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
    qwen3.FAMILY,
    *gemma.FAMILIES,
    gpt_oss.FAMILY,
    phi3.FAMILY,
    neox.FAMILY,
    bloom.FAMILY,
    falcon.FAMILY,
    opt.FAMILY,
    *bert.FAMILIES,
    *vit.FAMILIES,
    t5.FAMILY,
    deepseek.FAMILY,
)
