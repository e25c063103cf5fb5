"""BPE tokenizers for tiny models: byte-level, and with byte fallback."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*merges: tuple[str, str], split=None):
    """A byte-level BPE tokenizer with one special token; split: what comes before ByteLevel."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<eos>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = steps if split is None else pre_tokenizers.Sequence([split, steps])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def pieces_tokenizer(*words: str, legacy: bool = False, prefix: bool = True, opens: bool = True):
    """A tokenizer with byte fallback as SentencePiece makes them, whose pieces are parts of words.

    legacy: spaces become U+2581 in the normalizer, as in Llama 2, and not in the pre-tokenizer.
    """
    marked = [f"\u2581{word}" for word in words]
    letters = sorted({letter for word in marked for letter in word})
    pieces = [word[:end] for word in marked for end in range(2, len(word) + 1)]
    pieces = sorted(dict.fromkeys(pieces), key=len)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *pieces,
    ]
    known = set(tokens)
    merges = [
        (piece[:place], piece[place:])
        for piece in pieces
        for place in range(1, len(piece))
        if {piece[:place], piece[place:]} <= known
    ]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        steps = [normalizers.Prepend("\u2581")] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    else:
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    if opens:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
