"""Stage 3, modules: where the gated linears sit in each model family; one table row per family.

Read in transformers 5.x modelling files: every attention listed here derives its head count from
the projections' width or from the attributes in head_attributes, so that compact projections need
no patched forward.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Paths are relative to one decoder or encoder layer.

    attention: module that carries the head counts. q, kv, out: its linears by path; qkv: one fused
    linear instead of q and kv. up: linears that produce MLP channels; down: the one that consumes
    them; mlp: a container whose forward is down(act(up[0](x)) * up[1](x)), or None.
    head_attributes: attribute of `attention` -> "queries" (query heads), "groups" (query heads per
    key/value head) or "width" (query lanes). head_dim and kv_heads: config fields, tried in order,
    with hidden_size // num_attention_heads and num_attention_heads where none is set. post_norm:
    the residual stream is normalised after each sublayer is added (BERT), not before it.
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
    post_norm: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of every linear whose weights the budget counts."""
        heads = (self.qkv,) if self.qkv else (self.q, *self.kv)
        return (*heads, self.out, *self.up, self.down)


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
    post_norm=True,
)
GPT2 = Family(
    attention="attn",
    qkv="attn.c_attn",
    out="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    head_attributes=(("num_heads", "queries"), ("split_size", "width")),
)
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
    "bert": BERT,
    "roberta": BERT,
    "gpt2": GPT2,
    "opt": OPT,
}


def register_family(model_type: str, family: Family) -> None:
    """Teaches attach a model family; model_type as in the model's config."""
    if not isinstance(family, Family):
        raise ValueError(f"family must be a gatepack.Family, got {type(family).__name__}")
    FAMILIES[model_type] = family


def family_of(config) -> Family:
    """The table row of a transformers config; ValueError if there is none."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"no family is known for model_type {config.model_type!r}; known: {sorted(FAMILIES)}. "
            "Add one with gatepack.register_family(model_type, gatepack.Family(...))"
        )
    return FAMILIES[config.model_type]
