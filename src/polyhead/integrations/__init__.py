"""Inside other libraries, and their files read: each module imports its library when called."""

from polyhead.integrations import transformers

__all__ = ["transformers"]
