"""Writes a model as an ExecuTorch program (`.pte`) for the LLM runners of the phone libraries.

One path for every kind of model: the plain PyTorch module, with an attention that keeps keys and
values in buffers of the program and uses ExecuTorch's own operators for them. XNNPACK computes the
rest. ExecuTorch stores weights by their content, so a shared block is in the file once; a tied
embedding is there twice, for the lookup and for XNNPACK's head: the operator that could read the
lookup's copy takes five times as long for the head.
"""

import warnings
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.pytorch import module_from_params
from mobilellm_jax.huggingface.config import LLAMA_FIELDS
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.model.config import ModelConfig, check_expressible
from mobilellm_jax.model.costs import num_ffn_matrices
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

# Fields of ModelConfig that the program computes: its attention is an operator of its own.
_FIELDS = {*LLAMA_FIELDS, "ffn", "shared_kv"}


def write_pte(
    path: Path,
    model: ModelBundle,
    *,
    context_length: int,
) -> None:
    """Writes an fp32 program with the method `forward(tokens, position)` and the runner's metadata.

    `forward` takes int64 tokens `[1, T]`, T from 1 to `context_length`, and an int64 `[1]`, how
    many tokens it has read before; it returns the fp32 logits `[1, V]` of the last one. Keys and
    values stay in the program between calls: a position of 0 starts anew.

    Args:
      path: file to write, in an existing folder.
      model: its parameters in any float dtype, on any device.
      context_length: most tokens of prompt and continuation together; decides on the memory that
        the program takes (`ModelConfig.kv_cache_bytes_per_token` at 4 bytes per value).

    Raises:
      UserError: a context longer than the model's; parameters that do not belong to the config or
        are not finite; a tokenizer whose ids ExecuTorch cannot give; executorch is not installed.
      OSError: `path` cannot be written.
    """
    config = model.config
    check_expressible(config, _FIELDS, "an ExecuTorch program", "convert to another format")
    if model.tokenizer is not None:
        _check_tokenizer(model.tokenizer)
    if not 1 < context_length <= config.max_seq_len:
        raise UserError(
            f"a context of {context_length} tokens is not within 2 to model.max_seq_len = "
            f"{config.max_seq_len}; use another --context_length"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and executorch about their own insides
        import_extra("executorch.exir", "executorch")
        program = _cached_program(module_from_params(config, model.params), config, context_length)
        lowered = _lower(program, config, _metadata(model, context_length))
        executable = lowered.to_executorch()
    with open(path, "wb") as file:
        executable.write_to_file(file)


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """UserError for a tokenizer of which ExecuTorch gives other ids than SentencePiece.

    Where splits of a text are equally likely, as in runs of one character, its SentencePiece takes
    another one; only unigram models ask which is likelier.
    """
    trainer = sentencepiece_proto.ModelProto.FromString(tokenizer.files[MODEL_FILE]).trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        raise UserError(
            "tokenizer.model: ExecuTorch cannot give its ids, its algorithm is unigram; convert to "
            "another format, or train with a tokenizer of this project"
        )


def _cached_program(module, config: ModelConfig, context_length: int):
    """`module` with keys and values in buffers, as the `forward` that `write_pte` describes.

    The rotary tables are constants: sines of large angles differ between the kernels of phones.
    """
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers torch.ops)

    from mobilellm_jax.huggingface.remote_code.model import rotary_tables

    class CachedProgram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.lm_head = module.model, module.lm_head
            shape = (1, context_length, config.num_kv_heads, config.head_dim)
            for slot in range(config.num_cache_slots):
                self.register_buffer(f"keys_{slot}", torch.zeros(shape))
                self.register_buffer(f"values_{slot}", torch.zeros(shape))
            all_positions = torch.arange(context_length)[None]
            tables = rotary_tables(all_positions, config.head_dim, config.rope_theta)
            for name, table_1S1H in zip(("cosines", "sines"), tables, strict=True):
                self.register_buffer(name, table_1S1H[0, :, 0].contiguous())

        def forward(self, tokens_1T, position):
            start = position[0].item()
            torch._check(start >= 0)
            torch._check(start < context_length)
            torch._check(start + tokens_1T.shape[1] <= context_length)

            def attend(_, slot, q_1TNH, k_1TKH=None, v_1TKH=None):
                keys, values = getattr(self, f"keys_{slot}"), getattr(self, f"values_{slot}")
                if k_1TKH is not None:
                    torch.ops.llama.update_cache(k_1TKH, keys, start)
                    torch.ops.llama.update_cache(v_1TKH, values, start)
                return torch.ops.llama.custom_sdpa(q_1TNH, keys, values, start, is_causal=True)

            positions_T = position + torch.arange(tokens_1T.shape[1])
            rope = [table[positions_T][None, :, None] for table in (self.cosines, self.sines)]
            x_1TD = self.decoder.embed_tokens(tokens_1T)
            for visit in self.decoder.visits:
                x_1TD = self.decoder.layers[visit.block](x_1TD, rope, attend, visit)
            return self.lm_head(self.decoder.norm(x_1TD[:, -1]))

    return CachedProgram().eval()


def _lower(program, config: ModelConfig, metadata: dict[str, Any]):
    """The program with everything that XNNPACK can compute handed to it, checked."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    num_tokens = torch.export.Dim("num_tokens", min=1, max=metadata["get_max_context_len"])
    example = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        exported = torch.export.export(
            program, example, dynamic_shapes=({1: num_tokens}, None), strict=False
        )
    edge = to_edge_transform_and_lower(
        exported, partitioner=[XnnpackPartitioner()], constant_methods=metadata
    )
    _assert_delegated(edge.exported_program().graph_module, _count_linears(config))
    return edge


def _metadata(model: ModelBundle, context_length: int) -> dict[str, Any]:
    """Answers to the runner's questions (executorch, extension/llm/runner/constants.h).

    Both lengths are the context: a prompt longer than the first is read in pieces of it, and no
    prompt may fill the second.
    """
    return {
        "get_max_seq_len": context_length,
        "get_max_context_len": context_length,
        "get_vocab_size": model.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        **({} if model.bos_id is None else {"get_bos_id": model.bos_id}),
        "get_eos_ids": list(model.stop_ids),
    }


def _count_linears(config: ModelConfig) -> int:
    """Linear layers in one pass: those of every visit, and the head."""
    query_output_ffn = 2 + num_ffn_matrices(config)
    return config.depth * query_output_ffn + config.num_cache_slots * 2 + 1


def _assert_delegated(graph_module, num_linears: int) -> None:
    """A linear layer that XNNPACK does not take would run many times slower, without a word."""
    from executorch.devtools.backend_debug import get_delegation_info

    operators = get_delegation_info(graph_module).delegation_by_operator
    delegated = operators["aten_linear_default"].delegated
    assert delegated == num_linears, f"XNNPACK took {delegated} of {num_linears} linear layers"
