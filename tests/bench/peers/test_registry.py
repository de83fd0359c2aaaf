"""Registry of peers per case."""

from polyhead.bench.peers.registry import definition_of, peers_of
from polyhead.bench.suites import CASES


def test_peers_of_starts_with_polyhead():
    for case in CASES:
        peers = peers_of(case)
        assert peers[0].name == "polyhead"
        assert all(peer.ours == peer.name.startswith(("polyhead", "drop-in")) for peer in peers)


def test_peers_of_has_unique_names_and_eager():
    for case in CASES:
        peers = peers_of(case)
        assert len({peer.name for peer in peers}) == len(peers)
        assert definition_of(case) in peers or case.statistics or case.cached


def test_module_peers_have_the_eight_variants_and_flex():
    module = next(case for case in CASES if case.id == "M1")
    names = [peer.name for peer in peers_of(module)]
    assert sum(name.startswith(("book: ", "torch MHA")) for name in names) == 8 + 1
    assert len(names) == 1 + 8 + 1 + 2
