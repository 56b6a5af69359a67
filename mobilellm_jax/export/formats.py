"""The formats that `mobilellm convert` writes, in one table: writer, runtime, tolerance."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.huggingface_json import tokenizer_files


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a converted model may be from the JAX model.

    Attributes:
      mean_kl: KL divergence of the runtime's next-token distribution from JAX's, in nats, mean
        over positions.
      logits: largest difference of a logit; None where the format rounds more than the weights
        (activations, the cache), so that differences say little.
      exact: whether argmax and greedy tokens have to agree, but for ties. A tie is a choice whose
        JAX logit is as near to the largest as `logits` (or the measured difference) allows.
    """

    mean_kl: float
    logits: float | None = None
    exact: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
      title: what it is, in words.
      extra: of the package, that has its writer and its runtime.
      runtime_modules: what has to be installed to run it.
      file: what the app loads; None where that is the whole folder.
      tolerances: of the comparison with the JAX model, by dtype of the weights. The first dtype is
        the default.
      write: `(folder, model, dtype, context_length)`, into an empty folder.
      open: `(folder, context_length)`, the runtime with what was written.
      expands: whether shared blocks are stored once per visit.
    """

    title: str
    extra: str
    runtime_modules: tuple[str, ...]
    file: str | None
    tolerances: Mapping[str, Tolerance]
    write: Callable[[Path, ModelBundle, str, int], None]
    open: Callable[[Path, int], Runtime]
    expands: bool = False


def _write_hf(form: str):
    def write(folder: Path, model: ModelBundle, dtype: str, context_length: int) -> None:
        from mobilellm_jax.huggingface.folder import write_hf

        write_hf(folder, _shortened(model, context_length), form=form, dtype=dtype)

    return write


def _open_hf(folder: Path, context_length: int) -> Runtime:
    from mobilellm_jax.export.transformers_runtime import TransformersRuntime

    return TransformersRuntime(folder)


def _write_pte(folder: Path, model: ModelBundle, dtype: str, context_length: int) -> None:
    from mobilellm_jax.export.executorch.export import write_pte

    write_pte(folder / "model.pte", model, context_length=context_length)
    if model.tokenizer is not None:
        bos = model.prompt.begins_with_bos
        for name, content in tokenizer_files(model.tokenizer, context_length, bos).items():
            (folder / name).write_bytes(content)


def _open_pte(folder: Path, context_length: int) -> Runtime:
    from mobilellm_jax.export.executorch.runtime import ExecuTorchRuntime

    tokenizers = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = next((file for file in tokenizers if file.exists()), None)
    return ExecuTorchRuntime(folder / "model.pte", tokenizer)


def _write_gguf(folder: Path, model: ModelBundle, dtype: str, context_length: int) -> None:
    from mobilellm_jax.export.gguf.export import write_gguf

    write_gguf(
        folder / "model.gguf",
        _shortened(model, context_length),
        weight_type=_GGUF_TYPES[dtype],
        name="MobileLLM",
    )


def _open_gguf(folder: Path, context_length: int) -> Runtime:
    from mobilellm_jax.export.gguf.runtime import LlamaCppRuntime

    return LlamaCppRuntime(folder / "model.gguf", context_length)


def _write_litertlm(folder: Path, model: ModelBundle, dtype: str, context_length: int) -> None:
    from mobilellm_jax.export.litert.export import write_litertlm

    write_litertlm(
        folder / "model.litertlm",
        model,
        weight_type={"float32": "fp32", "int8": "int8"}[dtype],
        context_length=context_length,
    )


def _open_litertlm(folder: Path, context_length: int) -> Runtime:
    from mobilellm_jax.export.litert.runtime import LiteRtLmRuntime

    return LiteRtLmRuntime(folder / "model.litertlm")


def _shortened(model: ModelBundle, context_length: int) -> ModelBundle:
    """The model with the context that its file is to have."""
    config = dataclasses.replace(model.config, max_seq_len=context_length)
    return dataclasses.replace(model, config=config)


_GGUF_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_EXACT = Tolerance(mean_kl=1e-5, logits=1e-4)
_HF_TOLERANCES = {"float32": _EXACT, "bfloat16": _EXACT, "float16": _EXACT}

FORMATS: dict[str, Format] = {
    "hf": Format(
        title="Hugging Face folder, a plain LlamaForCausalLM",
        extra="torch",
        runtime_modules=("torch", "transformers"),
        file=None,
        tolerances=_HF_TOLERANCES,
        write=_write_hf("expanded"),
        open=_open_hf,
        expands=True,
    ),
    "hf_compact": Format(
        title="Hugging Face folder with shared blocks once, and the code that runs it",
        extra="torch",
        runtime_modules=("torch", "transformers"),
        file=None,
        tolerances=_HF_TOLERANCES,
        write=_write_hf("compact"),
        open=_open_hf,
    ),
    "pte": Format(
        title="ExecuTorch program",
        extra="executorch",
        runtime_modules=("executorch.runtime",),
        file="model.pte",
        tolerances={"float32": _EXACT},
        write=_write_pte,
        open=_open_pte,
    ),
    "gguf": Format(
        title="GGUF file for llama.cpp",
        extra="gguf",
        runtime_modules=("gguf", "llama_cpp"),
        file="model.gguf",
        tolerances={
            "float32": Tolerance(mean_kl=1e-5),
            "float16": Tolerance(mean_kl=1e-5),
            "q8_0": Tolerance(mean_kl=1e-3, exact=False),
            "q4_0": Tolerance(mean_kl=1e-3, exact=False),
        },
        write=_write_gguf,
        open=_open_gguf,
        expands=True,
    ),
    "litertlm": Format(
        title="LiteRT-LM file",
        extra="litert",
        runtime_modules=("ai_edge_litert.interpreter", "litert_lm", "litert_lm_builder"),
        file="model.litertlm",
        tolerances={
            "float32": _EXACT,
            "int8": Tolerance(mean_kl=1e-2, exact=False),
        },
        write=_write_litertlm,
        open=_open_litertlm,
    ),
}


def rounded_params(name: str, folder: Path, model: ModelBundle, dtype: str) -> dict | None:
    """fp32 parameters with the values that the written file holds; None where it rounds none.

    LiteRT's int8 weights are compared with the model before rounding.
    """
    if dtype in ("float32", "int8"):
        return None
    if name == "gguf":
        from mobilellm_jax.export.gguf.export import dequantized_params

        return dequantized_params(folder / "model.gguf", model.config)
    import jax

    rounding = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    return jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(rounding).astype(np.float32), model.params
    )
