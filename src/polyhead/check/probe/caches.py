"""Cache argument of a module and its protocol, found by trying."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyhead.check.probe.invocation import Calling
from polyhead.check.probe.signature import cache_flag
from polyhead.check.probe.transformers import is_transformers_own
from polyhead.check.subject import Subject, difference

__all__ = ["claim_cache", "placed", "start_of"]


class _Updated:
    """Cache with the protocol of transformers: `update` returns all keys and values so far."""

    def __init__(self) -> None:
        self.layers: dict[Any, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: Any = 0, cache_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            old_key, old_value = self.layers[layer_idx]
            key, value = torch.cat([old_key, key], dim=-2), torch.cat([old_value, value], dim=-2)
        self.layers[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: Any = None) -> int:
        if not self.layers:
            return 0
        known = self.layers.get(layer_idx, next(iter(self.layers.values())))
        return known[0].shape[-2]

    def __len__(self) -> int:
        return len(self.layers)


# Empty caches: None, if the call returns a filled cache; or an object that the call fills.
STARTS: dict[str, Callable[[], Any]] = {
    "functional": lambda: None,
    "in place: dict": dict,
    "in place: list": list,
    "in place: update()": _Updated,
    # The package of the layer is already imported.
    "transformers": lambda: sys.modules["transformers"].DynamicCache(),
}
# Arguments that count the tokens in the cache, or position the new ones.
_COUNTS = re.compile(
    r"(start|offset|past|cur(rent)?|position)_?(pos|idx|index|offset|len|length)?|(cache|seq)_len"
)
_PLACES = re.compile(r"position_ids|positions|input_pos(itions)?|cache_positions?")


def claim_cache(subject: Subject) -> None:
    """Find out how the argument named like a cache is used, by running four tokens in two steps,
    and the arguments that go with it.
    """
    calling = subject.calling
    if calling.cache == "transformers":
        if is_transformers_own(subject.module) and not _comes_back(subject, calling):
            subject.calling = replace(calling, cache=None)
            subject.claims.how["cache"] = f"{calling.cache_name} is not a DynamicCache"
        return
    if calling.style == "transformers" or calling.cache not in (None, "functional", "stateful"):
        return
    if calling.cache == "functional":
        for placed in (_placed(subject), {}):
            for start in list(STARTS)[:-1]:
                tried = replace(calling, cache=start, placed=placed)
                if placed is not None and _comes_back(subject, tried):
                    subject.calling = tried
                    subject.claims.how["cache"] = "found by trying"
                    return
        subject.claims.how["cache"] = "a first call returned none"
    if calling.cache != "stateful" and (flag := cache_flag(subject.module)) is not None:
        tried = replace(calling, cache="stateful", cache_name=flag)
        if _remembers(subject, tried):
            subject.calling = tried
            subject.claims.how["cache"] = "its second call depends on its first"


def start_of(subject: Subject) -> Any:
    """Return an empty cache."""
    return STARTS[subject.calling.cache or ""]()


def placed(calling: Calling, first: int, n: int) -> dict[str, Any]:
    """Return the arguments that position n tokens after `first` cached ones."""
    places = torch.arange(first, first + n)
    values = {"count": first, "row": places, "rows": places[None]}
    return {name: values[kind] for name, kind in calling.placed.items()}


def _placed(subject: Subject) -> dict[str, str]:
    """Format of each argument that positions tokens: "count", "row" or "rows"."""
    parameters = inspect.signature(subject.module.forward).parameters
    found = {}
    for name, parameter in parameters.items():
        if type(parameter.default) is int and _COUNTS.fullmatch(name):
            found[name] = "count"
        elif parameter.default is None and _PLACES.fullmatch(name):
            found[name] = "rows" if name == "position_ids" else "row"
    return found


def _comes_back(subject: Subject, calling: Calling) -> bool:
    """True if a first step returns a cache, and the same output as without one."""
    module, x = subject.copy(), subject.input(2)[:, :2]
    if calling.cache == "transformers":
        module.layer_idx = 0  # type: ignore[assignment]
    cache = STARTS[calling.cache or ""]()
    more = {calling.cache_name: cache, **calling.cache_options, **placed(calling, 0, 2)}
    if calling.supplies is not None and calling.mask is not None:
        more |= {"allowed": calling.supplies(2)[None, None]}
    try:
        with torch.no_grad():
            result = replace(calling, supplies=None)(module, x, **more)
            plain = subject.run(x)
    except Exception:  # of unknown code
        return False
    given = result.cache if cache is None else cache
    empty = given is None or (isinstance(given, (dict, list, tuple, _Updated)) and not given)
    if empty or result.output.shape != plain.shape:
        return False
    # Passed positions must equal the module's default ones.
    return not calling.placed or bool(
        difference(result.output, plain).max() <= 4 * subject.allowed(x)
    )


def _remembers(subject: Subject, calling: Calling) -> bool:
    """True if the second of two steps depends on the first."""
    module, x = subject.copy(), subject.input(2)[:, :4]
    flag = {calling.cache_name: True}
    try:
        with torch.no_grad():
            subject.call(module, x[:, :2], **flag)
            second = subject.call(module, x[:, 2:], **flag).output
            alone = subject.call(subject.copy(), x[:, 2:], **flag).output
    except Exception:  # of unknown code
        return False
    return second.shape == alone.shape and bool(
        difference(second, alone).max() > subject.allowed(x)
    )
