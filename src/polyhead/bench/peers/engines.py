"""Inference engines as peers, where they are installed: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers.attention import Peer, Results, Run, scores_reasons

__all__ = ["ONNX_RUNTIME", "OPENVINO"]


def _onnx_reasons(case: Case) -> list[str]:
    reasons = _missing("onnx", "onnxruntime") + _inference_reasons(case)
    # It materializes the scores twice.
    reasons += scores_reasons(case, 8)
    if case.dtype != torch.float32:
        reasons.append(f"its fused attention is float32 only on CPU; got {case.dtype_name}")
    return reasons


def _prepare_onnx(case: Case, inputs: Inputs) -> Run:
    """`com.microsoft.MultiHeadAttention`: its fastest on CPU, in the layout (B, T, H * D)."""
    from onnx import TensorProto, helper

    onnxruntime: Any = importlib.import_module("onnxruntime")

    names = ("query", "key", "value")
    unidirectional = int(case.mask is not None)
    node = helper.make_node(
        "MultiHeadAttention",
        names,
        ["output"],
        domain="com.microsoft",
        num_heads=case.H,
        unidirectional=unidirectional,
    )

    def declared(name: str, tokens: int) -> Any:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [case.B, tokens, case.H * case.D]
        )

    model = helper.make_model(
        helper.make_graph(
            [node],
            "attention",
            [declared("query", case.T), declared("key", case.S), declared("value", case.S)],
            [declared("output", case.T)],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Otherwise its threads would keep spinning while the next peer is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {name: inputs[name].transpose(1, 2).flatten(2).numpy() for name in names}

    def run() -> Results:
        merged = torch.from_numpy(session.run(None, feed)[0])
        return {"output": merged.unflatten(2, (case.H, case.D)).transpose(1, 2)}

    return run


def _openvino_reasons(case: Case) -> list[str]:
    return _missing("openvino") + _inference_reasons(case)


def _prepare_openvino(case: Case, inputs: Inputs) -> Run:
    """One `ScaledDotProductAttention`, computed in the case's own dtype."""
    openvino: Any = importlib.import_module("openvino")
    opset13: Any = importlib.import_module("openvino.opset13")

    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
    kind = getattr(openvino.Type, name)
    names = ("query", "key", "value")
    parameters = [opset13.parameter(list(inputs[n].shape), kind, name=n) for n in names]
    output = opset13.scaled_dot_product_attention(*parameters, causal=case.mask is not None)
    compiled = openvino.Core().compile_model(
        openvino.Model([output], parameters, "attention"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": name,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    # numpy has no bfloat16: the bits are passed as 16-bit integers.
    bits = torch.int16 if case.dtype == torch.bfloat16 else case.dtype

    def shared(tensor: Tensor) -> Any:
        return openvino.Tensor(tensor.view(bits).numpy(), list(tensor.shape), kind)

    # The request reads and writes this memory without owning it; `run` keeps it alive.
    tensors = [inputs[n] for n in names]
    output_bhte = torch.empty(case.B, case.H, case.T, case.D, dtype=case.dtype)
    for i, tensor in enumerate(tensors):
        request.set_input_tensor(i, shared(tensor))
    request.set_output_tensor(0, shared(output_bhte))

    def run(kept: list[Tensor] = tensors) -> Results:
        request.infer()
        return {"output": output_bhte}

    return run


def _missing(*packages: str) -> list[str]:
    return [
        f"{name} is not installed" for name in packages if importlib.util.find_spec(name) is None
    ]


def _inference_reasons(case: Case) -> list[str]:
    reasons = []
    if case.train:
        reasons.append("computes no gradients")
    if case.dropout:
        reasons.append("has no dropout")
    if case.window is not None:
        reasons.append("has no window")
    if case.G != case.H:
        reasons.append(f"measured with one KV head per query head; got H = {case.H}, G = {case.G}")
    if case.T != case.S:
        reasons.append(f"measured on whole prompts; got T = {case.T}, S = {case.S}")
    return reasons


ONNX_RUNTIME = Peer("ONNX Runtime", _onnx_reasons, _prepare_onnx)
OPENVINO = Peer("OpenVINO", _openvino_reasons, _prepare_openvino)
