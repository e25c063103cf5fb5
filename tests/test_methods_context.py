"""Contextual pruning: its statistics, its rules, and the whole run on a split text."""

import copy
import dataclasses
import functools

import pytest
import torch
from letters import letter_tokenizer
from tiny import fused_row, tiny_model, token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import gatepack as gp
from gatepack.data import to_windows
from gatepack.layers import layers_of
from gatepack.methods import ContextPruning, context_pruning
from gatepack.methods.context_pruning import split_text, token_counts
from gatepack.methods.context_statistics import context_statistics
from gatepack.modules import weight_matrix
from gatepack.training import TrainConfig

GATES = gp.GateConfig(noise=0.0, target=0.7, width_multiple=1, equal_layers=False)
FAMILIES = [
    "llama",
    "qwen2",
    "gemma2",
    "glm",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "bert",
    "modernbert",
]
TRAIN = TrainConfig(
    steps=4, batch_size=2, window=16, lora_rank=2, calibration_batches=2, learning_rate=1e-2
)


def value_rows(layer, kv_head: int) -> list[int]:
    """Rows of the linear that makes values, of one key/value head."""
    first = kv_head * layer.head_dim
    if layer.family.qkv:
        first = fused_row(layer, 2, kv_head * (layer.queries // layer.kv_heads), 0)
    return list(range(first, first + layer.head_dim))


def make_quiet(model, channels=(2, 7), kv_head: int = 1) -> None:
    """Silences channels and the value rows of a key/value head in every layer."""
    with torch.no_grad():
        for layer in layers_of(model):
            for path in layer.family.up[:1]:
                weight_matrix(layer.linear(path))[list(channels)] = 0
            values = weight_matrix(layer.linear(layer.family.qkv or layer.family.kv[1]))
            values[value_rows(layer, kv_head)] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_means_over_all_tokens(family):
    model = tiny_model(family).eval()
    seen: dict[str, list] = {}
    linears = {
        f"{layer.name}.{path}": layer.linear(path)
        for layer in layers_of(model)
        for path in layer.family.linears
    }
    handles = [
        linear.register_forward_hook(
            lambda module, args, y, name=name: seen.setdefault(name, []).append(
                (args[0].detach().flatten(0, -2), y.detach().flatten(0, -2))
            )
        )
        for name, linear in linears.items()
    ]
    batches = [token_ids(batch=3), token_ids(batch=2, length=5, seed=4)]
    for ids in batches:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    gates = gp.attach(model, GATES)
    found = context_statistics(gates, batches)
    assert found.inputs.keys() == linears.keys()
    for name, linear in linears.items():
        x, y = (torch.cat(part) for part in zip(*seen[name], strict=True))
        torch.testing.assert_close(found.inputs[name], x.abs().mean(0))
        torch.testing.assert_close(found.outputs[name], y.abs().mean(0))
        bias = 0 if linear.bias is None else linear.bias.detach()
        torch.testing.assert_close(found.centred[name], (y - bias).abs().mean(0))
    for name, reader in found.readers.items():
        x = torch.cat([x for x, _ in seen[reader]])
        torch.testing.assert_close(found.means[name], x.mean(0))
    branches = [name for name in gates if name.endswith(":channels")] * (family in FAMILIES[:3])
    assert sorted(found.branch) == sorted(branches)
    for name in branches:
        gate_proj = name.removesuffix(":channels") + ".gate_proj"
        a = torch.cat([y for _, y in seen[gate_proj]])
        expected = tiny_model(family).model.layers[0].mlp.act_fn(a).abs().mean(0)
        torch.testing.assert_close(found.branch[name], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_quiet_units_go_and_change_nothing(family):
    # SiLU (Llama), GELU (GPT-2, BERT) and ReLU (OPT) alike; a frozen output leaves its constant.
    model = tiny_model(family, torch.float32).eval()
    make_quiet(model)
    compensate = family not in ("qwen2", "gemma2", "glm", "phi3", "modernbert")
    if not compensate:  # v may have a bias, and o_proj none that could take its mean over
        with torch.no_grad():
            for layer in layers_of(model):
                bias = layer.linear(layer.family.qkv or layer.family.kv[1]).bias
                if bias is not None:
                    bias.zero_()
    ids = token_ids(batch=4, length=12)
    expected = model(ids).logits.detach()
    first = layers_of(model)[0]
    heads = first.queries - first.queries // first.kv_heads
    tau = {"tau_linear": 1e-6, "tau_activation": 1e-6}
    report = ContextPruning(gates=GATES, compensate=compensate, **tau).prune(model, [ids])
    for _, kind, _, kept in report.rows:
        # A ReLU may leave one more channel without a token that opens it.
        assert kept == heads if kind == "heads" else 36 <= kept <= 38
    scale = float(expected.abs().max())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4 * scale)


def test_unit_that_is_quiet_in_the_first_text_only_stays():
    model = tiny_model("opt", torch.float32).eval()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.linear("fc1").bias[4] = -1e4
    ids = token_ids(batch=2, length=12)
    method = ContextPruning(gates=GATES, tau_linear=1e-6, tau_activation=1e-6)
    gates = gp.attach(model, GATES)
    name = next(name for name in gates if name.endswith("0:channels"))
    assert not method.quiet(model, [ids]).open[name][4]

    def wake(module, args, output):
        output.view(2, 12, -1)[1:, :, 4] = 1.0

    layers_of(model)[0].linear("fc1").register_forward_hook(wake)
    assert method.quiet(model, [ids]).open[name][4]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 12, [0] * 12])}
    assert not method.quiet(model, [padded]).open[name][4]


def test_quiet_counts_what_no_unit_covers():
    model = tiny_model("llama", torch.float32).eval()
    make_quiet(model)
    with torch.no_grad():
        layers_of(model)[0].linear("self_attn.q_proj").weight[5] = 0
        layers_of(model)[0].linear("mlp.down_proj").weight[11] = 0
    gp.attach(model, GATES)
    method = ContextPruning(tau_linear=1e-6, tau_activation=1e-6)
    found = method.quiet(model, [token_ids()])
    # Per layer 2 rows of gate_proj and 8 of v_proj; 2 columns of down_proj and 24 of o_proj.
    assert (found.rows, found.columns) == (2 * 10 + 2, 2 * 26)
    assert found.beyond_units == 2


def test_budget_meets_the_target_and_compensation_helps():
    fresh = token_ids(batch=8, length=12, seed=99)
    calibration = [token_ids(batch=8, length=12, seed=seed) for seed in range(4)]
    errors = {}
    for compensate in (False, True):
        model = tiny_model("gpt2", torch.float32).eval()
        expected = model(fresh).logits
        method = ContextPruning(gates=GATES, rule="budget", compensate=compensate)
        report = method.prune(model, calibration)
        assert abs(report.kept_fraction - 0.7) <= 0.005
        errors[compensate] = (model(fresh).logits - expected).square().mean().item()
    assert errors[True] < errors[False]


def test_budget_is_one_threshold_on_the_mean():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, dataclasses.replace(GATES, units=("channels",)))
    method = ContextPruning(rule="budget")
    ids = [token_ids()]
    metric = method.metric(model, ids)
    statistics = context_statistics(gates, ids)
    for name, value in metric.items():
        torch.testing.assert_close(value, statistics.inputs[statistics.readers[name]].float())
    masks = gates.plan(method.score(model, ids)).masks
    kept = torch.cat([metric[name][mask] for name, mask in masks.items()])
    gone = torch.cat([metric[name][~mask] for name, mask in masks.items()])
    assert gone.max() <= kept.min()


def make_rows_quieter_than_what_is_read(model) -> None:
    """Ten rows of the first branch get ever smaller; a bias or the other branch makes up for it.
    The values of key/value head 0 become small, not 0."""
    with torch.no_grad():
        for layer in layers_of(model):
            family, width = layer.family, weight_matrix(layer.linear(layer.family.down)).shape[1]
            values = weight_matrix(layer.linear(family.qkv or family.kv[1]))
            values[value_rows(layer, 0)] *= 0.01
            first, last = layer.linear(family.up[0]), layer.linear(family.up[-1])
            for step in range(10):
                weight_matrix(first)[11 + step] *= 0.5**step
                if family.branches == 1:
                    first.bias[11 + step] = 2.0
                else:
                    offset = family.branch_offsets(width)[-1]
                    weight_matrix(last)[offset + 11 + step] *= 8 * 2.0**step


def mean_of(rows) -> list[float]:
    """Mean of |v| of each column of [T, C]."""
    return [sum(abs(v) for v in column) / len(column) for column in rows.t().tolist()]


def literal_thresholds(model, ids, tau_linear: float, tau_activation: float):
    """Gate name -> whether each unit stays, by the published rule for single rows and columns."""
    found = {}
    for layer in layers_of(model):
        family, x, y, centred = layer.family, {}, {}, {}

        def note(module, args, output, path=None, to=(x, y, centred)):
            bias = 0.0 if module.bias is None else module.bias.detach()
            flat = output.detach().flatten(0, -2)
            values = (args[0].detach().flatten(0, -2), flat, flat - bias)
            for store, each in zip(to, values, strict=True):
                store[path] = mean_of(each)

        handles = [
            layer.linear(path).register_forward_hook(functools.partial(note, path=path))
            for path in family.linears
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        lanes, ratio = layer.queries * layer.head_dim, layer.queries // layer.kv_heads
        value = family.qkv or family.kv[1]
        stays = []
        for lane in range(lanes):
            head, within = divmod(lane, layer.head_dim)
            row = value_rows(layer, head // ratio)[within]
            quiet = min(y[value][row], centred[value][row]) <= tau_linear
            stays.append(not quiet and x[family.out][lane] > tau_linear)
        heads = [stays[i : i + layer.head_dim] for i in range(0, lanes, layer.head_dim)]
        found[f"{layer.heads_name}:heads"] = [any(head) for head in heads]
        channels = []
        for j, read in enumerate(x[family.down]):
            closed = read <= tau_linear or read <= tau_activation
            for path in family.up:
                for offset in family.branch_offsets(len(x[family.down])):
                    made = y[path][j + offset]
                    if family.branches == 1:
                        made = min(made, centred[path][j + offset])
                    closed = closed or made <= tau_linear
            channels.append(not closed)
        found[f"{layer.channels_name}:channels"] = channels
    return found


@pytest.mark.parametrize("family", ["llama", "glm", "phi3", "gpt_neox", "gpt2", "opt"])
@pytest.mark.parametrize(("linear", "activation"), [(0.0, 0.5), (0.3, 0.0), (0.2, 0.4), (0.4, 0.2)])
def test_each_threshold_is_for_its_own_statistic(family, linear, activation):
    """Thresholds at these quantiles of what down reads."""
    model = tiny_model(family).eval()
    make_quiet(model)
    make_rows_quieter_than_what_is_read(model)
    ids = token_ids(batch=3)
    read = {}
    for layer in layers_of(model):
        layer.linear(layer.family.down).register_forward_pre_hook(
            lambda m, x, name=layer.name: read.update({name: x[0].abs().flatten(0, -2).mean(0)})
        )
    with torch.no_grad():
        model(input_ids=ids)
    reads = torch.cat(list(read.values()))
    tau = {
        name: float(reads.quantile(part)) if part else 1e-9
        for name, part in (("tau_linear", linear), ("tau_activation", activation))
    }
    expected = literal_thresholds(model, ids, **tau)
    gp.attach(model, GATES)
    found = ContextPruning(**tau).quiet(model, [ids]).open
    assert {name: mask.tolist() for name, mask in found.items()} == expected
    kept = sum(sum(mask) for name, mask in expected.items() if name.endswith("channels"))
    assert 0 < kept < 2 * 38 and not all(all(mask) for mask in expected.values())


def test_thresholds_that_close_a_layer_are_refused():
    model = tiny_model("llama", torch.float32)
    with pytest.raises(ValueError, match=r"would close every unit of 'model.layers.0.self_attn:"):
        ContextPruning(gates=GATES, tau_linear=1e3).prune(model, [token_ids()])
    assert not hasattr(model, "gatepack_gates")
    assert not model.config.mlp_bias


def test_split_has_no_document_on_both_sides():
    documents = [f"document {i // 2}" for i in range(20)]
    training, held_out = split_text(documents)
    assert held_out == ["document 0", "document 6"]
    assert len(training) == 8 and not set(training) & set(held_out)
    assert split_text(documents) == (training, held_out)
    assert split_text(["a", "b"], ["c"]) == (["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"held_out\[1\] is also a training document"):
        split_text(["some  text\n", "more"], ["new", "some text"])
    with pytest.raises(ValueError, match="must not be empty, got 1 and 0"):
        split_text(["a"], [])


def test_tokens_are_counted_and_special_ones_kept():
    counts = token_counts([torch.tensor([[3, 3, 5]]), torch.tensor([5, 5, 0])], 7)
    assert counts.tolist() == [1, 0, 0, 2, 0, 3, 0]
    keep = ContextPruning(tau_embedding=0).kept_tokens(counts, [1])
    assert keep.nonzero().squeeze(1).tolist() == [0, 1, 3, 5]
    keep = ContextPruning(tau_embedding=1 / 3).kept_tokens(counts)
    assert keep.nonzero().squeeze(1).tolist() == [5]
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 5\)"):
        token_counts([torch.tensor([5])], 5)
    with pytest.raises(ValueError, match="counts hold no token"):
        ContextPruning(tau_embedding=0).kept_tokens(torch.zeros(3, dtype=torch.int64))


DOCUMENTS = [
    f"{word} and {word} again, " * 4 for word in ("one", "two", "six", "ten", "axe", "elk")
]


def method_for_run(**fields) -> ContextPruning:
    settings = {"gates": GATES, "rule": "budget", "window": 32, "calibration_windows": 4}
    return ContextPruning(**{**settings, **fields})


def byte_tokenizer(size=400):
    """Byte-level BPE with a special token, trained on the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*DOCUMENTS, "nothing like them: zebra, quartz, fjord"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_run_calibrates_prunes_tunes_and_scores():
    tokenizer = letter_tokenizer()
    model = tiny_model("llama", torch.float32)
    result = method_for_run().run(model, tokenizer, DOCUMENTS, TRAIN, length=32)
    assert list(result.scores) == ["base", "pruned", "tuned"]
    assert all(score["bits_per_byte"] > 0 for score in result.scores.values())
    assert result.scores["tuned"]["perplexity"] < result.scores["pruned"]["perplexity"]
    assert len(result.losses) == 4
    assert abs(result.report.kept_fraction - 0.7) <= 0.005
    assert result.dropped_tokens == 0 and result.tokenizer is tokenizer
    assert not any(hasattr(module, "base_layer") for module in result.model.modules())


def test_tuning_reads_the_whole_training_text(monkeypatch):
    """The released code cut the text to one example of 512 tokens."""
    seen = []
    real = context_pruning.fine_tune
    monkeypatch.setattr(
        context_pruning,
        "fine_tune",
        lambda m, windows, *a: seen.append(windows) or real(m, windows, *a),
    )
    tokenizer = letter_tokenizer()
    method_for_run().run(tiny_model("llama", torch.float32), tokenizer, DOCUMENTS, TRAIN, length=32)
    training, _ = split_text(DOCUMENTS, None, method_for_run().every)
    text = to_windows(training, tokenizer, 1).reshape(-1)
    assert len(seen[0]) > 1 and torch.equal(seen[0].flatten(), text[: seen[0].numel()])
    assert len(text) - seen[0].numel() < TRAIN.window


def test_calibration_and_counts_read_the_training_text_only(monkeypatch):
    """The released code calibrates, tunes and evaluates on one text."""
    seen = {}
    for name in ("context_statistics", "token_counts"):
        real = getattr(context_pruning, name)

        def note(*args, name=name, real=real):
            batches = next(each for each in args if isinstance(each, list))
            seen[name] = torch.cat([ids.flatten() for ids in batches])
            return real(*args)

        monkeypatch.setattr(context_pruning, name, note)
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), eos_token_id=0)
    method = method_for_run(window=8, tau_embedding=0)
    train = dataclasses.replace(TRAIN, window=8)
    method.run(model, tokenizer, DOCUMENTS, train, length=16)
    training, _ = split_text(DOCUMENTS, None, method.every)
    text, everything = (
        to_windows(documents, byte_tokenizer(), 1).reshape(-1)
        for documents in (training, DOCUMENTS)
    )
    assert torch.equal(seen["token_counts"], text) and len(text) < len(everything)
    assert torch.equal(seen["context_statistics"], text[: 4 * 8])
    assert not torch.equal(text[: 4 * 8], everything[: 4 * 8])


@pytest.mark.parametrize("fields", [{"tau_embedding": 0}, {"vocabulary_target": 0.85}])
@pytest.mark.parametrize("tied", [True, False])
def test_run_shrinks_the_vocabulary_and_its_tokenizer(fields, tied):
    tokenizer = byte_tokenizer()
    size = len(tokenizer) + 8  # rows that no token has, as padded embeddings do
    model = tiny_model(
        "llama", torch.float32, vocab_size=size, tie_word_embeddings=tied, eos_token_id=0
    )
    before = copy.deepcopy(model)
    method = method_for_run(window=8, **fields)
    train = dataclasses.replace(TRAIN, window=8)
    result = method.run(model, tokenizer, DOCUMENTS, train, length=16)
    small = result.tokenizer
    kept = len(small)
    assert result.model.get_input_embeddings().weight.shape[0] == kept
    assert result.model.config.vocab_size == kept == size - result.dropped_tokens
    assert kept < len(tokenizer)
    if "vocabulary_target" in fields:
        assert size * 0.85 - 8 < kept <= size * 0.85
    # What the training text has is encoded as before, into rows that are the same.
    ids, again = (t(DOCUMENTS[1], return_tensors="pt")["input_ids"][0] for t in (tokenizer, small))
    if "tau_embedding" in fields:
        rows, old = result.model.get_input_embeddings().weight, before.get_input_embeddings().weight
        assert torch.equal(rows[again], old[ids])
    # Dropped tokens are spelled, through bytes if need be, never lost.
    strange = "zebra quartz \u00e9 \N{SNOWMAN}"
    assert small.decode(small(strange)["input_ids"]) == strange
    assert max(small(strange)["input_ids"]) < kept
    assert small.eos_token == "</s>" and result.model.config.eos_token_id == small.eos_token_id


def test_run_refuses_what_would_not_be_evidence():
    tokenizer = letter_tokenizer()
    model = tiny_model("llama", torch.float32)
    with pytest.raises(ValueError, match="windows of 2048 tokens, calibration_windows asks for 40"):
        ContextPruning(gates=GATES).run(model, tokenizer, DOCUMENTS, TRAIN)
    with pytest.raises(ValueError, match="is also a training document"):
        method_for_run().run(model, tokenizer, DOCUMENTS, TRAIN, held_out=DOCUMENTS[2:3])
    with pytest.raises(ValueError, match="tokenizer: expected a BPE model, got 'WordLevel'"):
        method_for_run(tau_embedding=0).run(model, tokenizer, DOCUMENTS, TRAIN)
    assert not hasattr(model, "gatepack_gates")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "quantile"}, "rule must be one of"),
        ({"tau_linear": -1.0}, "tau_linear must be a number >= 0, got -1.0"),
        ({"tau_activation": float("nan")}, "tau_activation must be a number >= 0, got nan"),
        ({"tau_embedding": -0.5}, r"tau_embedding must be -1 or in \[0, 1\), got -0.5"),
        ({"vocabulary_target": 1.0}, r"vocabulary_target must be None or in \(0, 1\), got 1.0"),
        (
            {"vocabulary_target": 0.5, "tau_embedding": 0},
            "vocabulary_target must be None with tau_embedding=0, got 0.5",
        ),
        ({"window": 1}, "window must be >= 2, got 1"),
        ({"every": 1}, "every must be >= 2, got 1"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextPruning(**fields)
