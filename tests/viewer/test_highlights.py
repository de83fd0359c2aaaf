"""Highlights of a report."""

import dataclasses

from polyhead.viewer.highlights import Example, as_dict, highlights


def called(heads):
    return [(head.name, head.layer, head.head) for head in heads]


def test_highlights_best_of_each_kind_with_example(report):
    heads = highlights(report)
    assert called(heads) == [
        ("induction", 0, 0),
        ("previous token", 0, 1),
        ("local", 1, 1),
        ("sink", 1, 0),
    ]
    places = [(head.example.query, head.example.key) for head in heads]
    # " Tom" at " met", which came after an earlier " Tom", not "Sir" at what follows a later one;
    # " a" at " met", not " Tom" at "Sir", where heads rest; " Tom" at " a", not " a" at itself;
    # " Tom" at "Sir" late in the text, not " met".
    assert places == [(5, 2), (3, 2), (5, 3), (5, 0)]
    assert [round(head.example.weight, 2) for head in heads] == [0.93, 0.8, 0.5, 0.95]
    assert round(heads[0].numbers["mass_induction"], 2) == 0.9


def test_highlights_few_are_of_different_kinds(report):
    first = report.layers[0]
    stats = {name: values.clone() for name, values in first.stats.items()}
    stats["effective_keys"] -= 0.2
    stats["mass_induction"] -= 0.001
    second = dataclasses.replace(first, index=2, stats=stats)
    more = dataclasses.replace(report, layers=(*report.layers, second))
    assert called(highlights(more, 2)) == [("induction", 2, 0), ("previous token", 2, 1)]
    assert len(highlights(more)) == 6


def test_highlights_without_ids_have_no_induction_example(report):
    assert highlights(dataclasses.replace(report, token_ids=None))[0].example is None


def test_highlights_as_json(report):
    data = as_dict(report)
    assert data["tokens"][1] == " Tom"
    assert [row["head"] for row in data["heads"]] == [0, 1, 0, 1]
    assert data["highlights"][2]["example"] == dataclasses.asdict(Example(5, 3, 0.5))
