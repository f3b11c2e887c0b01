"""The umT5 text encoder in both namings, and its tokenizer from every place it may be."""

import io

import pytest
import sentencepiece
import torch
from transformers import UMT5Config, UMT5EncoderModel

from t3.errors import T3Error
from t3.weights import identify, load_text_encoder, open_weights
from t3.weights.tokenizer import tokenizer_from_sentencepiece
from tests.weights_fixtures import (
    one_thread,  # noqa: F401
    randomise,
    save,
    write_header,
)

SIZES = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
ORIGINAL = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
TEXTS = [
    "a red fox runs",
    "  two   spaces\tand a tab ",
    "Unseen: žluťoučký 狐 🦊!",
    "",
    "fox",
    "ﬁne ½ Ⅷ",
    "line\nbreak, 3.5 mm",
]


@pytest.fixture(scope="module")
def spiece():
    """Serialized SentencePiece models trained on a few lines; umT5 has byte fallback and its unknown token at id 3."""
    lines = [
        f"the {a} {b} runs over the {c} bridge" for a in ("red", "blue", "old") for b in ("fox", "cat") for c in "xyz"
    ]
    made = {}
    for name, more in {
        "umt5": {"bos_id": 2, "unk_id": 3, "byte_fallback": True},
        "t5": {"bos_id": -1, "unk_id": 2},
        "bare": {"bos_id": 2, "unk_id": 3},
    }.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 5),
            model_writer=model,
            model_type="unigram",
            vocab_size=320 if name == "umt5" else 50,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            pad_piece="<pad>",
            minloglevel=2,
            **more,
        )
        made[name] = model.getvalue()
    return made


@pytest.fixture(scope="module")
def library():
    return randomise(UMT5EncoderModel(UMT5Config(**SIZES)), scale=0.3)


def original_names(state):
    out = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for i in range(SIZES["num_layers"]):
        for theirs, ours in ORIGINAL.items():
            out[f"blocks.{i}.{ours}.weight"] = state[f"encoder.block.{i}.{theirs}.weight"]
    return out


def spell(naming, library, spiece):
    state = {key: value for key, value in library.state_dict().items() if key != "encoder.embed_tokens.weight"}
    if naming == "original":
        return original_names(state)
    if naming == "comfyui":
        embedded = torch.frombuffer(bytearray(spiece["umt5"]), dtype=torch.uint8)
        return {**state, "spiece_model": embedded, "encoder.embed_tokens.weight": state["shared.weight"]}
    return state


@pytest.mark.parametrize("naming", ["original", "huggingface", "comfyui"])
def test_every_naming_gives_the_same_encoder(tmp_path, naming, library, spiece):
    path = save(tmp_path / "t.safetensors", spell(naming, library, spiece))
    if naming != "comfyui":
        (tmp_path / "spiece.model").write_bytes(spiece["umt5"])
    found = identify(open_weights(path))
    assert (found.component, found.form, found.model, found.problem) == ("text-encoder", "full", "custom", None)
    assert found.dialect == ("original" if naming == "original" else "huggingface") and not found.refused
    model, tokenizer = load_text_encoder(path, dtype=torch.float32)
    assert not model.training and model.encoder.embed_tokens.weight is model.shared.weight
    batch = tokenizer(TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    with torch.no_grad():
        want = library(batch.input_ids, batch.attention_mask).last_hidden_state
        got = model(batch.input_ids, batch.attention_mask).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_equals_from_pretrained(tmp_path, dtype, library, spiece):
    library.save_pretrained(tmp_path / "library")
    (tmp_path / "library" / "spiece.model").write_bytes(spiece["umt5"])
    theirs = UMT5EncoderModel.from_pretrained(tmp_path / "library", dtype=dtype)
    path = save(tmp_path / "t.safetensors", spell("comfyui", library, spiece))
    for model in (load_text_encoder(p, dtype=dtype)[0] for p in (path, tmp_path / "library")):
        mine = dict(model.named_parameters())
        for name, parameter in theirs.named_parameters():
            assert mine[name].dtype == parameter.dtype and torch.equal(mine[name], parameter), name
        ids = torch.arange(8)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["umt5", "t5", "bare"])
def test_tokenizer_gives_the_ids_of_sentencepiece(kind, spiece):
    want = sentencepiece.SentencePieceProcessor(model_proto=spiece[kind])
    tokenizer = tokenizer_from_sentencepiece(spiece[kind], "test")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.unk_token_id == want.unk_id() == {"umt5": 3, "t5": 2, "bare": 3}[kind]
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*want.encode(text), 1], text
    assert tokenizer.decode(tokenizer("a red fox").input_ids, skip_special_tokens=True) == want.decode(
        want.encode("a red fox")
    )


@pytest.mark.parametrize("place", ["file", "folder", "json", "diffusers layout"])
def test_where_a_tokenizer_may_be(tmp_path, place, library, spiece):
    weights = tmp_path / "text_encoder"
    weights.mkdir()
    path = save(weights / "t.safetensors", spell("original", library, spiece))
    other = tmp_path / ("tokenizer" if place == "diffusers layout" else "elsewhere")
    other.mkdir()
    (other / "spiece.model").write_bytes(spiece["umt5"])
    made = tokenizer_from_sentencepiece(spiece["umt5"], "test")
    explicit = {"file": other / "spiece.model", "folder": other, "json": other / "tokenizer.json"}.get(place)
    if place == "json":
        made.backend_tokenizer.save(str(other / "tokenizer.json"))
    tokenizer = load_text_encoder(path, dtype=torch.float32, tokenizer=explicit)[1]
    assert tokenizer(TEXTS).input_ids == made(TEXTS).input_ids


def test_no_tokenizer(tmp_path, library, spiece):
    path = save(tmp_path / "t.safetensors", spell("original", library, spiece))
    with pytest.raises(T3Error, match="--tokenizer FOLDER"):
        load_text_encoder(path, dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(T3Error, match="holds neither"):
        load_text_encoder(path, dtype=torch.float32, tokenizer=tmp_path / "empty")
    with pytest.raises(T3Error, match="does not exist"):
        load_text_encoder(path, dtype=torch.float32, tokenizer=tmp_path / "missing")
    (tmp_path / "bad.model").write_bytes(b"\xff\xff\xff not one")
    with pytest.raises(T3Error, match="no SentencePiece model"):
        load_text_encoder(path, dtype=torch.float32, tokenizer=tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(T3Error, match=r"no tokenizer\.json"):
        load_text_encoder(path, dtype=torch.float32, tokenizer=tmp_path / "tokenizer.json")


def test_a_tokenizer_of_a_larger_model(tmp_path, library, spiece):
    state = spell("original", library, spiece)
    state["token_embedding.weight"] = state["token_embedding.weight"][:100]
    path = save(tmp_path / "t.safetensors", state)
    (tmp_path / "spiece.model").write_bytes(spiece["umt5"])
    with pytest.raises(T3Error, match="do not belong together"):
        load_text_encoder(path, dtype=torch.float32)


def test_t5_is_not_umt5(tmp_path, library, spiece):
    shapes = {key: tuple(value.shape) for key, value in spell("huggingface", library, spiece).items()}
    shapes.pop("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")
    path = write_header(tmp_path / "t.safetensors", shapes)
    with pytest.raises(T3Error, match="Wan needs umT5"):
        load_text_encoder(path, dtype=torch.float32)
