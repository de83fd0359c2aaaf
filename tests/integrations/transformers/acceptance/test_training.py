"""Inside training: checkpoints, adapters, compilation, dropout, packed batches, weights."""

import pytest
import torch

# An argument was renamed in transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def gradients(model, given):
    model.zero_grad()
    model(**given, labels=given["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys() != set()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_gradient_checkpointing(use_reentrant, build, inputs, calls):
    given, _ = inputs("Mistral", "left")
    model = build("Mistral", "polyhead").train()
    expected = gradients(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls.clear()
    assert_same_gradients(gradients(model, given), expected)
    assert len(calls) >= 4  # each layer at least twice
    assert "window(before=3)" in repr(calls[-1]["mask"])


@pytest.mark.parametrize("name", ["Llama", "DeepseekV3", "T5"])
def test_training_mixed_precision(name, build, inputs, calls, assert_as_good_as_eager):
    """Under autocast a model rotates queries and keys in float32, and leaves values in bfloat16."""
    given, _ = inputs(name, "right")

    def logits_and_gradients(attention, dtype=torch.float32):
        model = build(name, attention, dtype).train(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = model(**given, use_cache=False).logits
        logits.double().pow(2).mean().backward()
        grads = [p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None]
        return logits[given["attention_mask"].bool()[:, : logits.shape[1]]], torch.cat(grads)

    exact = logits_and_gradients("eager", torch.float64)
    for ours, eager, true in zip(
        logits_and_gradients("polyhead"), logits_and_gradients("eager"), exact, strict=True
    ):
        assert_as_good_as_eager(ours, eager, true)
    assert calls


def test_training_lora(build, inputs, calls):
    # Right, since the loss counts padding too, and on the left the two differ there.
    peft = pytest.importorskip("peft")
    given, _ = inputs("Llama", "right")
    grads = []
    for attention in ("polyhead", "eager"):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0
        )
        grads.append(gradients(peft.get_peft_model(build("Llama", attention), config), given))
    assert_same_gradients(*grads)
    assert len(calls) == 2


def test_training_dropout_reaches_the_call(build, inputs, calls):
    given, _ = inputs("Llama", "no mask")
    model = build("Llama", "polyhead", attention_dropout=0.25)
    model.train()(**given)
    model.eval()(**given)
    assert [call["dropout"] for call in calls] == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_training_packed_documents_are_separate(name, build, calls):
    tokens = torch.randint(3, 31, (1, 9))
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model = build(name, "polyhead")
    with torch.no_grad():
        packed = model(tokens, position_ids=position, use_cache=False).logits
        alone = [model(part).logits for part in (tokens[:, :4], tokens[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert "documents" in repr(calls[0]["mask"])


# transformers 4 warns that the weights are not returned; they are.
AS_EVER = pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")


@AS_EVER
@pytest.mark.parametrize("name", ["GPT2", "Llama", "GptOss", "Bert"])
def test_training_output_attentions(name, build, inputs):
    given, real = inputs(name, "left")
    with torch.no_grad():
        ours, theirs = (
            build(name, attention)(**given, output_attentions=True).attentions
            for attention in ("polyhead", "eager")
        )
    assert len(ours) == len(theirs) == 2
    for mine, expected in zip(ours, theirs, strict=True):
        rows = real[:, None].expand(mine.shape[:3])
        torch.testing.assert_close(mine[rows], expected[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
# torch's own, when it traces the vmap of transformers 4's masks; so it does with "sdpa".
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("side", ["left", "no mask"])
def test_training_compiled(side, build, inputs):
    given, real = inputs("Llama", side)
    model = build("Llama", "polyhead")
    with torch.no_grad():
        expected = model(**given).logits
        got = torch.compile(model)(**given).logits
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_training_exported_at_every_length(name, build, inputs):
    given, real = inputs(name, "left")
    model = build(name, "polyhead")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, real):
            return self.model(tokens, attention_mask=real, use_cache=False).logits

    length = {1: torch.export.Dim("length", min=2, max=37)}
    example = given["input_ids"], given["attention_mask"]
    exported = torch.export.export(Logits(), example, dynamic_shapes=(length, length), strict=False)
    for T in (9, 5, 30):
        given, real = inputs(name, "right", T)
        got = exported.module()(given["input_ids"], given["attention_mask"])
        expected = model(**given).logits
        torch.testing.assert_close(got[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_compiled_generation(build, inputs):
    given, _ = inputs("Llama", "left")
    model = build("Llama", "polyhead")
    options = given | {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**options)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(**options, cache_implementation="static"), expected)


@AS_EVER
def test_training_weights_of_allowed_rows_sum_to_one(build, inputs):
    given, real = inputs("Llama", "left")
    with torch.no_grad():
        weights = build("Llama", "polyhead")(**given, output_attentions=True).attentions[0]
    sums = weights.sum(dim=-1)[:, 0]
    torch.testing.assert_close(sums, real.float())
