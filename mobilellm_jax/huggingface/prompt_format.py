"""How the files of a folder have a text put to its model: BOS, the ids that stop, chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from mobilellm_jax.errors import UserError
from mobilellm_jax.model_bundle import check_stop_ids
from mobilellm_jax.storage.untrusted import read_json, safe_child
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"


def read_prompt_format(
    folder: Path, config_values: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, Any]:
    """What the folder says, as in `ModelBundle.to_record`, without what it does not say.

    Args:
      config_values: the content of config.json.
      tokenizer: of the folder; None if it has none that we read.
      vocab_size: of the model.

    Raises:
      UserError: a file that cannot be read, or a value that means nothing, with file and key.
    """
    file = safe_child(folder, TOKENIZER_CONFIG)
    tokenizer_config = read_json(file) if file.exists() else {}
    known = {
        "bos": False if tokenizer_config.get("add_bos_token") is False else None,
        "chat_template": _chat_template(folder, tokenizer_config),
        "stop_ids": _stop_ids(folder, config_values, tokenizer, vocab_size),
    }
    return {key: value for key, value in known.items() if value is not None}


def _stop_ids(
    folder: Path, config_values: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> list[int] | None:
    """All ids that config.json and generation_config.json name; None for the tokenizer's EOS."""
    file = safe_child(folder, GENERATION_CONFIG)
    generation = read_json(file) if file.exists() else {}
    found: dict[int, None] = {}
    for name, values in (("config.json", config_values), (GENERATION_CONFIG, generation)):
        value = values.get("eos_token_id")
        ids = value if isinstance(value, list) else None if value is None else [value]
        check_stop_ids(ids, vocab_size, f"{folder / name}: eos_token_id")
        found |= dict.fromkeys(ids or ())
    if not found or (tokenizer is not None and list(found) == [tokenizer.eos_id]):
        return None
    return list(found)


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    if (file := safe_child(folder, CHAT_TEMPLATE)).exists():
        try:
            return file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
    template = tokenizer_config.get("chat_template")
    if template is not None and not isinstance(template, str):
        logging.warning(
            "%s: chat_template is no text but a list of several; not read",
            folder / TOKENIZER_CONFIG,
        )
        return None
    return template
