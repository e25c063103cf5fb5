"""Stage 3, modules: where the gated linears sit in each model family; one table row per family.

Read in transformers 5.x modelling files: every attention listed here derives its head count from
the projections' width or from the attributes in head_attributes, so that compact projections need
no patched forward.
"""

from dataclasses import dataclass, replace

_COUNTS = ("queries", "kv_heads", "groups", "width")


@dataclass(frozen=True)
class Family:
    """Paths are relative to one decoder or encoder layer.

    attention: module that carries the head counts. q, kv, out: its linears by path; qkv: one fused
    linear instead of q and kv, whose rows are all of q, all of k, all of v or, with by_head, those
    of one head after the other. up: linears that produce MLP channels; down: the one that consumes
    them; mlp: a container whose forward is down(act(up[0](x)) * up[1](x)), or None. fused_up: the
    one linear of `up` makes two branches, one above the other, whose product `down` consumes.
    head_attributes: attribute of `attention` -> "queries" (query heads), "kv_heads" (key/value
    heads), "groups" (query heads per key/value head) or "width" (query lanes); its forward must
    take head counts from these or from the widths of its linears. "config.NAME" is a field of its
    config, which all layers share: where a layer's count differs, its attention has a config of its
    own. across_heads: modules that, where a layer has one, normalise over several heads or have
    weights for each, so that its heads cannot be gated. The model's config has head_dim, or
    hidden_size and num_attention_heads.

    Raises ValueError naming the field, what it must be and what it is.
    """

    attention: str
    out: str
    up: tuple[str, ...]
    down: str
    head_attributes: tuple[tuple[str, str], ...]
    q: str = ""
    kv: tuple[str, ...] = ()
    qkv: str = ""
    mlp: str | None = None
    fused_up: bool = False
    by_head: bool = False
    across_heads: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("attention", "out", "down"):
            _require(_is_path(getattr(self, field)), self, field, "the path of a module")
        for field in ("q", "qkv"):
            value = getattr(self, field)
            _require(value == "" or _is_path(value), self, field, 'the path of a linear or ""')
        _require(
            self.mlp is None or _is_path(self.mlp), self, "mlp", "the path of a module or None"
        )
        for field in ("kv", "up", "across_heads"):
            _require(_is_paths(getattr(self, field)), self, field, "a tuple of paths")
        _require(bool(self.up), self, "up", "at least one path")
        if self.fused_up and (len(self.up) > 1 or self.mlp):
            raise ValueError(
                "a family with fused_up has one path in up and no mlp; "
                f"got up={self.up!r}, mlp={self.mlp!r}"
            )
        if bool(self.qkv) == bool(self.q) or bool(self.q) != bool(self.kv):
            raise ValueError(
                "a family has either q and kv or, for one fused linear, qkv; "
                f"got q={self.q!r}, kv={self.kv!r}, qkv={self.qkv!r}"
            )
        if self.by_head and not self.qkv:
            raise ValueError(f"a family with by_head has one fused linear, qkv; got q={self.q!r}")
        _require(
            isinstance(self.head_attributes, tuple)
            and all(isinstance(p, tuple) and len(p) == 2 for p in self.head_attributes)
            and all(_is_attribute(n) and what in _COUNTS for n, what in self.head_attributes),
            self,
            "head_attributes",
            f"a tuple of pairs (attribute or config.NAME, one of {_COUNTS})",
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of every linear whose weights the budget counts."""
        heads = (self.qkv,) if self.qkv else (self.q, *self.kv)
        return (*heads, self.out, *self.up, self.down)

    @property
    def branches(self) -> int:
        """Rows of `up` that make one MLP channel."""
        return 2 if self.fused_up else len(self.up)

    def branch_offsets(self, width: int) -> tuple[int, ...]:
        """Where in each linear of `up` the `width` rows of a branch begin."""
        return (0, width) if self.fused_up else (0,)


def _is_path(value) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _is_paths(value) -> bool:
    return isinstance(value, tuple) and all(_is_path(part) for part in value)


def _is_attribute(name) -> bool:
    return isinstance(name, str) and name.removeprefix("config.").isidentifier()


def _require(holds: bool, family: Family, field: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{field} must be {expected}, got {getattr(family, field)!r}")


LLAMA = Family(
    attention="self_attn",
    q="self_attn.q_proj",
    kv=("self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    mlp="mlp",
    head_attributes=(("num_key_value_groups", "groups"),),
)
BERT = Family(
    attention="attention.self",
    q="attention.self.query",
    kv=("attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    head_attributes=(("num_attention_heads", "queries"), ("all_head_size", "width")),
)
DISTILBERT = Family(
    attention="attention",
    q="attention.q_lin",
    kv=("attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
    head_attributes=(),
)
MODERNBERT = Family(
    attention="attn",
    qkv="attn.Wqkv",
    out="attn.Wo",
    up=("mlp.Wi",),
    down="mlp.Wo",
    head_attributes=(),
    fused_up=True,
)
GPT2 = Family(
    attention="attn",
    qkv="attn.c_attn",
    out="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    head_attributes=(("num_heads", "queries"), ("split_size", "width")),
)
GLM = replace(LLAMA, up=("mlp.gate_up_proj",), mlp=None, fused_up=True)
SEED_OSS = replace(LLAMA, mlp=None)  # its MLP ends in dropout
OLMO2 = replace(LLAMA, across_heads=("self_attn.q_norm",))
COHERE = OLMO2  # with use_qk_norm; without it there is no q_norm
ARCEE = replace(LLAMA, up=("mlp.up_proj",), mlp=None)
_COUNTED = (
    ("num_heads", "queries"),
    ("num_key_value_heads", "kv_heads"),
    ("num_key_value_groups", "groups"),
)
STABLELM = replace(LLAMA, head_attributes=_COUNTED, across_heads=("self_attn.q_layernorm",))
NEMOTRON = replace(ARCEE, head_attributes=_COUNTED)
PHI3 = replace(
    GLM,
    q="",
    kv=(),
    qkv="self_attn.qkv_proj",
    head_attributes=(
        ("config.num_attention_heads", "queries"),
        ("num_key_value_heads", "kv_heads"),
        ("num_key_value_groups", "groups"),
    ),
)
GPT_NEOX = Family(
    attention="attention",
    qkv="attention.query_key_value",
    by_head=True,
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    head_attributes=(),
)
STARCODER2 = replace(LLAMA, up=("mlp.c_fc",), down="mlp.c_proj", mlp=None)
PHI = replace(LLAMA, out="self_attn.dense", up=("mlp.fc1",), down="mlp.fc2", mlp=None)
OPT = Family(
    attention="self_attn",
    q="self_attn.q_proj",
    kv=("self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
    head_attributes=(("num_heads", "queries"),),
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "glm": GLM,
    "glm4": GLM,
    "starcoder2": STARCODER2,
    "phi": PHI,
    "phi3": PHI3,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "cohere": COHERE,
    "cohere2": LLAMA,
    "stablelm": STABLELM,
    "nemotron": NEMOTRON,
    "arcee": ARCEE,
    "apertus": ARCEE,
    "seed_oss": SEED_OSS,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "ernie4_5": LLAMA,
    "exaone4": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "helium": LLAMA,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "gpt2": GPT2,
    "opt": OPT,
}


def register_family(model_type: str, family: Family, *, replace: bool = False) -> None:
    """Teaches attach a model family; model_type as in the model's config.

    Checkpoints of a class that is not in transformers load once the class is registered there
    (AutoConfig.register and, say, AutoModelForCausalLM.register). Raises ValueError for a
    model_type that already has another family, unless replace is set.
    """
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"model_type must be a name as in the model's config, got {model_type!r}")
    if not isinstance(family, Family):
        raise ValueError(f"family must be a gatepack.Family, got {type(family).__name__}")
    known = FAMILIES.get(model_type)
    if known not in (None, family) and not replace:
        raise ValueError(
            f"model_type {model_type!r} already has the family {known}; pass replace=True to "
            "put another in its place"
        )
    FAMILIES[model_type] = family


def family_of(config) -> Family:
    """The table row of a transformers config; ValueError if there is none."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"no family is known for model_type {config.model_type!r}; known: {sorted(FAMILIES)}. "
            "Add one with gatepack.register_family(model_type, gatepack.Family(...))"
        )
    return FAMILIES[config.model_type]
