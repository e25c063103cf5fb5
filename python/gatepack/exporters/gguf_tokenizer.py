"""Stage 6, export: a byte-level BPE tokenizer as GGUF's metadata."""

import json

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3_SPLIT: "llama-bpe", _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def add_tokenizer(writer, tokenizer, vocabulary: int) -> None:
    """Adds tokens, their kinds, merges, special ids and the chat template to a GGUFWriter.

    vocabulary: rows of the embedding; ids that the tokenizer does not have become unused tokens.
    Raises ValueError for a tokenizer that is not byte-level BPE, splits words in a way that
    llama.cpp has no name for, or has more tokens than the embedding has rows.
    """
    import gguf

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"format 'gguf' needs a tokenizer of the tokenizers library, got "
            f"{type(tokenizer).__name__}"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(backend)
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = backend["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    _add_special_tokens(writer, tokenizer)


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


def _pre_tokenizer(backend: dict) -> str:
    """llama.cpp's name for how a tokenizer splits text into words."""
    model, step = backend["model"], backend["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if model["type"] != "BPE" or model.get("byte_fallback") or steps[-1].get("type") != "ByteLevel":
        raise ValueError(
            f"format 'gguf' needs a byte-level BPE tokenizer, got {model['type']} after "
            f"{[each.get('type') for each in steps]}"
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
