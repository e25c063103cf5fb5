"""Stage 6, save: whether a GGUF file is whole, before readers that trust its numbers get it, and
whether transformers reads all that the model computes with.

Layout (little-endian): "GGUF", version u32, counts of tensors and of keys u64; per key a name, a
type and a value; per tensor a name, dimensions, a type and an offset; then the data. Source:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from pathlib import Path

_SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_QKV = ("attn_q", "attn_k", "attn_v")
# Architectures of which transformers reads no base of the frequencies.
_PLAIN_BASE = ("stablelm", "starcoder2")
# Architectures of which it reads these biases only.
_BIASES = {
    **dict.fromkeys(("llama", "deci", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3"), ()),
    **dict.fromkeys(("qwen2", "qwen2moe"), _QKV),
}


class _Bytes:
    """Reads forward through a file's bytes, and no further."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        self.at = 0

    def skip(self, size: int, what: str) -> int:
        """Where `size` bytes begin; ValueError if the file ends within them."""
        start = self.at
        if start + size > len(self.data):
            raise ValueError(
                f"{self.path}: {what} takes {size} bytes from byte {start}, the file has "
                f"{len(self.data)}"
            )
        self.at += size
        return start

    def number(self, form: str, what: str):
        size = struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", self.data, self.skip(size, what))[0]

    def string(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8") from error

    def value(self, what: str):
        """A scalar or string; for an array, None."""
        kind = self.number("I", what)
        if kind != _ARRAY:
            return self._scalar(kind, what)
        kind, count = self.number("I", what), self.number("Q", what)
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"), what)
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q", what), what)
        else:
            raise ValueError(f"{self.path}: {what} is an array of the unknown type {kind}")
        return None

    def _scalar(self, kind: int, what: str):
        if kind == _STRING:
            return self.string(what)
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {what} has the unknown type {kind}")
        return self.number(_SCALARS[kind], what)


def check_gguf(path: Path) -> None:
    """ValueError, naming the file and the field, for a file that contradicts its own size.

    Every string, array and tensor must lie within the file, and the sizes that the model's
    parameters follow from must not exceed the parameters that there are. Nor may there be what
    transformers leaves out in silence: scaled rotary frequencies, and some biases.
    """
    import gguf

    file = _Bytes(path)
    start = file.skip(4, "the magic number")
    if file.data[start : start + 4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version = file.number("I", "version")
    if version not in (2, 3):
        raise ValueError(f"{path}: version must be 2 or 3, got {version}")
    counts = {what: file.number("Q", what) for what in ("tensor count", "key count")}
    keys: dict[str, object] = {}
    for index in range(counts["key count"]):
        name = file.string(f"key {index}")
        if name in keys:
            raise ValueError(f"{path} has the key {name!r} twice")
        keys[name] = file.value(f"key {name!r}")
    places = {}
    elements = 0
    for index in range(counts["tensor count"]):
        name = file.string(f"tensor {index}")
        what = f"tensor {name!r}"
        if name in places:
            raise ValueError(f"{path} has the {what} twice")
        rank = file.number("I", what)
        if not 1 <= rank <= 4:
            raise ValueError(f"{path}: {what} must have 1 to 4 dimensions, got {rank}")
        shape = [file.number("Q", what) for _ in range(rank)]
        kind = file.number("I", what)
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except ValueError as error:
            raise ValueError(f"{path}: {what} has the unknown type {kind}") from error
        if shape[0] % block:
            raise ValueError(f"{path}: {what} has rows of {shape[0]}, no multiple of {block}")
        elements += math.prod(shape)
        places[name] = (file.number("Q", what), math.prod(shape) // block * size)
    alignment = keys.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"{path}: {_ALIGNMENT} must be a small positive integer, got {alignment}")
    data = -(-file.at // alignment) * alignment
    for name, (offset, size) in places.items():
        if data + offset + size > len(file.data):
            raise ValueError(
                f"{path}: tensor {name!r} ends at byte {data + offset + size}, the file has "
                f"{len(file.data)}"
            )
    _check_sizes(path, keys, len(places), elements)
    factors = []
    for name in _FACTORS:
        offset, size = places.get(name, (0, 0))
        found = file.data[data + offset : data + offset + size]
        if found != struct.pack("<f", 1.0) * (size // 4):
            factors.append(name)
    _check_kept(path, keys, factors, places)


def _check_sizes(path: Path, keys: dict[str, object], tensors: int, elements: int) -> None:
    """ValueError for sizes that would build a model far larger than the file."""
    family = keys.get("general.architecture")
    if not isinstance(family, str):
        raise ValueError(f"{path}: general.architecture must be a string, got {family!r}")

    def size(name: str) -> int:
        value = keys.get(f"{family}.{name}")
        return value if isinstance(value, int) else 0

    layers, width = size("block_count"), size("embedding_length")
    lanes = size("attention.head_count") * size("attention.key_length")
    bounds = {
        "block_count": (layers, tensors),
        "embedding_length": (layers * width, elements),
        "feed_forward_length": (layers * width * size("feed_forward_length"), elements),
        "attention.key_length": (layers * width * lanes, elements),
        "vocab_size": (width * size("vocab_size"), elements),
    }
    for name, (needed, found) in bounds.items():
        value = keys.get(f"{family}.{name}")
        if needed > found or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{path}: {family}.{name} is {value}, which does not fit a file of {tensors} "
                f"tensors with {elements} elements"
            )


def _check_kept(path: Path, keys: dict[str, object], factors: list[str], tensors) -> None:
    """ValueError for what transformers would leave out, which changes what the model computes.

    factors: tensors of rotary factors that are not 1.
    """
    family, lost = keys["general.architecture"], list(factors)
    # As llama.cpp reads them: linear where there is no type, 0 for no factor.
    kind = keys.get(f"{family}.rope.scaling.type", "linear")
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        factor = keys.get(f"{family}.{key}", 1.0)
        if kind != "none" and factor not in (0.0, 1.0):
            lost.append(f"{family}.{key} {factor}")
    base = keys.get(f"{family}.rope.freq_base", 1e4)
    if family in _PLAIN_BASE and base != 1e4:
        lost.append(f"{family}.rope.freq_base {base}")
    if family in _BIASES:
        biases = (name.split(".") for name in tensors if name.endswith(".bias"))
        lost += sorted(".".join(name) for name in biases if name[-2] not in _BIASES[family])
    if lost and family != "gpt-oss":  # of which transformers reads the scaling
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"{path} has {', '.join(lost[:3])}{more}, which transformers leaves out when it reads "
            f"a GGUF file of the architecture {family}: load the checkpoint that the file was made "
            "of instead"
        )
