"""Randomly initialised Hugging Face models of every family, tiny, by the families' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VERSION = str(transformers.__version__)
# No multiple of anything: padding must come and go.
VOCAB = 131
TOKENS = [[5, 130, 7, 0, 99, 4, 4, 60, 22, 101], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]

KINDS = ("llama", "llama-tied-scaled", "llama-bias", "gpt2", "gpt2-untied")

# Every other family once or twice: Hugging Face's class and what is said of it. Windows are shorter
# than the ten tokens above.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict]] = {
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 12}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, some windows": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, tied, windows": (
        "Qwen3", {
            "head_dim": 16, "tie_word_embeddings": True, "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] + [
                "full_attention"],
        },
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, windows, bias": (
        "SmolLM3", {
            "no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 3,
            "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 4}),
    "phi3, partial": ("Phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "neox": ("GPTNeoX", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "neox, one after the other, tied": (
        "GPTNeoX", {
            "use_parallel_residual": False, "hidden_act": "gelu_new", "tie_word_embeddings": True,
        },
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 4}),
    "qwen3 moe": ("Qwen3Moe", {
        "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3 moe, windows": ("Qwen3Moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 3}),
    "opt": ("OPT", {"ffn_dim": 48}),
    "opt, gelu, no bias": (
        "OPT", {"ffn_dim": 48, "activation_function": "gelu", "enable_bias": False,
                "tie_word_embeddings": False},
    ),
}  # fmt: skip


def make_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A transformers model of one of `KINDS` or `FAMILIES`; norms and biases are random too.

    Every matrix is five times what the class draws, so that logits have some size.
    """
    torch.manual_seed(seed)
    if kind in FAMILIES:
        name, options = FAMILIES[kind]
        config = getattr(transformers, f"{name}Config")(**_SIZES, **options)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    elif kind.startswith("gpt2"):
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            tie_word_embeddings=kind == "gpt2",
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        if "scaled" in kind:
            rope.update(
                rope_type="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
                rope_theta=10000.0,
            )
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rope_parameters=rope,
            tie_word_embeddings="tied" in kind,
            head_dim=12,
            attention_bias="bias" in kind,
            mlp_bias="bias" in kind,
            rms_norm_eps=1e-6,
        )
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            else:
                parameter.mul_(5.0)  # logits of some size
    return model.eval()


def their_logits(folder: Path, tokens: list[list[int]] = TOKENS) -> torch.Tensor:
    """Float32 logits `(B, S, V)` of a folder's model, as transformers loads and computes it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(tokens)).logits
    return logits
