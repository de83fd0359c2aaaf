"""Hub ids: whether the hub has a model of an id, and the known models nearest to a name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from polyhead.errors import ModelError, nearest

__all__ = ["DEFAULT", "check_on_hub", "is_cached", "remedy_for"]

DEFAULT = "SmolLM2-135M-Instruct"


def is_cached(hub_id: str) -> bool:
    """Return whether the hub's cache has the config of a model.

    Without it, transformers sends requests even if told to load local files only.
    """
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # an id that cannot be one
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    return False


def check_on_hub(hub_id: str, seconds: float = 10.0) -> None:
    """Raise unless the hub answers that it has this model, by one request.

    A download is repeated for over a minute where the hub cannot be reached.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    here = f"{hub_id} must be a folder, a GGUF file or a model of the hub; got no such file here, "
    try:
        HfApi().model_info(hub_id, timeout=seconds)
    except RepositoryNotFoundError:
        remedy = remedy_for(hub_id, "check the name, or log in with hf auth login if it is private")
        raise ModelError(f"{here}and no such model there; {remedy}") from None
    except HfHubHTTPError:
        return  # such as a mirror without this request: its files may be there
    except Exception as error:  # of a network, of offline mode, or of an id that cannot be one
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = remedy_for(hub_id, "check the name and the network, or give a folder or GGUF file")
        raise ModelError(
            f"{here}nothing in the hub's cache, and no answer from the hub ({reason}); {remedy}"
        ) from None


def remedy_for(source: str, otherwise: str) -> str:
    """Return a remedy for a model that is nowhere: the nearest of the models here, or `otherwise`.

    >>> remedy_for("smollm2", "check the name")
    'leave it out for SmolLM2-135M-Instruct, the default'
    """
    known = {DEFAULT: DEFAULT}
    known |= {name.rpartition("/")[2]: name for name in (*_cached(), *_in_folder_of(source))}
    name = source.rstrip("/").rpartition("/")[2]
    near = nearest(name, known)
    if near is None and len(name) > 2:
        near = next((n for n in known if n.lower().startswith(name.lower())), None)
    if near is None:
        return otherwise
    if known[near] == DEFAULT:
        return f"leave it out for {DEFAULT}, the default"
    return f"did you mean {known[near]!r}?"


def _cached() -> list[str]:
    """Return the ids of the models in the hub's cache."""
    with suppress(ImportError, OSError):
        from huggingface_hub.constants import HF_HUB_CACHE

        folders = sorted(Path(HF_HUB_CACHE).glob("models--*"))
        return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    return []


def _in_folder_of(source: str) -> list[str]:
    """Return the model folders and GGUF files in the folder that a path names."""
    place = Path(source).expanduser().parent
    with suppress(OSError):
        return [
            str(entry)
            for entry in sorted(place.iterdir())
            if entry.suffix == ".gguf" or (entry / "config.json").is_file()
        ]
    return []
