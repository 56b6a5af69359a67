"""Runs a `.pte` program by ExecuTorch itself: the program, and the LLM runner of the phone apps."""

import json
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.extras import import_extra


class ExecuTorchRuntime:
    """A program in ExecuTorch on the CPU; a `mobilellm_jax.export.runtime.Runtime`.

    Attributes:
      metadata: what the program says of itself, by the names of its constant methods.
    """

    def __init__(self, path: str | Path, tokenizer_path: str | Path | None = None):
        """Loads the program.

        Args:
          path: a `.pte` file that `write_pte` wrote.
          tokenizer_path: of `tokenizer.json` or `tokenizer.model`.

        Raises:
          UserError: no program of a language model; no tokenizer; executorch is not installed.
        """
        runtime = _import_executorch()
        for file in filter(None, (path, tokenizer_path)):
            if not Path(file).is_file():
                raise UserError(f"{file}: no such file; convert the model again")
        self.name = f"ExecuTorch {metadata.version('executorch')}"
        self._path, self._tokenizer_path = str(path), str(tokenizer_path)
        self.has_tokenizer = tokenizer_path is not None
        self._tokenizer = load_tokenizer(self._tokenizer_path) if tokenizer_path else None
        try:
            program = runtime.Runtime.get().load_program(self._path)
            constants = program.method_names - {"forward"}
            values = {name: program.load_method(name).execute([]) for name in sorted(constants)}
            self._forward = program.load_method("forward")
            self.context_length = values["get_max_context_len"][0]
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path}: not an ExecuTorch program of a language model, or a damaged one "
                f"({str(error)[:200]}); convert the model again"
            ) from error
        self.metadata = {
            name: value if name == "get_eos_ids" else value[0] for name, value in values.items()
        }

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[T, V]`, the logits after each of the T tokens, read one at a time by the cache."""
        self._check_length(len(tokens))
        return np.stack([self._read([token], i) for i, token in enumerate(tokens)])

    def last_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[V]`, the logits after the last token of a prompt that is read at once.

        Raises:
          UserError: the prompt leaves no room in the context for the token that follows, which the
            runner refuses too.
        """
        self._check_length(len(tokens) + 1)
        return self._read(tokens, 0)

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The continuation by the likeliest token, cached, without a stop at EOS."""
        self._check_length(len(tokens) + num_tokens)
        chosen = []
        next_V = self._read(tokens, 0)
        for position in range(len(tokens), len(tokens) + num_tokens):
            chosen.append(int(next_V.argmax()))
            if len(chosen) < num_tokens:
                next_V = self._read(chosen[-1:], position)
        return chosen

    def stops_at(self, token: int) -> bool:
        """Whether the token is one of those that the program tells the runner to stop at."""
        return token in self.metadata["get_eos_ids"]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by ExecuTorch's C++ tokenizer, without BOS and EOS."""
        assert self._tokenizer is not None, "no tokenizer was given"
        return self._tokenizer.encode(text, 0, 0)

    def runner_greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The continuation by ExecuTorch's `TextLLMRunner`, which the phone libraries have too.

        It ends with an EOS. The runner takes and gives text; here each id is a word of its own.
        """
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Path(folder) / "tokenizer.json"
            tokenizer.write_text(_id_tokenizer(self.metadata["get_vocab_size"]))
            prompt = "".join(f"<{token}>" for token in tokens)
            pieces = self._generate(tokenizer, prompt, num_tokens, num_bos=0)
        return [int(piece.strip("<>")) for piece in pieces]

    def runner_text(self, prompt: str, num_tokens: int, num_bos: int) -> str:
        """The continuation of a text by the `TextLLMRunner`, with the tokenizer that was given.

        Raises:
          UserError: a token is a part of a character, which the runner's Python binding, unlike
            the phone libraries, cannot hand over.
        """
        try:
            return "".join(self._generate(self._tokenizer_path, prompt, num_tokens, num_bos))
        except UnicodeDecodeError as error:
            raise UserError(f"the runner cannot give Python half a character: {error}") from error

    def _generate(self, tokenizer_path, prompt: str, num_tokens: int, num_bos: int) -> list[str]:
        runner = import_extra("executorch.extension.llm.runner", "executorch")
        settings = runner.GenerationConfig(
            echo=False,
            max_new_tokens=num_tokens,
            temperature=0.0,
            num_bos=num_bos,
            warming=True,  # prints nothing; all else is the same
        )
        pieces: list[str] = []
        try:
            # A runner goes on where it stopped; a new one begins with an empty context.
            runner.TextLLMRunner(self._path, str(tokenizer_path)).generate(
                prompt, settings, pieces.append
            )
        except RuntimeError as error:
            raise UserError(
                f"{self._path}: the runner failed ({error}); prompt and continuation have to fit "
                f"in the context of {self.context_length} tokens"
            ) from error
        return pieces

    def _read(self, tokens: Sequence[int], position: int) -> np.ndarray:
        """fp32 `[V]` after the last of some tokens, the first of which is at `position`."""
        import torch

        (logits_1V,) = self._forward.execute(
            [torch.tensor([list(tokens)]), torch.tensor([position])]
        )
        return logits_1V[0].numpy().copy()

    def _check_length(self, length: int) -> None:
        if length > self.context_length:
            raise UserError(
                f"{self._path}: {length} tokens do not fit in its context of "
                f"{self.context_length}; use fewer, or convert with a longer --context_length"
            )


def _import_executorch() -> ModuleType:
    """The runtime, with the operators of the programs that `write_pte` writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and executorch about their own insides
        runtime = import_extra("executorch.runtime", "executorch")
        import_extra("executorch.extension.llm.custom_ops.custom_ops", "executorch")
    return runtime


def load_tokenizer(path: str):
    """The C++ tokenizer that the runner takes for a file."""
    tokenizers = import_extra("pytorch_tokenizers", "executorch")
    is_json = path.endswith(".json")
    tokenizer = tokenizers.CppHFTokenizer() if is_json else tokenizers.CppSPTokenizer()
    try:
        tokenizer.load(path)
    except RuntimeError as error:
        raise UserError(
            f"{path}: ExecuTorch cannot load this tokenizer ({error}); pass the tokenizer.json or "
            "tokenizer.model beside the program"
        ) from error
    return tokenizer


def _id_tokenizer(vocab_size: int) -> str:
    """A tokenizer.json in which the id 7 is the word "<7>"."""
    words = [{"id": i, "content": f"<{i}>", "special": True} for i in range(vocab_size)]
    model = {"type": "BPE", "vocab": {"<0>": 0}, "merges": []}
    return json.dumps({"added_tokens": words, "pre_tokenizer": None, "model": model})
