"""Per-head analysis of attention, without a T x S tensor."""

from polyhead.call import HeadStats
from polyhead.look.ablate import ablate
from polyhead.look.capture import capture
from polyhead.look.importance import HeadImportance, head_importance, next_token_loss
from polyhead.look.kinds import name_head
from polyhead.look.layers import AttentionLayer, attention_layers
from polyhead.look.maps import attention_map, bin_edges
from polyhead.look.prune import prune
from polyhead.look.report import HeadReport, LayerReport
from polyhead.look.stats import stats
from polyhead.look.top_keys import TopKeys, top_keys

__all__ = [
    "AttentionLayer",
    "HeadImportance",
    "HeadReport",
    "HeadStats",
    "LayerReport",
    "TopKeys",
    "ablate",
    "attention_layers",
    "attention_map",
    "bin_edges",
    "capture",
    "head_importance",
    "name_head",
    "next_token_loss",
    "prune",
    "stats",
    "top_keys",
]
