"""Record of calls."""

from __future__ import annotations

import pickle
import threading

from polyhead.drop_in import SdpaCalls


def test_sdpa_calls_without_calls_says_so():
    assert str(SdpaCalls()) == "0 calls of scaled_dot_product_attention"


def test_sdpa_calls_count_from_every_thread():
    calls = SdpaCalls()

    def add():
        for _ in range(500):
            calls.add("torch", "reason")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.torch == 2000


def test_sdpa_calls_columns_align_and_polyhead_is_first():
    calls = SdpaCalls()
    calls.add("torch", "a reason")
    for _ in range(12):
        calls.add("polyhead", "causal()")
    calls.add("polyhead", "no mask")
    assert str(calls).splitlines()[1:] == [
        "  polyhead  12  causal()",
        "  polyhead   1  no mask",
        "  torch      1  a reason",
    ]
    assert repr(calls) == "<SdpaCalls: 13 by polyhead, 1 by torch>"


def test_sdpa_calls_pickle_and_clear():
    calls = SdpaCalls()
    calls.add("polyhead", "no mask")
    copied = pickle.loads(pickle.dumps(calls))
    calls.clear()
    copied.add("polyhead", "no mask")
    assert (calls.polyhead, copied.polyhead) == (0, 2)
