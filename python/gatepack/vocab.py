"""Stage 5, pack: the vocabulary, rows of the embedding and lm_head, and a tokenizer that fits
(contextual pruning prunes embeddings too, arXiv 2312.12682).

A dropped token is spelled by tokens that stay: every byte does, and so does every token on the way
to a kept one. No text is refused or lost, it only takes more tokens.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatepack import _ext
from gatepack.repack import Piece, pack_tensors

__all__ = [
    "VocabPlan",
    "pack_vocab",
    "remap_ids",
    "shrink_tokenizer",
    "vocab_closure",
    "vocab_pack",
]


def _byte_characters() -> list[str]:
    """How byte-level BPE writes each of the 256 bytes: printable ones as they are (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _byte_tokens(tokenizer: Mapping) -> list[str]:
    """The tokens that spell any text: byte-level characters, or <0x00> to <0xFF>.

    A byte-level tokenizer may lack bytes that it never met; then it never spelled them.
    """
    vocab = tokenizer["model"]["vocab"]
    for tokens in (_byte_characters(), [f"<0x{byte:02X}>" for byte in range(256)]):
        if all(token in vocab for token in tokens):
            return tokens
    parts = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    if '"ByteLevel"' in json.dumps(parts):
        return [token for token in _byte_characters() if token in vocab]
    raise ValueError(
        "tokenizer: expected one with a token for each byte (byte-level BPE or byte fallback); "
        "without them a dropped token could not be spelled"
    )


def _merge_pairs(model: Mapping) -> list[tuple[str, str]]:
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _made_of(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Every token that BPE passes through on the way to `token`, itself included."""
    parts = list(token)
    seen = set(parts)
    while len(parts) > 1:
        pairs = zip(parts, parts[1:], strict=False)
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


def _parts_of(model: Mapping) -> Callable[[int], set[int]]:
    """id -> the ids that BPE passes through on the way to its token, itself included."""
    vocab = model["vocab"]
    token_of = {i: token for token, i in vocab.items()}
    ranks = {pair: rank for rank, pair in enumerate(_merge_pairs(model))}

    def parts_of(i: int) -> set[int]:
        return {i, *(vocab[part] for part in _made_of(token_of[i], ranks) if part in vocab)}

    return parts_of


def vocab_closure(tokenizer: Mapping, keep: Iterable[int]) -> list[int]:
    """Sorted ids of keep and of what they need: bytes, added tokens, and parts along their merges.

    tokenizer: the content of a tokenizer.json whose model is BPE. Where text is tokenised into kept
    tokens along kept merges, the packed tokenizer gives the same tokens. Raises ValueError for
    another model, one without byte tokens, or ids that it does not have.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer: expected a BPE model, got {model.get('type')!r}")
    vocab = model["vocab"]
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    unknown = sorted(set(keep) - {*vocab.values(), *added})
    if unknown:
        raise ValueError(f"keep: expected ids of the tokenizer, got {unknown[:5]}")
    parts_of = _parts_of(model)
    needed = set(added) | {vocab[token] for token in _byte_tokens(tokenizer)}
    if model.get("unk_token") in vocab:
        needed.add(vocab[model["unk_token"]])
    for i in set(keep) - added.keys():
        needed |= parts_of(i)
    return sorted(needed)


def shrink_tokenizer(tokenizer: Mapping, keep: Iterable[int]) -> dict:
    """The tokenizer.json that knows vocab_closure's ids only, numbered 0, 1, ... in their order.

    keep must be closed: ValueError says which ids are missing.
    """
    keep = sorted(set(keep))
    missing = sorted(set(vocab_closure(tokenizer, keep)) - set(keep))
    if missing:
        raise ValueError(f"keep: expected what vocab_closure returns, {missing[:5]} are missing")
    names = {old: new for new, old in enumerate(keep)}
    packed = copy.deepcopy(dict(tokenizer))
    model = packed["model"]
    model["vocab"] = {t: names[i] for t, i in model["vocab"].items() if i in names}
    vocab = model["vocab"]
    pairs = _merge_pairs(model)
    kept = [{*pair, "".join(pair)} <= vocab.keys() for pair in pairs]
    model["merges"] = [m for m, stays in zip(model["merges"], kept, strict=True) if stays]
    for token in packed.get("added_tokens") or ():
        token["id"] = names[token["id"]]
    if packed.get("padding"):
        packed["padding"]["pad_id"] = names[packed["padding"]["pad_id"]]
    _rename_processor(packed.get("post_processor"), names)
    return packed


def _rename_processor(processor: dict | None, names: Mapping[int, int]) -> None:
    """New ids in a post-processor, which writes special tokens by number."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _rename_processor(inner, names)
    special = processor.get("special_tokens") or {}
    for token in special.values() if isinstance(special, dict) else ():
        token["ids"] = [names[i] for i in token["ids"]]
    for side in ("sep", "cls"):
        if side in processor:
            token, i = processor[side]
            processor[side] = [token, names[i]]


@dataclass(frozen=True)
class VocabPlan:
    """Old and new ids: keep [K], sorted old ids; the new id of keep[i] is i. size: of the old
    vocabulary, the rows of its embedding."""

    keep: Tensor
    size: int

    def __post_init__(self):
        keep = self.keep
        if keep.dim() != 1 or keep.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"keep: expected int ids [K], got {keep.dtype} {list(keep.shape)}")
        inside = keep.numel() == 0 or (int(keep[0]) >= 0 and int(keep[-1]) < self.size)
        if not inside or bool((keep[1:] <= keep[:-1]).any()):
            raise ValueError(f"keep: expected strictly increasing ids in [0, {self.size})")

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 [size]: the new id of each old one, -1 where it is dropped."""
        table = torch.full((self.size,), -1, dtype=torch.int32)
        table[self.keep.long().cpu()] = torch.arange(self.keep.numel(), dtype=torch.int32)
        return table.to(device)

    def remap(self, ids: Tensor) -> Tensor:
        """New ids of old ones, any shape, int64 or int32; refuses dropped ids (see remap_ids)."""
        return remap_ids(ids, self.table(ids.device))

    def full_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., K] at the old ids: [..., size], -inf for dropped tokens."""
        if logits.shape[-1] != self.keep.numel():
            raise ValueError(
                f"logits: expected [..., {self.keep.numel()}], got {list(logits.shape)}"
            )
        full = logits.new_full((*logits.shape[:-1], self.size), -torch.inf)
        return full.index_copy(-1, self.keep.long().to(logits.device), logits)


def remap_ids(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids]: ids int64 or int32 of any shape, table int32 with -1 for what is dropped.

    Dropped and unknown ids raise ValueError with their position (on CUDA they trap): text that has
    them is encoded again with the packed tokenizer, which spells them.
    """
    _ext.backend()
    with _ext.refusals():
        return torch.ops.gatepack.remap_ids.default(ids.contiguous(), table)


def vocab_pack(
    embedding: Tensor,
    lm_head: Tensor | None,
    keep: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(embedding[keep], lm_head[keep], bias[keep]) in one call; rows [V, hidden], bias [V].

    Tied weights (one memory) are packed once and stay tied. Nothing is padded: the logit of a row
    of zeros is 0, not -inf.
    """
    tied = lm_head is not None and lm_head.data_ptr() == embedding.data_ptr()
    keep = keep.to(embedding.device)
    pieces = [Piece(embedding.detach(), keep)]
    if lm_head is not None and not tied:
        pieces.append(Piece(lm_head.detach(), keep))
    if bias is not None:
        pieces.append(Piece(bias.detach()[None], None, keep))
    packed, _ = pack_tensors(pieces, dtype)
    head = packed[0 if tied else 1] if lm_head is not None else None
    return packed[0], head, packed[-1][0] if bias is not None else None


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def _renamed(config, table: list[int]) -> dict[str, object]:
    """The settings of a config that hold token ids, with new ones: table[old], -1 for dropped.

    Ids outside of the vocabulary, such as -1 for none, stay. Raises ValueError for a dropped
    ..._token_id. Lists lose dropped ids and sequences that hold one; an empty one becomes None.
    """

    def new(ids: Iterable[int]) -> list[int]:
        return [table[i] if 0 <= i < len(table) else i for i in ids]

    def stays(ids: Iterable[int]) -> bool:
        return all(table[i] >= 0 for i in ids if 0 <= i < len(table))

    found = {}
    for name in dict.fromkeys((*_SPECIAL_IDS, *vars(config))):
        old = getattr(config, name, None) if name.endswith("_token_id") else None
        if old is not None:
            ids = old if isinstance(old, list) else [old]
            if not stays(ids):
                raise ValueError(f"keep: expected the config's {name} {old} among them")
            found[name] = new(ids) if isinstance(old, list) else new(ids)[0]
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if old := getattr(config, name, None):
            found[name] = new(i for i in old if stays([i])) or None
    if old := getattr(config, "bad_words_ids", None):
        found["bad_words_ids"] = [new(ids) for ids in old if stays(ids)] or None
    if old := getattr(config, "sequence_bias", None):
        pairs = old.items() if isinstance(old, dict) else old
        found["sequence_bias"] = [[new(ids), bias] for ids, bias in pairs if stays(ids)] or None
    return found


@torch.no_grad()
def pack_vocab(model: nn.Module, keep: Iterable[int]) -> VocabPlan:
    """Leaves only the rows of kept ids in a transformers model, in place; returns the plan.

    keep: as vocab_closure returns it. Tied weights stay tied; config.vocab_size and the token ids
    in the configs follow, so the result is an ordinary checkpoint of its architecture. What
    generation suppresses, bans or biases goes where its tokens go. Raises ValueError where a
    special id is not kept, or adapters are on the embeddings; then nothing has changed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in filter(None, (embedding, head)):
        if "weight" not in module._parameters:
            raise ValueError(
                f"model: its vocabulary is in a {type(module).__name__}, expected a plain "
                "Embedding or Linear: merge adapters first (model.merge_and_unload())"
            )
    plan = VocabPlan(torch.tensor(sorted(set(keep)), dtype=torch.int64), embedding.num_embeddings)
    table = plan.table().tolist()
    configs = [model.config, getattr(model, "generation_config", None)]
    renamed = [(config, _renamed(config, table)) for config in filter(None, configs)]
    weight = embedding.weight
    bias = getattr(head, "bias", None)
    small, small_head, small_bias = vocab_pack(
        weight, None if head is None else head.weight, plan.keep, bias
    )
    tied = small_head is small
    embedding.weight = nn.Parameter(small, weight.requires_grad)
    embedding.num_embeddings = plan.keep.numel()
    if embedding.padding_idx is not None:
        padding = table[embedding.padding_idx]
        embedding.padding_idx = None if padding < 0 else padding
    if head is not None:
        trains = head.weight.requires_grad
        head.weight = embedding.weight if tied else nn.Parameter(small_head, trains)
        head.out_features = plan.keep.numel()
        if bias is not None:
            small_bias = nn.Parameter(small_bias, bias.requires_grad)
            for module in model.modules():  # RoBERTa's head holds it twice
                for name, parameter in module._parameters.items():
                    if parameter is bias:
                        module._parameters[name] = small_bias
    model.config.vocab_size = plan.keep.numel()
    for config, settings in renamed:
        for name, new in settings.items():
            setattr(config, name, new)
    return plan


def tokenizer_record(tokenizer) -> dict:
    """The content of tokenizer.json of a transformers tokenizer whose vocabulary can be packed.

    Raises ValueError for one without that file, or that is not BPE with byte tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: expected a fast one, which has a tokenizer.json, got "
            f"{type(tokenizer).__name__}"
        )
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab_closure(record, ())
    return record


def most_frequent(record: Mapping, counts: Tensor, size: int) -> list[int]:
    """The ids to keep so that the most frequent tokens and what they need are at most size.

    record: of tokenizer_record. counts: int64 [V], how often each token occurs. Raises ValueError
    if bytes and added tokens alone are more.
    """
    kept = set(vocab_closure(record, ()))
    if len(kept) > size:
        raise ValueError(
            f"size: expected at least {len(kept)}, for bytes and added tokens, got {size}"
        )
    known, parts_of = _known_ids(record), _parts_of(record["model"])
    for i in torch.argsort(counts, descending=True, stable=True).tolist():
        missing = parts_of(i) - kept if i in known and i not in kept else set()
        if len(kept) + len(missing) > size:
            break
        kept |= missing
    return sorted(kept)


def _known_ids(record: Mapping) -> set[int]:
    return {*record["model"]["vocab"].values(), *(t["id"] for t in record["added_tokens"] or ())}


_TOKENIZER_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
)


def shrink_vocabulary(model: nn.Module, tokenizer, keep: Iterable[int]) -> tuple[VocabPlan, object]:
    """Leaves kept ids, and what spells the others, in a model and its tokenizer.

    The model changes in place (pack_vocab); returns the plan and the new tokenizer. Rows that no
    token has go. Text is encoded anew with that tokenizer, which spells dropped tokens through
    others, so none is lost; ids of before map through plan.remap, which refuses dropped ones.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    record = tokenizer_record(tokenizer)
    ids = vocab_closure(record, set(keep) & _known_ids(record))
    packed = Tokenizer.from_str(json.dumps(shrink_tokenizer(record, ids)))
    small = PreTrainedTokenizerFast(
        tokenizer_object=packed,
        chat_template=getattr(tokenizer, "chat_template", None),
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        **{name: getattr(tokenizer, name) for name in _TOKENIZER_SETTINGS},
        **tokenizer.special_tokens_map,
    )
    return pack_vocab(model, ids), small
