"""Models by name, or from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib.planner.models import MODELS, Model

# Gated feed-forward parts whose activation does not say so.
_GATED = ("llama", "mistral", "mixtral", "qwen", "gemma", "olmo", "phi3")
# What the planner has no formula for, and where a config.json says that it is there.
_UNKNOWN = {
    "kv_lora_rank": "attention with latent keys and values (MLA)",
    "n_shared_experts": "experts that every token visits",
    "shared_expert_intermediate_size": "an expert that every token visits",
    "first_k_dense_replace": "layers without experts among those with",
    "mlp_only_layers": "layers without experts among those with",
}
_ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "rotary_dim", "alibi")


def from_config(path: str | Path) -> Model:
    """Read the sizes in a Hugging Face ``config.json`` (Llama, Mistral, Qwen, Mixtral, GPT-2).

    Raises:
        ValueError: it is no JSON, a size is missing or no size, or the model has what the planner
            has no formula for; says which.
    """
    config = _read(path)
    for key, what in _UNKNOWN.items():
        if config.get(key):
            raise ValueError(
                f"{path} has {key}, {what}, of which the planner knows nothing: describe the "
                "nearest model without as a planner.Model"
            )
    if config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{path} has experts in some layers only (decoder_sparse_step), of which the planner "
            "knows nothing: describe the nearest model as a planner.Model"
        )

    def size(*names: str, otherwise: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} in {path} is a whole number above 0, not {value!r}")
            return value
        if otherwise is None:
            listed = " or ".join(repr(name) for name in names)
            raise ValueError(f"{path} has no {listed}: add it, as a decoder's config.json has it")
        return otherwise

    kind = str(config.get("model_type", Path(path).stem))
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    act = str(config.get("hidden_act") or config.get("hidden_activation"))
    gated = act in ("silu", "swiglu") or kind.startswith(_GATED)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", otherwise=1)
    ffn = size("intermediate_size", "n_inner", otherwise=4 * hidden)
    learned = not gated and not any(config.get(key) for key in _ROTARY)
    return Model(
        name=str(config.get("_name_or_path") or kind),
        layers=size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        ffn=size("moe_intermediate_size", otherwise=ffn) if experts > 1 else ffn,
        vocabulary=size("vocab_size"),
        kv_heads=size("num_key_value_heads", otherwise=heads),
        gated=gated,
        tied=bool(config.get("tie_word_embeddings", not gated)),
        biased=not gated,
        positions=size("n_positions", "max_position_embeddings", otherwise=0) * learned,
        experts=experts,
        active=size("num_experts_per_tok") if experts > 1 else 1,
        head_size=size("head_dim", otherwise=0),
    )


def _read(path: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of JSON, or of its characters
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no sizes: a config.json is an object with names and values")
    if isinstance(config.get("text_config"), dict):
        raise ValueError(
            f"{path} is of a model of text and more: save its text_config as a config.json of its "
            "own, and take that"
        )
    return config


def model_named(name: str) -> Model:
    """A model of the catalogue, or of a path to a ``config.json``.

    Raises:
        ValueError: there is no such model; names those that there are.
    """
    if name in MODELS:
        return MODELS[name]
    if name.endswith(".json"):
        return from_config(name)
    raise ValueError(
        f"no model is called {name!r}: take one of {', '.join(MODELS)}, or the path to a "
        "config.json"
    )
