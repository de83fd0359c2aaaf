"""The ONNX project's own Attention cases, through `attention()`: an outside word on what is right.

The onnx package generates the cases, with inputs and expected outputs, in this process.
"""

import warnings

import numpy as np
import pytest
import torch

import polyhead as ph


def _cases():
    with warnings.catch_warnings():
        # onnx's generators cast fully masked rows; the warnings are theirs.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases("Attention")
    # The _expanded cases repeat the others as graphs of primitive operators.
    return [case for case in cases if not case.name.endswith("_expanded")]


CASES = _cases()


def _tensor(array):
    if array.dtype.name == "bfloat16":  # numpy's bfloat16 comes from ml_dtypes
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _read(case):
    """Inputs by name, attributes, and expected outputs by name."""
    from onnx import helper

    node = case.model.graph.node[0]
    arrays, expected = case.data_sets[0]
    names = [name for name in node.input if name]
    inputs = {name: _tensor(array) for name, array in zip(names, arrays, strict=True)}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    outputs = [name for name in node.output if name]
    return inputs, attributes, dict(zip(outputs, map(_tensor, expected), strict=True))


def _heads(tensor, num_heads):
    """(B, tokens, heads * size) to (B, heads, tokens, size); four dimensions stay."""
    return tensor if tensor.ndim == 4 else tensor.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _lowered(inputs, attributes):
    """query, key, value, mask and keywords of `attention` that say what the case says."""
    query = _heads(inputs["Q"], attributes.get("q_num_heads"))
    key = _heads(inputs["K"], attributes.get("kv_num_heads"))
    value = _heads(inputs["V"], attributes.get("kv_num_heads"))
    if "past_key" in inputs:
        key = torch.cat((inputs["past_key"], key), dim=2)
        value = torch.cat((inputs["past_value"], value), dim=2)
    # Query t stands at key t, counted from the end of the past keys if there are any; with
    # nonpad_kv_seqlen queries stand at the end of their row's keys.
    align = "end" if "nonpad_kv_seqlen" in inputs else "start"
    parts = [ph.mask.causal(align)] if attributes.get("is_causal") else []
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    before, after = (None if size == -1 else size for size in sides)
    if before is not None or after is not None:
        parts.append(ph.mask.window(before=before, after=after, align=align))
    if "past_key" in inputs:
        past, T = inputs["past_key"].shape[2], query.shape[2]
        parts = [part.for_queries(past, past + T, past + T) for part in parts]
    keywords = {
        "scale": attributes.get("scale"),
        "softcap": attributes.get("softcap") or None,
    }
    return query, key, value, parts, keywords


def _written_mask(inputs, S):
    """attn_mask with four dimensions and S keys: what it does not reach is forbidden."""
    attn_mask = inputs.get("attn_mask")
    if attn_mask is None:
        return None, None
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    missing = S - attn_mask.shape[-1]
    forbidden = False if attn_mask.dtype == torch.bool else float("-inf")
    attn_mask = torch.nn.functional.pad(attn_mask, (0, missing), value=forbidden)
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def _row(tensor, b):
    """Batch row b of a four-dimensional tensor, which may have one row for all."""
    return None if tensor is None else tensor[min(b, tensor.shape[0] - 1) :][:1]


def _attend(inputs, attributes, backend, *, with_bias=True, with_softcap=True):
    """Output, weights, lse; rows with their own length run one by one (no case asks their aux)."""
    query, key, value, parts, keywords = _lowered(inputs, attributes)
    if not with_softcap:
        keywords["softcap"] = None
    allowed, bias = _written_mask(inputs, key.shape[2])
    if not with_bias:
        parts, allowed, bias = [], None, None
    request = ph.AuxRequest(weights=True, lse=True)
    lengths = inputs.get("nonpad_kv_seqlen")
    rows = [(slice(None), None)] if lengths is None else list(enumerate(lengths.tolist()))
    outputs, weights, lses = [], [], []
    for b, length in rows:
        if length is None:
            q, k, v, may, add = query, key, value, allowed, bias
        else:
            # A query stands at the end of its row's own keys: those beyond its length are cut.
            q, k, v = query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length]
            may, add = (None if t is None else _row(t, b)[..., :length] for t in (allowed, bias))
        masks = [*parts, ph.mask.dense(may)] if may is not None else parts
        mask = None
        for part in masks:
            mask = part if mask is None else mask & part
        y, aux = ph.attention(
            q, k, v, mask=mask, bias=add, backend=backend, return_aux=request, **keywords
        )
        outputs.append(y)
        weights.append(aux.weights)
        lses.append(aux.lse)
    return torch.cat(outputs), weights[0], lses[0]


def _scores(inputs, attributes, mode):
    """qk_matmul_output: 0 scaled scores, 1 capped, 2 with bias, 3 weights."""
    _, weights, lse = _attend(
        inputs, attributes, "reference", with_bias=mode >= 2, with_softcap=mode >= 1
    )
    # weights = exp(scores - lse), so the scores are what the weights and the lse say.
    return weights if mode == 3 else torch.log(weights) + lse[..., None]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("test_"))
def test_attention_case(case, backend):
    inputs, attributes, expected = _read(case)
    output = _attend(inputs, attributes, backend)[0]
    if inputs["Q"].ndim == 3:
        output = output.transpose(1, 2).flatten(2)
    # One unit in the last place of the half precisions; onnx's own bound for float32.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[output.dtype]
    torch.testing.assert_close(output, expected["Y"], rtol=tolerance, atol=tolerance)
    if "present_key" in expected:
        _, key, value, _, _ = _lowered(inputs, attributes)
        assert torch.equal(key, expected["present_key"])
        assert torch.equal(value, expected["present_value"])
    if "qk_matmul_output" in expected:
        scores = _scores(inputs, attributes, attributes.get("qk_matmul_output_mode", 0))
        torch.testing.assert_close(
            scores, expected["qk_matmul_output"], rtol=10 * tolerance, atol=10 * tolerance
        )


def test_all_cases_are_there():
    assert len(CASES) == 93
