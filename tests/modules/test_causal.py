"""One head: the lecture's CausalAttention."""

import torch

import polyhead as ph


def test_is_the_lecture_s_head(lecture, lecture_input):
    torch.manual_seed(123)
    theirs = lecture.CausalAttention(3, 2, 6, 0.0)
    torch.manual_seed(123)
    ours = ph.CausalAttention(3, 2, 6, 0.0)
    assert torch.equal(ours.W_value.weight, theirs.W_value.weight)
    torch.testing.assert_close(ours(lecture_input), theirs(lecture_input), rtol=0, atol=1e-6)


def test_the_lecture_s_numbers(lecture_input):
    # The wrapper's first head is built first, so its two columns are this head's.
    torch.manual_seed(123)
    y = ph.CausalAttention(3, 2, 6, 0.0)(lecture_input)
    expected = torch.tensor(
        [
            [-0.451920, 0.221605],
            [-0.587435, 0.005776],
            [-0.630023, -0.063183],
            [-0.567457, -0.084253],
            [-0.552562, -0.098068],
            [-0.529901, -0.108068],
        ]
    )
    torch.testing.assert_close(y, expected.expand(2, 6, 2), rtol=0, atol=1e-6)


def test_later_tokens_change_nothing_before_them():
    head, x = ph.CausalAttention(5, 7, 11, 0.0), torch.randn(2, 6, 5)
    changed = x.clone()
    changed[:, 4:] = 1e3
    assert torch.equal(head(changed)[:, :4], head(x)[:, :4])
    assert not torch.allclose(head(changed)[:, 4:], head(x)[:, 4:])


def test_scale_and_rope_are_the_formula():
    head = ph.CausalAttention(5, 4, 11, 0.0, rope=ph.Rope(100.0), scale=0.7).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    query, key = head.W_query(x), head.W_key(x)
    angles = torch.arange(6.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1]).double()

    def turned(t):
        pairs = torch.complex(t[..., :2], t[..., 2:]) * torch.polar(
            torch.ones(6, 2).double(), angles
        )
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    scores = 0.7 * turned(query) @ turned(key).mT
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ head.W_value(x)
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-7)  # the angles' 0.1 is float32


def test_repr_says_what_it_is():
    text = repr(ph.CausalAttention(5, 4, 11, 0.0, rope=ph.Rope(100.0)))
    assert "context_length=11" in text
    assert "causal()" in text
    assert "Rope(theta=100.0" in text


def test_projections_and_contexts_are_of_one_head():
    head, x = ph.CausalAttention(5, 7, 11, 0.0, qkv_bias=True), torch.randn(2, 6, 5)
    memory = torch.randn(2, 3, 5)
    query, key, value = head.project_qkv(x, memory)
    assert torch.equal(query, head.W_query(x)[:, None])
    assert torch.equal(key, head.W_key(memory)[:, None])
    assert torch.equal(value, head.W_value(memory)[:, None])
    assert torch.equal(head.head_contexts(x, memory), head(x, memory)[:, None])


def test_projections_are_rotated_where_they_stand():
    head, x = ph.CausalAttention(5, 4, 11, 0.0, rope=ph.Rope()), torch.randn(2, 6, 5)
    at = torch.arange(3, 9)
    query, key, value = head.project_qkv(x, positions=at)
    assert torch.equal(query, head.rope(head.W_query(x)[:, None], at))
    assert torch.equal(key, head.rope(head.W_key(x)[:, None], at))
    assert torch.equal(value, head.W_value(x)[:, None])
