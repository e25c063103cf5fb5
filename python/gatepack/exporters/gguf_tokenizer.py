"""Stage 6, export: a BPE tokenizer as GGUF's metadata, byte-level or of SentencePiece's kind."""

import json
import re

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_WORST = -1e6  # of tokens that no merge makes
_SPLITS = {_LLAMA3_SPLIT: "llama-bpe", _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def add_tokenizer(writer, tokenizer, vocabulary: int) -> list[str]:
    """Adds tokens, kinds, merges or scores, special ids and the chat template to a GGUFWriter.

    vocabulary: rows of the embedding; ids that the tokenizer does not have become unused tokens.
    Returns what is not carried. Raises ValueError for a tokenizer that is not BPE, that prepares
    text or splits or merges words in a way that llama.cpp does not know, or that has more tokens
    than the embedding has rows.
    """
    import gguf

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"format 'gguf' needs a tokenizer of the tokenizers library, got "
            f"{type(tokenizer).__name__}"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    pieces = model["type"] == "BPE" and model["byte_fallback"]
    pre = "default" if pieces else _pre_tokenizer(backend)
    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [kinds.UNUSED] * vocabulary
    added = {entry["content"]: entry["special"] for entry in backend["added_tokens"]}
    for token, i in tokenizer.get_vocab().items():
        if i >= vocabulary:
            raise ValueError(
                f"token {token!r} has id {i}, but the model's embedding has {vocabulary} rows"
            )
        special = added.get(token)
        tokens[i] = token
        types[i] = {None: kinds.NORMAL, True: kinds.CONTROL, False: kinds.USER_DEFINED}[special]
        if pieces and _BYTE.fullmatch(token):
            types[i] = kinds.BYTE
        elif pieces and token == model["unk_token"]:
            types[i] = kinds.UNKNOWN
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    if pieces:
        scores = _scores(set(tokens), merges)
        writer.add_token_scores([scores.get(token, _WORST) for token in tokens])
        writer.add_add_space_prefix(_adds_a_space(backend))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer)
    step = backend["pre_tokenizer"] or {}
    if pieces and step.get("prepend_scheme") in ("first", "always"):
        return ["that a text which begins with a space gets no other in front: llama.cpp adds one"]
    if not pieces and _normalizers(backend):
        return ["the tokenizer's normalizer, NFC: llama.cpp takes characters as they are"]
    return []


def _add_special_tokens(writer, tokenizer) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            add(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _scores(tokens: set[str], merges: list[tuple[str, str]]) -> dict[str, float]:
    """token -> minus the rank of its first merge; llama.cpp merges into the best token first.

    It takes any two neighbours that make a token, so all such pairs must be merges, and those of
    one token must follow each other. SentencePiece's own are like that.
    """
    scores, last = {}, None
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        if token in scores and token != last:
            raise ValueError(
                f"format 'gguf' ranks tokens, not merges, and those of {token!r} are apart: "
                "expected a tokenizer as SentencePiece makes them"
            )
        scores.setdefault(token, -float(rank))
        last = token
    known = set(merges)
    for token in scores:
        for place in range(1, len(token)):
            pair = token[:place], token[place:]
            if pair not in known and tokens.issuperset(pair):
                raise ValueError(
                    f"format 'gguf' would merge {pair[0]!r} and {pair[1]!r}, which the tokenizer "
                    "does not: expected one as SentencePiece makes them"
                )
    return scores


def _adds_a_space(backend: dict) -> bool:
    """Whether a text gets a space in front; ValueError for other steps than spaces to U+2581."""
    parts = [part for part in (backend["normalizer"], backend["pre_tokenizer"]) if part]
    steps = [
        step
        for part in parts
        for step in part.get("normalizers") or part.get("pretokenizers") or [part]
    ]
    spaces = {"Prepend": "prepend", "Replace": "content", "Metaspace": "replacement"}
    for step in steps:
        other = step.get("pattern", {"String": " "}) != {"String": " "}
        if step.get(spaces.get(step["type"])) != _SPACE or other:
            raise ValueError(
                f"format 'gguf' has no name for a tokenizer that prepares text by {steps}: "
                "expected spaces to become U+2581 and nothing else"
            )
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )


def _normalizers(backend: dict) -> list[dict]:
    normalizer = backend["normalizer"]
    return [] if normalizer is None else normalizer.get("normalizers", [normalizer])


def _pre_tokenizer(backend: dict) -> str:
    """llama.cpp's name for how a tokenizer splits text into words."""
    model, step = backend["model"], backend["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if model["type"] != "BPE" or steps[-1].get("type") != "ByteLevel":
        raise ValueError(
            "format 'gguf' needs a byte-level BPE tokenizer, or one with byte fallback, got "
            f"{model['type']} after {[each.get('type') for each in steps]}"
        )
    odd = [each for each in _normalizers(backend) if each["type"] != "NFC"]
    if odd:
        raise ValueError(
            f"format 'gguf' has no name for a byte-level tokenizer that prepares text by {odd}: "
            "expected no normalizer, or NFC"
        )
    if any(each.get("add_prefix_space") for each in steps):
        raise ValueError(
            "format 'gguf' has no key for a byte-level tokenizer that puts a space before a text: "
            "expected add_prefix_space=False"
        )
    before = [_describe(each) for each in steps[:-1]]
    if steps[-1]["use_regex"] and before == []:
        return "gpt-2"
    if steps[-1]["use_regex"] and before == ["digits"]:
        return "smollm"
    if not steps[-1]["use_regex"] and len(before) == 1 and before[0] in _SPLITS:
        return _SPLITS[before[0]]
    raise ValueError(
        f"format 'gguf' has no name for a tokenizer that splits text by {steps}: expected that of "
        "GPT-2, SmolLM, Llama 3 or Qwen2"
    )


def _describe(step: dict) -> str | None:
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    return step["pattern"].get("Regex") if step["type"] == "Split" else None
