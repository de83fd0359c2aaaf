"""Who is measured on what."""

from polyhead.bench.lineup import definition_of, peers_of
from polyhead.bench.suites import CASES


def test_polyhead_is_first_and_the_only_one_of_ours():
    for case in CASES:
        ours = [peer.ours for peer in peers_of(case)]
        assert ours == [True] + [False] * (len(ours) - 1)


def test_names_differ_and_the_definition_takes_part():
    for case in CASES:
        peers = peers_of(case)
        assert len({peer.name for peer in peers}) == len(peers)
        assert definition_of(case) in peers or case.statistics


def test_modules_meet_the_eight_variants_and_flex():
    module = next(case for case in CASES if case.id == "M1")
    assert len(peers_of(module)) == 1 + 8 + 1
