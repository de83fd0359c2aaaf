"""Who is measured on what."""

from polyhead.bench.peers.registry import definition_of, peers_of
from polyhead.bench.suites import CASES


def test_polyhead_is_first_and_only_its_drop_in_is_ours_too():
    for case in CASES:
        peers = peers_of(case)
        assert peers[0].name == "polyhead"
        assert all(peer.ours == peer.name.startswith(("polyhead", "drop-in")) for peer in peers)


def test_names_differ_and_the_definition_takes_part():
    for case in CASES:
        peers = peers_of(case)
        assert len({peer.name for peer in peers}) == len(peers)
        assert definition_of(case) in peers or case.statistics or case.cached


def test_modules_meet_the_eight_variants_and_flex():
    module = next(case for case in CASES if case.id == "M1")
    names = [peer.name for peer in peers_of(module)]
    assert sum(name.startswith(("book: ", "torch MHA")) for name in names) == 8 + 1
    assert len(names) == 1 + 8 + 1 + 2
