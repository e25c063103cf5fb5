"""The packed vocabulary: every text round-trips, kept tokens are made as before, ties hold."""

import copy
import json

import pytest
import torch
from bpe import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import RobertaConfig, RobertaForMaskedLM

from gatepack.vocab import (
    VocabPlan,
    most_frequent,
    pack_vocab,
    remap_ids,
    shrink_tokenizer,
    shrink_vocabulary,
    tokenizer_record,
    vocab_closure,
    vocab_pack,
)

TEXT = """the quick brown fox jumps over the lazy dog while another fox naps; then the dogs jump
over the other foxes, naïvely, and the brown dogs lie lazily in the browning grass 1234 5678."""


def trained(size=420):
    """Byte-level BPE with special tokens and a template that writes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    return tokenizer


FULL = trained()
RECORD = json.loads(FULL.to_str())


def packed_tokenizer(keep):
    keep = vocab_closure(RECORD, keep)
    return keep, Tokenizer.from_str(json.dumps(shrink_tokenizer(RECORD, keep)))


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.integers(0, FULL.get_vocab_size() - 1)),
    st.one_of(st.text(max_size=60), st.sampled_from(TEXT.split(";"))),
)
def test_every_text_round_trips_and_kept_tokens_are_made(keep, text):
    kept, packed = packed_tokenizer(keep)
    assert set(keep) <= set(kept) and packed.get_vocab_size() == len(kept)
    ids = packed.encode(text).ids
    assert packed.decode(ids) == text or "\ufffd" in FULL.decode(FULL.encode(text).ids)
    assert all(0 <= i < len(kept) for i in ids)
    assert (packed.id_to_token(ids[0]), packed.id_to_token(ids[-1])) == ("<s>", "</s>")
    for old in keep:
        token = FULL.id_to_token(old)
        assert packed.id_to_token(kept.index(old)) == token
        spelled = FULL.decode([old])
        if old > 2 and "\ufffd" not in spelled:
            alone = FULL.encode(spelled, add_special_tokens=False).ids
            if alone == [old]:
                again = packed.encode(spelled, add_special_tokens=False).ids
                assert again == [kept.index(old)]


def test_kept_text_keeps_its_tokens():
    """With all tokens of a text and of what their merges pass through, only the numbers change."""
    ids = FULL.encode(TEXT).ids
    kept, packed = packed_tokenizer(ids)
    assert len(kept) <= FULL.get_vocab_size()
    plan = VocabPlan(torch.tensor(kept), FULL.get_vocab_size())
    assert plan.remap(torch.tensor(ids)).tolist() == packed.encode(TEXT).ids
    batch = packed.encode_batch(["the fox", TEXT])
    assert batch[0].ids[-1] == packed.token_to_id("<pad>")


def test_byte_fallback_spells_what_is_dropped():
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "é"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True)
    record = json.loads(Tokenizer(model).to_str())
    kept = vocab_closure(record, [vocab["ab"]])
    assert [tokens[i] for i in kept if i > 257] == ["a", "b", "ab"] and 0 in kept and 1 not in kept
    packed = Tokenizer.from_str(json.dumps(shrink_tokenizer(record, kept)))
    assert packed.encode("abé").tokens == ["ab", "<0xC3>", "<0xA9>"]


def test_bytes_that_the_tokenizer_never_had_are_not_asked_for():
    record = copy.deepcopy(RECORD)
    for token in ("\u00c0", "\u00f1"):  # 0xC0 and 0xF1 in byte-level writing
        del record["model"]["vocab"][token]
    keep = vocab_closure(record, [300])
    assert set(keep) == set(vocab_closure(RECORD, [300])) - {
        RECORD["model"]["vocab"][token] for token in ("\u00c0", "\u00f1")
    }
    packed = Tokenizer.from_str(json.dumps(shrink_tokenizer(record, keep)))
    assert packed.decode(packed.encode("na\u00efve fox").ids) == "na\u00efve fox"


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="expected one with a token for each byte"):
        vocab_closure({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, [0])
    with pytest.raises(ValueError, match="expected a BPE model, got 'WordPiece'"):
        vocab_closure({"model": {"type": "WordPiece"}}, [])
    with pytest.raises(ValueError, match=r"keep: expected ids of the tokenizer, got \[99999\]"):
        vocab_closure(RECORD, [99999])
    with pytest.raises(ValueError, match=r"size: expected at least \d+, for bytes and added"):
        most_frequent(RECORD, torch.ones(FULL.get_vocab_size()), 100)
    with pytest.raises(ValueError, match="tokenizer: expected a fast one"):
        tokenizer_record(object())
    with pytest.raises(ValueError, match="expected what vocab_closure returns"):
        shrink_tokenizer(RECORD, [5])
    for keep in ([3, 1], [1, 9], [-1]):
        with pytest.raises(ValueError, match=r"keep: expected strictly increasing ids in \[0, 9\)"):
            VocabPlan(torch.tensor(keep), 9)
    plan = VocabPlan(torch.tensor([1, 4]), 9)
    with pytest.raises(ValueError, match="got 3 at position 2, which table drops"):
        plan.remap(torch.tensor([4, 1, 3]))
    with pytest.raises(ValueError, match=r"logits: expected \[..., 2\], got \[3, 9\]"):
        plan.full_logits(torch.ones(3, 9))


@pytest.mark.parametrize("tied", (False, True))
def test_rows_are_packed_once_where_tied(tied):
    embedding = torch.randn(30, 8).to(torch.bfloat16)
    head = embedding if tied else torch.randn(30, 8).to(torch.bfloat16)
    bias, keep = torch.randn(30), torch.tensor([0, 7, 8, 29])
    small, small_head, small_bias = vocab_pack(embedding, head, keep, bias)
    assert torch.equal(small, embedding[keep]) and torch.equal(small_head, head[keep])
    assert torch.equal(small_bias, bias[keep])
    assert (small.data_ptr() == small_head.data_ptr()) == tied
    assert vocab_pack(embedding, None, keep)[1:] == (None, None)


def test_packed_logits_are_the_full_ones_where_kept():
    embedding, x = torch.randn(30, 8), torch.randn(2, 5, 8)
    plan = VocabPlan(torch.tensor([0, 7, 8, 29]), 30)
    small, _, _ = vocab_pack(embedding, None, plan.keep)
    logits = plan.full_logits(x @ small.t())
    kept = torch.zeros(30, dtype=torch.bool)
    kept[plan.keep] = True
    torch.testing.assert_close(logits[..., kept], (x @ embedding.t())[..., kept])
    assert (logits[..., ~kept] == -torch.inf).all()
    assert remap_ids(torch.tensor([[29, 0]]), plan.table()).tolist() == [[3, 0]]


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("family", ("llama", "qwen2", "gemma2", "gpt2", "opt"))
def test_a_packed_model_computes_and_reloads(family, tied, tmp_path):
    model = tiny_model(family, torch.float64, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)  # what Gemma scales embeddings by is rounded as it loads
    model = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    size = model.config.vocab_size
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 5, [7, 9], 2
    ids = torch.tensor([[5, 8, 11, 9]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(ValueError, match=r"the config's eos_token_id \[7, 9\] among them"):
        pack_vocab(model, [5, 7])
    plan = pack_vocab(model, [5, 7, 8, 9, 11, 2])
    assert model.config.vocab_size == 6 and plan.size == size
    assert model.generation_config.eos_token_id == [2, 4]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        logits = model(input_ids=plan.remap(ids)).logits
    full = plan.full_logits(logits)
    # A matmul of another shape adds in another order.
    torch.testing.assert_close(full[..., plan.keep], expected[..., plan.keep], rtol=0, atol=1e-13)
    assert int((full == -torch.inf).sum()) == (size - 6) * 4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=plan.remap(ids)).logits, logits)


@pytest.mark.parametrize(
    "settings, found",
    (
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
        ({"target_modules": ["lm_head"]}, "Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
    ),
)
def test_adapters_on_the_vocabulary_are_merged_first(settings, found):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **settings)
    model = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"its vocabulary is in a {found}, .* merge adapters"):
        pack_vocab(model, [1, 2, 4, 6])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model = model.merge_and_unload()
    pack_vocab(model, [1, 2, 4, 6])
    assert model.config.vocab_size == 4


def test_token_ids_in_configs_follow():
    model = tiny_model("llama", torch.float32)
    config, generation = model.config, model.generation_config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 2, 4, -1
    config.sep_token_id = config.mask_token_id = 8
    generation.bos_token_id, generation.eos_token_id = 2, [4]
    generation.forced_bos_token_id, generation.forced_eos_token_id = 6, [4, 8]
    generation.suppress_tokens, generation.begin_suppress_tokens = [6, 7, 8], [7]
    generation.bad_words_ids = [[6], [6, 7], [8, 6]]
    generation.sequence_bias = {(4, 6): -1.0, (7,): 2.0}
    with pytest.raises(ValueError, match=r"the config's sep_token_id 8 among them"):
        pack_vocab(model, [2, 4, 6])
    with pytest.raises(ValueError, match=r"the config's forced_bos_token_id 6 among them"):
        pack_vocab(model, [2, 4, 8])
    assert config.bos_token_id == 2 and generation.suppress_tokens == [6, 7, 8]
    pack_vocab(model, [2, 4, 6, 8])
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, -1)
    assert config.sep_token_id == config.mask_token_id == 3
    assert (generation.bos_token_id, generation.eos_token_id) == (0, [1])
    assert (generation.forced_bos_token_id, generation.forced_eos_token_id) == (2, [1, 3])
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([2, 3], None)
    assert generation.bad_words_ids == [[2], [3, 2]]
    assert generation.sequence_bias == [[[1, 2], -1.0]]


def test_a_bias_with_two_names_is_packed_once(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = RobertaConfig(num_hidden_layers=1, vocab_size=30, **sizes)
    model = RobertaForMaskedLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
        ids = torch.tensor([[0, 4, 6, 2]])
        expected = model(input_ids=ids).logits
        plan = pack_vocab(model, [1, *range(0, 30, 2)])
        assert model.lm_head.bias is model.lm_head.decoder.bias
        logits = model(input_ids=plan.remap(ids)).logits
        torch.testing.assert_close(logits, expected[..., plan.keep])
        model.save_pretrained(tmp_path)
        again = RobertaForMaskedLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=plan.remap(ids)).logits, logits)


def test_a_packed_tokenizer_keeps_its_settings():
    model = tiny_model("llama", torch.float32, vocab_size=300, bos_token_id=0, eos_token_id=0)
    tokenizer = byte_tokenizer(("t", "h"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"], "pad_token": "<pad>"})
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.model_max_length = 12
    plan, small = shrink_vocabulary(model, tokenizer, [])
    assert len(small) == plan.keep.numel() < len(tokenizer)
    for name in (
        "truncation_side",
        "padding_side",
        "model_input_names",
        "model_max_length",
        "clean_up_tokenization_spaces",
        "special_tokens_map",
        "all_special_tokens",
    ):
        assert getattr(small, name) == getattr(tokenizer, name), name
    ids = small("the <tool> is").input_ids
    assert small.decode(ids, skip_special_tokens=True) == "the  is"
