"""Token provenance of a layer's queries and keys: established, never inferred from lengths."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph

T = 12
TEXT = torch.randint(3, 31, (T,), generator=torch.Generator().manual_seed(1))
OTHER = torch.tensor([3, 7, 8] * 4)
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 37,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "image_size": 8,
    "patch_size": 4,
}
BY_POSITION = {"mean_distance", "mass_previous", "mass_self", "mass_recent"}
BY_TOKEN = {"mass_same_token", "mass_induction"}


def of_transformers(name, **options):
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    torch.manual_seed(0)
    family = name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{family.removesuffix('Model')}Config")(**options)
    return getattr(transformers, name)(config).eval()


def t5():
    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 4, "d_ff": 29, "num_layers": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return of_transformers("T5ForConditionalGeneration", **sizes, num_heads=6, **ids)


def llama(**options):
    return of_transformers("LlamaForCausalLM", **(SIZES | options))


def ids_of(layer):
    both = (layer.query_ids, layer.key_ids)
    return tuple(None if ids is None else ids.tolist() for ids in both)


def same_token(weights, ids):
    """Mean weight on earlier keys of the query's token, over queries that have some, (H,)."""
    same = (ids[:, None] == ids).tril(-1)
    return (weights * same).sum(-1)[:, same.any(-1)].mean(-1)


def test_sources_decoder_of_equal_length_has_own_ids():
    """bertviz#133: the text of a layer cannot be inferred from its length."""
    model = t5()
    with torch.no_grad():
        given = {"decoder_input_ids": OTHER[None], "output_attentions": True}
        model.set_attn_implementation("eager")
        theirs = model(TEXT[None], **given)
    report = ph.look.capture(model, TEXT, decoder_input_ids=OTHER[None])
    text, other = TEXT.tolist(), OTHER.tolist()
    assert [ids_of(layer) for layer in report.layers] == (
        [(text, text)] * 2 + [(other, other), (other, text)] * 2
    )
    assert [layer.is_self for layer in report.layers] == [True, True, True, False, True, False]
    assert [layer.is_input for layer in report.layers] == [True, True, *(False,) * 4]
    read_by_itself = (*report.layers[:3], report.layers[4])
    weights = (*theirs.encoder_attentions, *theirs.decoder_attentions)
    for layer, of_layer, ids in zip(
        read_by_itself, weights, [TEXT, TEXT, OTHER, OTHER], strict=True
    ):
        want = same_token(of_layer[0], ids)
        assert want.min() > 0.0
        torch.testing.assert_close(layer.stats["mass_same_token"], want)
    for layer in report.layers[3::2]:
        assert not layer.stats.keys() & (BY_POSITION | BY_TOKEN)
        assert {"entropy", "mass_first", "contribution"} <= layer.stats.keys()
    names = {row["layer"]: row["name"] for row in report.rows()}
    assert [names[index] is None for index in range(6)] == [not x.is_self for x in report.layers]


def test_page_shows_only_layers_of_its_own_tokens():
    from polyhead.look.page import payload
    from polyhead.viewer.highlights import highlights

    report = ph.look.capture(t5(), TEXT, decoder_input_ids=OTHER[None])
    data = payload(report)
    assert data["left_out"] == [layer.name for layer in report.layers[2:]]
    assert {layer for layer, _ in data["heads"]} == {0, 1}
    for head in highlights(report, 36):
        assert head.example is None or head.layer < 2


def test_sources_finds_decoder_ids_shifted_from_labels():
    report = ph.look.capture(t5(), TEXT, labels=OTHER[None])
    shifted = [0, *OTHER.tolist()[:-1]]
    assert ids_of(report.layers[2]) == (shifted, shifted)
    assert ids_of(report.layers[3]) == (shifted, TEXT.tolist())


def test_sources_same_text_twice_keeps_cross_attention():
    report = ph.look.capture(t5(), OTHER, decoder_input_ids=OTHER[None])
    assert [layer.is_self for layer in report.layers] == [True, True, True, False, True, False]


def test_sources_image_of_equal_length_has_no_ids():
    text = SIZES | {"num_hidden_layers": 1}
    model = of_transformers("CLIPModel", text_config=text, vision_config=VISION)
    report = ph.look.capture(model, TEXT[:5], pixel_values=torch.randn(1, 3, 8, 8))
    read, seen = report.layers
    assert ids_of(read) == (TEXT[:5].tolist(),) * 2
    assert (seen.map.shape[1], seen.is_self, seen.is_input, ids_of(seen)) == (
        *(5, True, False),
        (None, None),
    )
    assert not seen.stats.keys() & BY_TOKEN
    assert seen.stats.keys() >= BY_POSITION


def test_sources_image_placeholder_tokens_are_no_text():
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 24}
    text = {**SIZES, "model_type": "llama"}
    model = of_transformers(
        "LlavaForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        image_token_id=30,
        image_token_index=30,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    ids = TEXT.masked_fill(TEXT == 30, 29)
    written = [layer for layer in ph.look.capture(model, ids).layers if "language" in layer.name]
    assert [ids_of(layer)[0] for layer in written] == [ids.tolist()] * 2
    ids = torch.cat([ids[:3], torch.full((4,), 30), ids[3:8]])
    report = ph.look.capture(model, ids, pixel_values=torch.randn(1, 3, 8, 8))
    for layer in report.layers:
        assert ids_of(layer) == (None, None)
        assert not layer.is_input
        assert not layer.stats.keys() & BY_TOKEN
    assert [layer.is_self for layer in report.layers] == [True] * 3


@pytest.mark.parametrize("with_gradient", [True, False])
def test_sources_cached_keys_are_not_of_the_text(with_gradient):
    transformers = pytest.importorskip("transformers")
    model, past = llama(), transformers.DynamicCache()
    with torch.set_grad_enabled(with_gradient):
        model(TEXT[None, :4], past_key_values=past)
    report = ph.look.capture(model, OTHER, past_key_values=past)
    assert past.get_seq_length() == 4 + T  # of one forward
    for layer in report.layers:
        assert ids_of(layer) == (OTHER.tolist(), None)
        assert (layer.is_self, layer.is_input) == (True, False)
        assert layer.map.shape[1:] == (T, 4 + T)
        assert not layer.stats.keys() & BY_TOKEN


def test_sources_memory_of_equal_length_is_another_text():
    torch.manual_seed(0)
    mha = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2, mask=None)
    x, memory = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    (crossed,) = ph.look.capture(mha, x, memory=memory).layers
    assert not crossed.is_self
    assert not crossed.stats.keys() & BY_POSITION
    (own,) = ph.look.capture(mha, x).layers
    assert own.is_self
    assert own.is_input
    assert own.stats.keys() >= BY_POSITION


class Latents(torch.nn.Module):
    """Latents, one per token, that attend to the text and then to each other."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(31, 8)
        self.latents = torch.nn.Parameter(torch.randn(1, T, 8))
        self.read = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2, mask=None)
        self.think = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2, mask=None)

    def forward(self, ids):
        x = self.latents + self.read(self.latents, memory=self.embed(ids))
        return x + self.think(x)


def test_sources_latents_of_equal_length_have_no_ids():
    torch.manual_seed(0)
    read, think = ph.look.capture(Latents(), TEXT).layers
    assert (read.is_self, think.is_self) == (False, True)
    assert ids_of(read) == (None, TEXT.tolist())
    assert ids_of(think) == (None, None)
    assert not think.is_input


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_found_in_every_mode(dtype, training):
    model = llama(attention_dropout=0.1).to(dtype).train(training)
    report = ph.look.capture(model, TEXT)
    assert [ids_of(layer) for layer in report.layers] == [(TEXT.tolist(),) * 2] * 2
    assert all(layer.is_input for layer in report.layers)


def test_sources_finds_unregistered_embeddings_by_ids():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(31, 8))
            self.attend = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2)

        def forward(self, ids):
            return self.attend(self.weight[ids])

    torch.manual_seed(0)
    (layer,) = ph.look.capture(Own(), TEXT).layers
    assert ids_of(layer) == (TEXT.tolist(),) * 2


def test_sources_skips_linear_attention_blocks():
    """Linear attention mixes tokens as well; blocks with nothing else are skipped."""
    sizes = {
        **SIZES,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    (layer,) = ph.look.capture(of_transformers("Qwen3NextForCausalLM", **sizes), TEXT).layers
    assert ids_of(layer) == (TEXT.tolist(),) * 2


def test_capture_offloaded_layers_same_contribution():
    """TransformerLens#1615: offloaded weights are read in place."""
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    want = ph.look.capture(model, TEXT)
    got = ph.look.capture(accelerate.cpu_offload(model), TEXT)
    for a, b in zip(want.layers, got.layers, strict=True):
        assert a.stats.keys() == b.stats.keys()
        assert a.stats["contribution"].min() > 0.0
        for name in a.stats:
            torch.testing.assert_close(b.stats[name], a.stats[name])
        assert ids_of(b) == ids_of(a)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_capture_adapters_have_no_contribution():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    for layer in ph.look.capture(model, TEXT).layers:
        assert "contribution" not in layer.stats
        assert ids_of(layer) == (TEXT.tolist(),) * 2
    for layer in ph.look.capture(model.merge_and_unload(), TEXT).layers:
        assert layer.stats["contribution"].min() > 0.0


def test_sources_are_saved_with_the_report(tmp_path):
    pytest.importorskip("safetensors")
    report = ph.look.capture(t5(), TEXT, decoder_input_ids=OTHER[None])
    report.save(tmp_path / "report.safetensors")
    again = ph.look.HeadReport.load(tmp_path / "report.safetensors")
    for a, b in zip(report.layers, again.layers, strict=True):
        assert (a.is_self, a.is_input, ids_of(a)) == (b.is_self, b.is_input, ids_of(b))
