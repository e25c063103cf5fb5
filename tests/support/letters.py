"""Hand-made tokenizers for tiny models: one token per character, and one with merges."""

from tiny import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS, BOS = "<eos>", "<bos>"
LETTERS = [EOS, BOS, "\n", *(chr(code) for code in range(32, 126))][:VOCAB]


def letter_tokenizer(eos: bool = True, bos: bool = False, opens: bool = False):
    """Ids are places in LETTERS. opens: it puts bos before a text, as Llama's tokenizer does."""
    ids = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
        )
    special = {**({"eos_token": EOS} if eos else {}), **({"bos_token": BOS} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def merging_tokenizer(*merges: tuple[str, str]):
    """Letters, and tokens made of two neighbours each, numbered after the letters it keeps."""
    letters = [letter for letter in LETTERS if letter not in (EOS, BOS)][: VOCAB - 2 - len(merges)]
    tokens = [EOS, BOS, *letters, *("".join(pair) for pair in merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, list(merges), unk_token=EOS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]
