"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The default model, loaded once."""
    from polyhead.integrations.models import load_model

    return load_model()
