"""A Hugging Face folder run by transformers, in fp32."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.config import AUTO_MAP, COMPACT_TYPE
from mobilellm_jax.huggingface.folder import remote_code
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.storage.untrusted import read_json, safe_child


class TransformersRuntime:
    """Implements `mobilellm_jax.export.runtime.Runtime`.

    Attributes:
      model: the transformers model.
    """

    def __init__(self, path: str | Path):
        """Loads a folder; of compact ones only those with the code of this very version.

        Raises:
          UserError: torch or transformers is not installed; the folder's code is not ours.
        """
        self._torch = import_extra("torch", "torch")
        transformers = import_extra("transformers", "torch")
        self.name = f"transformers {transformers.__version__}"
        self._folder = local_path(path)
        self.has_tokenizer = (self._folder / "tokenizer.json").exists()
        self._tokenizer = None
        self._options = {"local_files_only": True, "trust_remote_code": _has_our_code(self._folder)}
        with _quiet(transformers.utils.logging):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=self._torch.float32, **self._options
            ).eval()
        self._generation_config = copy.deepcopy(self.model.generation_config)
        self.model.generation_config.eos_token_id = None  # greedy does not stop
        self.context_length = self.model.config.max_position_embeddings

    def full_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[T, V]`, the logits after each of the tokens, all at once and without a cache."""
        return self._run(tokens, use_cache=False).logits[0].numpy()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        rows, cache = [], None
        for token in tokens:
            output = self._run([token], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].numpy())
        return np.stack(rows)

    def last_logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self._run(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].numpy()

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        prompt = self._torch.tensor([list(tokens)])
        output = self.model.generate(
            prompt,
            attention_mask=self._torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        return output[0, len(tokens) :].tolist()

    def stops_at(self, token: int) -> bool:
        """Whether `generate`, as the folder configures it, ends when the model says the token."""

        def say(_, scores_BV):
            forced = self._torch.full_like(scores_BV, -self._torch.inf)
            forced[:, token] = 0.0
            return forced

        output = self.model.generate(
            self._torch.tensor([[0]]),
            generation_config=self._generation_config,
            logits_processor=[say],
            max_new_tokens=2,
            do_sample=False,
        )
        return output.shape[1] == 2

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; UserError if the folder has no tokenizer.json."""
        if self._tokenizer is None:
            if not self.has_tokenizer:
                raise UserError(f"{self._folder}: has no tokenizer.json that transformers reads")
            transformers = import_extra("transformers", "torch")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                self._folder, **self._options
            )
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _run(self, tokens: Sequence[int], **options):
        with self._torch.no_grad():
            return self.model(self._torch.tensor([list(tokens)]), **options)


@contextlib.contextmanager
def _quiet(logging) -> Iterator[None]:
    """Without the progress bar of transformers, which is slower than its work here."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _has_our_code(folder: Path) -> bool:
    """Whether it is a compact folder; UserError if it runs other code than that of this version."""
    values = read_json(path := safe_child(folder, "config.json"))
    if values.get("model_type") != COMPACT_TYPE:
        return False
    # transformers runs what auto_map names, and reads other files than config.json if that says so.
    if values.get("auto_map") != AUTO_MAP or "configuration_files" in values:
        raise _not_ours(path)
    tokenizer = safe_child(folder, "tokenizer_config.json")
    if tokenizer.exists() and "auto_map" in read_json(tokenizer):
        raise _not_ours(tokenizer)
    for name, content in remote_code().items():
        path = safe_child(folder, name)
        if not path.is_file() or path.read_bytes() != content:
            raise _not_ours(path)
    return True


def _not_ours(path: Path) -> UserError:
    return UserError(
        f"{path}: is not the code of this version of mobilellm_jax, or names other code, and is "
        "not run; import the folder (mobilellm convert --from hf) and convert it again"
    )
