"""Stage 6, export: makes vLLM take the folders that export(format="hf") writes.

vLLM calls register in each of its processes (entry point vllm.general_plugins). Models are named
and not imported here, because importing them would start CUDA before vLLM forks.
"""

ARCHITECTURES = ("PackedLlamaForCausalLM", "PackedMistralForCausalLM", "PackedQwen2ForCausalLM")


def register() -> None:
    """Adds the architectures that vLLM does not know yet to its registry."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"gatepack.vllm_models:{name}")
