"""RoPE scalings, and the equivalent configurations of transformers."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from polyhead.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)

CONTEXT = 512  # the original context, if a scaling has one
PAIRS = 12

SHORT = tuple(1.0 + 0.03 * i for i in range(PAIRS))
LONG = tuple(1.0 + 0.7 * i for i in range(PAIRS))
YARN = {"rope_type": "yarn", "original_max_position_embeddings": CONTEXT}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": CONTEXT,
}

# name: our scaling, rope_parameters of transformers, max_position_embeddings there
SCALINGS = {
    "linear": (LinearScaling(2.3), {"rope_type": "linear", "factor": 2.3}, CONTEXT),
    "dynamic": (DynamicNTKScaling(2.3, CONTEXT), {"rope_type": "dynamic", "factor": 2.3}, CONTEXT),
    "yarn": (YarnScaling(4.0, CONTEXT), {**YARN, "factor": 4.0}, 4 * CONTEXT),
    "yarn, all options": (
        YarnScaling(
            3.7, CONTEXT, beta_fast=17.0, beta_slow=2.5, attention_factor=1.3, truncate=False
        ),
        {
            **YARN,
            "factor": 3.7,
            "beta_fast": 17.0,
            "beta_slow": 2.5,
            "attention_factor": 1.3,
            "truncate": False,
        },
        4 * CONTEXT,
    ),
    "yarn, mscale": (
        YarnScaling(40.0, CONTEXT, mscale=0.707, mscale_all_dim=1.3),
        {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3},
        40 * CONTEXT,
    ),
    "yarn, ramp of no width": (
        YarnScaling(4.0, 4),
        {**YARN, "factor": 4.0, "original_max_position_embeddings": 4},
        16,
    ),
    "llama3": (
        Llama3Scaling(7.3, 1.0, 4.0, CONTEXT),
        {
            "rope_type": "llama3",
            "factor": 7.3,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        },
        8 * CONTEXT,
    ),
    "longrope": (LongRopeScaling(16.0, CONTEXT, SHORT, LONG), LONGROPE, 16 * CONTEXT),
    "longrope, all options": (
        LongRopeScaling(3.0, CONTEXT, SHORT, LONG, attention_factor=1.19),
        {**LONGROPE, "factor": 3.0, "attention_factor": 1.19},
        16 * CONTEXT,
    ),
}


@pytest.fixture(params=SCALINGS)
def scaling(request):
    """A scaling for 24 rotary features and texts longer than 512 tokens."""
    return SCALINGS[request.param][0]


@pytest.fixture(params=SCALINGS)
def scaling_and_config(request):
    """A scaling and `config(head_dim, theta, **more)`, its equivalent in transformers."""
    scaling, parameters, max_position_embeddings = SCALINGS[request.param]

    def config(head_dim, theta, **more):
        return LlamaConfig(
            hidden_size=3 * head_dim,
            num_attention_heads=3,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_parameters={**parameters, "rope_theta": theta, **more},
        )

    return scaling, config
