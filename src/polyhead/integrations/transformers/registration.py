"""Registration of "polyhead" as an `attn_implementation` of transformers."""

from __future__ import annotations

from polyhead.errors import DependencyError, install_command
from polyhead.integrations.transformers.forward import attention_forward
from polyhead.integrations.transformers.guard import NAME, reject_unsupported_models
from polyhead.integrations.transformers.masks import make_mask

__all__ = ["register"]


def register() -> None:
    """Register "polyhead" as an `attn_implementation` of transformers models.

    Registers the attention function and a mask function: without one, the mask of a padded batch
    would be lost. Calling it again changes nothing. Afterwards transformers raises ModelError if a
    model is given this name and would keep its own attention.

    Raises:
        DependencyError: transformers is not installed.

    >>> register()                                                      # doctest: +SKIP
    >>> model = AutoModel.from_pretrained(..., attn_implementation="polyhead")  # doctest: +SKIP
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise DependencyError(
            f"transformers is needed to run inside its models: {install_command('hf')}"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    reject_unsupported_models()
