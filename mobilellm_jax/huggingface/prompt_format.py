"""How the files of a folder have a text put to its model: BOS, the ids that stop, chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from mobilellm_jax.errors import UserError
from mobilellm_jax.model_bundle import check_stop_ids
from mobilellm_jax.storage.exports import OWN_KEY
from mobilellm_jax.storage.untrusted import read_json, safe_child
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_JSON = "tokenizer.json"


def read_prompt_format(
    folder: Path, config_values: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, Any]:
    """Reads the folder's prompt format as in `ModelBundle.to_record`, but for what is not known.

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
        "bos": _bos(folder, config_values, tokenizer_config, tokenizer),
        "chat_template": _chat_template(folder, tokenizer_config),
        "stop_ids": _stop_ids(folder, config_values, tokenizer, vocab_size),
    }
    return {key: value for key, value in known.items() if value is not None}


def _bos(
    folder: Path,
    config_values: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> bool | None:
    """False where transformers 5 puts no BOS in front of a text; None where it does, or unknown.

    The post-processor of tokenizer.json decides alone; where there is no such file, add_bos_token.
    """
    if (file := safe_child(folder, _TOKENIZER_JSON)).exists():
        return _post_processor_bos(file, tokenizer)
    if OWN_KEY in config_values or tokenizer is None:
        return None  # our exports have no such file where it cannot express the tokenizer
    source, said = folder / TOKENIZER_CONFIG, tokenizer_config.get("add_bos_token")
    if said is None:
        logging.warning(
            "%s: has no add_bos_token, and there is no %s: a text gets no BOS, as in transformers "
            "5; set it to true if the model was trained with BOS",
            source,
            _TOKENIZER_JSON,
        )
    elif not isinstance(said, bool):
        raise UserError(f"{source}: add_bos_token = {said!r:.80}: expected true or false")
    return None if said else False


def _post_processor_bos(file: Path, tokenizer: Tokenizer | None) -> bool | None:
    """As `_bos`, from the tokenizer.json at `file`."""
    try:
        before, behind = _ids_around(read_json(file).get("post_processor"))
    except (LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: post_processor is none that the tokenizers library reads "
            f"({type(error).__name__}: {str(error):.80}); get the file again"
        ) from error
    if behind:
        logging.warning(
            "%s: post_processor puts the ids %s behind a text; left out here, where a text is what "
            "the model goes on with",
            file,
            behind,
        )
    if tokenizer is not None and before not in ([], [tokenizer.bos_id]):
        logging.warning(
            "%s: post_processor puts the ids %s in front of a text, which are not the BOS of "
            "tokenizer.model (%s); left out here",
            file,
            before,
            tokenizer.bos_id,
        )
        return False
    return None if before else False


def _ids_around(processor: Any) -> tuple[list[int], list[int]]:
    """The ids that a post-processor of the tokenizers library puts before and behind one text."""
    kind = None if processor is None else processor["type"]
    if kind in (None, "ByteLevel"):
        return [], []
    if kind == "Sequence":
        before, behind = [], []
        for part in processor["processors"]:
            first, last = _ids_around(part)
            before, behind = [*first, *before], [*behind, *last]
        return before, behind
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    if kind != "TemplateProcessing":
        raise LookupError(kind)
    before, behind = [], []
    ids = before
    for piece in processor["single"]:
        if "Sequence" in piece:
            ids = behind
        else:
            ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, behind


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
