"""README.md of a Hugging Face folder: what a person needs to know to use the model right."""

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import count_params, kv_cache_bytes_per_token
from mobilellm_jax.model_bundle import ModelBundle

_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mobilellm
- on-device
- jax
---
"""
_ORDERS = {
    "immediate": "each block {R} times in a row",
    "repeat_all": "all blocks in order, {R} times over",
    "reverse": "all blocks {R} times over, every second time in reverse order",
}


def model_card(model: ModelBundle, form: str, dtype: str, *, has_tokenizer: bool) -> str:
    """The text of README.md.

    Args:
      form: "expanded" or "compact".
      dtype: of the weights.
      has_tokenizer: whether the folder has a tokenizer that transformers loads.
    """
    parts = [
        _FRONT_MATTER,
        "# A small language model\n",
        _table(model.config, form, dtype, model.provenance.step),
        _beginning(model),
        _usage(form, has_tokenizer),
        "Written by [mobilellm_jax](https://arxiv.org/abs/2402.14905), small on-device language "
        "models in JAX.\n",
    ]
    return "\n".join(part for part in parts if part)


def _table(config: ModelConfig, form: str, dtype: str, step: int | None) -> str:
    c = config
    heads = f"{c.num_heads} query heads, {c.num_kv_heads} key/value heads of {c.head_dim}"
    rows = {
        "architecture": "MobileLLM, a decoder of the Llama kind ([arXiv 2402.14905]"
        "(https://arxiv.org/abs/2402.14905))",
        "parameters": f"{count_params(c):,}, {dtype}",
        "blocks": f"{c.num_layers} stored, {c.depth} run; width {c.embed_dim}, {heads}",
        "layer sharing": _sharing(c, form),
        "context": f"{c.max_seq_len} tokens",
        "vocabulary": f"{c.vocab_size} tokens, {'tied' if c.tie_embeddings else 'separate'} head",
        "cache": f"{kv_cache_bytes_per_token(c):,} bytes per token in 16 bits",
    }
    if step is not None:
        rows["trained for"] = f"{step} steps"
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _sharing(config: ModelConfig, form: str) -> str:
    if config.sharing == "none":
        return "none"
    order = _ORDERS[config.sharing].format(R=config.num_repeats)
    keys = {
        "own": "each visit has its own keys and values",
        "first_visit": "later visits attend to the keys and values of the first",
    }[config.shared_kv]
    stored = {
        "expanded": "stored once per visit, as Llama needs it",
        "compact": "stored once",
    }[form]
    return f"{order}; {keys}; {stored}"


def _beginning(model: ModelBundle) -> str:
    if model.tokenizer is None or model.tokenizer.bos_id is None:
        return ""
    if model.prompt.bos is False:
        return (
            "**BOS.** In training, documents did not begin with BOS; the tokenizer of this folder "
            "adds none.\n"
        )
    trained = "In training, documents began with BOS. " if model.prompt.bos else ""
    return (
        f"**BOS.** {trained}The tokenizer of this folder adds it; apps that tokenize by themselves "
        "must do so too (in ExecuTorch's runner: `num_bos=1`).\n"
    )


def _usage(form: str, has_tokenizer: bool) -> str:
    trust = ", trust_remote_code=True" if form == "compact" else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("."{trust})')
    if has_tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=50)",
            "print(tokenizer.decode(output[0]))",
        ]
    else:
        lines[0] = "from transformers import AutoModelForCausalLM"
    code = "\n".join(["```python", *lines, "```"])
    if form == "expanded":
        return code + "\n"
    return (
        f"{code}\n\nThe code that this runs is in `modeling_mobilellm.py` and `model.py`; "
        "`model.py` needs nothing but torch.\n"
    )
