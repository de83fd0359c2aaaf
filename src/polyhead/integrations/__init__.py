"""Integrations with other libraries; each module imports its library when called."""

from polyhead.integrations import transformers

__all__ = ["transformers"]
