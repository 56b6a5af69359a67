"""`.litertlm` files: a model for LiteRT-LM, Google's runtime for language models on phones.

The conversion is litert-torch's own, of the expanded Hugging Face folder; the metadata is ours. It
runs in a process of its own: litert-torch changes classes of transformers for good, and what it
writes depends on what was imported before it.
"""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import write_hf
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE
from mobilellm_jax.tokenizers.tokenizer import check_vocabulary

# litert-torch's names of its recipes. Its int8 is one scale per row of a weight matrix, the
# embedding included; activations are rounded to int8 for each product, by the token.
_RECIPES = {"fp32": "none", "int8": "dynamic_wi8_afp32"}
_PREFILL_LENGTH = 128  # litert-torch's own default
_SCHEMA = "tensorflow.lite.python.schema_py_generated"

# litert-torch loads a tokenizer of transformers, which plays no part: the file gets our
# tokenizer.model, whether or not transformers can read it.
_EMPTY_TOKENIZER = {
    "tokenizer.json": {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}

# LiteRT-LM gives a template the content of a message as a list of parts, [{"type": "text", "text":
# ...}], and a template that expects a string would put that list into the prompt.
_JOIN_PARTS = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set joined = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set joined.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set joined.text = joined.text ~ part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- set plain.messages = plain.messages + [{'role': message['role'], 'content': joined.text}] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""


def write_litertlm(
    path: Path,
    model: ModelBundle,
    *,
    weight_type: str,
    context_length: int,
) -> None:
    """Writes a file that LiteRT-LM runs. Shared blocks and a tied head are stored once.

    The runtime stops at each of the model's stop ids. Two files of the same model differ:
    litert-torch puts the date and a random number into them.

    Args:
      path: the file, in a folder that is there; temporary files are put next to it.
      model: its parameters in any float dtype, on any device. The SentencePiece model goes into the
        file as it is. LiteRT-LM gives a chat template `role` and `content` of the messages and ""
        for `bos_token`; it puts BOS in front of the prompt by itself.
      weight_type: "fp32", or "int8" for litert-torch's default (`dynamic_wi8_afp32`).
      context_length: most tokens of prompt and answer together.

    Memory: up to 8 times the fp32 weights, in the process that converts.

    Raises:
      UserError: Llama cannot express the model (ReLU, `first_visit`), there is no tokenizer with
        EOS that fits, an argument is out of range, litert-torch is not installed, or it failed.
    """
    for module in ("litert_torch", "litert_lm_builder"):
        if importlib.util.find_spec(module) is None:  # importing litert_torch takes seconds
            import_extra(module, "litert")
    if weight_type not in _RECIPES:
        raise UserError(f"weight_type = {weight_type!r}: use one of {', '.join(_RECIPES)}")
    config = model.config
    if not 2 <= context_length <= config.max_seq_len:
        raise UserError(
            f"{path}: context_length = {context_length} is out of range; use 2 to the model's "
            f"max_seq_len, {config.max_seq_len}"
        )
    # Prompts are read in whole chunks, so LiteRT-LM refuses prompts that end in a chunk for which
    # the cache has no room.
    prefill_length = min(_PREFILL_LENGTH, context_length)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".litert.") as temporary:
        source = Path(temporary) / "hf"
        source.mkdir()
        write_hf(source, ModelBundle(config=config, params=model.params))
        settings = _write_tokenizer(path, source, model, context_length)
        _run_converter(
            path,
            model=str(source),
            output_dir=temporary,
            prefill_lengths=[prefill_length],
            cache_length=-(-context_length // prefill_length) * prefill_length,
            quantization_recipe=_RECIPES[weight_type],
            **settings,
        )
        os.replace(Path(temporary) / "model.litertlm", path)


def _write_tokenizer(
    path: Path, source: Path, model: ModelBundle, context_length: int
) -> dict[str, str]:
    """Tokenizer and metadata into the folder `source`; the settings with their paths."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{path}: a .litertlm file cannot be without a tokenizer, and the model has none; put "
            "the tokenizer.model that it was trained with next to it"
        )
    check_vocabulary(tokenizer, model.config.vocab_size, MODEL_FILE)
    if not model.stop_ids:
        raise UserError(
            "tokenizer.model: has no EOS, which LiteRT-LM needs to run a model at all; use another "
            "format"
        )
    for name, content in _EMPTY_TOKENIZER.items():
        (source / name).write_text(json.dumps(content))
    model_file, metadata = source / MODEL_FILE, source / "llm_metadata.pb"
    model_file.write_bytes(tokenizer.files[MODEL_FILE])
    metadata.write_bytes(_llm_metadata(model, context_length))
    return {
        "tokenizer_path_override": str(model_file),
        "litert_lm_llm_metadata_override": str(metadata),
    }


def _llm_metadata(model: ModelBundle, context_length: int) -> bytes:
    """The message `LlmMetadata`; litert-torch's own has the length of the cache as the context."""
    proto = import_extra("litert_lm_builder.runtime.proto.llm_metadata_pb2", "litert")
    metadata = proto.LlmMetadata(max_num_tokens=context_length)
    metadata.llm_model_type.generic_model.SetInParent()
    if model.bos_id is not None:
        metadata.start_token.token_ids.ids.append(model.bos_id)
    for stop_id in model.stop_ids:
        metadata.stop_tokens.add().token_ids.ids.append(stop_id)
    metadata.suppress_tokens.ids.extend(_suppressed(model))
    if model.prompt.chat_template is not None:
        metadata.jinja_prompt_template = _JOIN_PARTS + model.prompt.chat_template
    return metadata.SerializeToString()


def _suppressed(model: ModelBundle) -> list[int]:
    """The ids without a piece, in a padded vocabulary: one would end the answer with an error.

    LiteRT-LM 0.18.1 with a list of suppressed ids gives no id without a piece, in the list or not.
    """
    without_piece = range(model.tokenizer.vocab_size, model.config.vocab_size)
    stops = [i for i in model.stop_ids if i in without_piece]
    suppressed = [i for i in without_piece if i not in stops]
    if stops and suppressed:
        raise UserError(
            f"the model stops at the id {stops[0]}, for which tokenizer.model has no piece, and "
            f"LiteRT-LM cannot tell it from the {len(suppressed)} unused ids of the vocabulary; "
            "convert to another format"
        )
    return suppressed


def _run_converter(path: Path, **settings: Any) -> None:
    """`_convert(**settings)` in a new process, without its many messages."""
    search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "no message"
        if done.returncode < 0:
            reason = f"ended by signal {-done.returncode}, most likely for lack of memory"
        raise UserError(
            f"{path}: litert-torch could not convert the model ({reason:.300}); free memory or "
            "disk space, or use another format"
        )


def _convert(**settings: Any) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        # litert-torch 0.10.0 imports TensorFlow's code for the .tflite schema, in a module for
        # image models, but does not declare TensorFlow. ai_edge_litert has the same generated code.
        names = _SCHEMA.split(".")
        for end in range(1, len(names)):
            # With a spec, as torch asks for it.
            spec = importlib.machinery.ModuleSpec(".".join(names[:end]), None, is_package=True)
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        schema = import_extra("ai_edge_litert.schema_py_generated", "litert")
        sys.modules[_SCHEMA] = schema
        sys.modules[_SCHEMA.rpartition(".")[0]].schema_py_generated = schema
    import_extra("litert_torch.generative.export_hf.export", "litert").export(**settings)


if __name__ == "__main__":
    _convert(**json.loads(sys.argv[1]))
