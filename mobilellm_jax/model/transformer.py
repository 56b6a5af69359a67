"""`MobileLLM`: one module for every model of the paper.

The blocks' weights are stacked on a leading `layers` axis and run by `nn.scan`, whatever the
sharing order and however the layers are executed: layer sharing scans over the same weights again,
so a shared block exists once in memory, in the gradient and on disk.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.attention import KeyValue, rope_tables
from mobilellm_jax.model.attention_kernels import ATTENTION_KINDS, attention_saveable
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import Block, RMSNorm, TokenContext, constrain

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention_saveable
    ),
    "attention": attention_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed; none of it changes the weights or, but for rounding, the result.

    Attributes:
      dtype: of activations and matrix products, "float32" or "bfloat16".
      remat: what the backward pass recomputes: "none" (keep all), "dots" (keep only the results
        of weight matmuls and of attention), "attention" (only the latter and the input of each
        block visit) or "full" (keep only the input of each block visit). In a scan over layers
        "dots" is faster than "none" everywhere: what is kept has to be written to memory twice.
      unroll_layers: unroll the scan over layers (faster on GPUs, slower to compile).
      attention: "auto", "xla", "cudnn" or "splash" (see `attention_kernels.choose_attention`).
    """

    dtype: str = "float32"
    remat: str = "dots"
    unroll_layers: bool = False
    attention: str = "auto"

    def __post_init__(self):
        for name, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("remat", tuple(REMAT_POLICIES)),
            ("attention", ATTENTION_KINDS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"execution.{name} = {value!r}: use one of {', '.join(choices)}")


class MobileLLM(nn.Module):
    """Deep and thin decoder with optional layer sharing (arXiv 2402.14905).

    Usage: `MobileLLM(config).apply({"params": params}, tokens)` gives fp32 logits `[B, T, V]`.
    The other public methods are called as `apply(..., method="hidden_states")`.
    """

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (c.vocab_size, c.embed_dim),
            jnp.float32,
        )
        if not c.tie_embeddings:
            self.head = self.param(
                "head",
                nn.with_logical_partitioning(init, ("embed", "vocab")),
                (c.embed_dim, c.vocab_size),
                jnp.float32,
            )
        self.blocks = Block(c, self.execution.attention)
        self.final_norm = RMSNorm(c.norm_eps)

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """fp32 logits `[B, T, V]` of the token after each position.

        Args:
          tokens_BT: int token ids.
          segment_ids_BT: when given, tokens attend within their own segment only.
        """
        return self.logits(self.hidden_states(tokens_BT, segment_ids_BT))

    def hidden_states(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        embedded_BTD: jax.Array | None = None,
    ) -> jax.Array:
        """What the head is applied to, `[B, T, D]`: for losses that never hold all logits.

        Args:
          embedded_BTD: what `vocabulary.look_up` found for the tokens; None looks it up here.
        """
        x_BTD, _ = self._run(tokens_BT, segment_ids_BT=segment_ids_BT, embedded_BTD=embedded_BTD)
        return x_BTD

    def logits(self, hidden: jax.Array) -> jax.Array:
        """fp32 logits `[..., V]` of hidden states `[..., D]`."""
        if self.config.tie_embeddings:
            head_VD = self.embedding.astype(hidden.dtype)
            return jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32)
        head_DV = self.head.astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, head_DV, preferred_element_type=jnp.float32)

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, KeyValue]:
        """Hidden states `[B, T, D]`, and the keys and values to go on from: `decoding.make_cache`.

        Prompts of different lengths are padded on the right. Keys and values are
        `[L, R', B, K, T, H]`, R' = `ModelConfig.num_cached_visits`.
        """
        return self._run(tokens_BT, collect_key_values=True)

    def _run(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        collect_key_values: bool = False,
        embedded_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Embeds, runs all visits and the final norm; key/values are `[L, R', B, K, T, H]`."""
        c = self.config
        positions_BT = jnp.arange(tokens_BT.shape[1])[None, :]
        context = TokenContext(
            rope=rope_tables(positions_BT, c.head_dim, c.rope_theta),
            segment_ids=segment_ids_BT,
        )
        if embedded_BTD is None:
            embedded_BTD = self.embedding[tokens_BT]
        x_BTD = embedded_BTD.astype(self.execution.dtype)
        x_BTD = constrain(x_BTD, ("batch", "seq", "act_embed"))
        x_BTD, fresh = self._run_blocks(x_BTD, context, collect_key_values)
        return self.final_norm(x_BTD), fresh

    def _run_blocks(self, x_BTD, context, collect_key_values):
        """Sweeps over the stored blocks in the order of `config.sharing`.

        "none" and "immediate" are one sweep that visits each block R times in a row; the other
        orders are R sweeps of one visit each. The repeats are a Python loop in the traced body
        (R is 2 to 4): the first visit is then a different program from the later ones for
        `first_visit`, and XLA sums a shared block's gradient once per block.
        """
        c = self.config
        one_sweep = c.sharing in ("none", "immediate")
        num_visits = c.num_repeats if one_sweep else 1
        share_first = c.shared_kv == "first_visit"
        num_sweeps = c.num_repeats // num_visits
        # Keys and values leave the scan where they are asked for or read by later sweeps.
        needed = collect_key_values or (share_first and num_sweeps > 1)
        given, collected = None, []
        for sweep in range(num_sweeps):
            visits = range(sweep * num_visits, (sweep + 1) * num_visits)
            run = nn.scan(
                self._layer_visits(visits, needed and (sweep == 0 or not share_first)),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_layers,
                reverse=c.sharing == "reverse" and sweep % 2 == 1,
                unroll=c.num_layers if self.execution.unroll_layers else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD, fresh = run(self.blocks, x_BTD, context, given)
            if fresh is not None:
                collected.append(fresh)
                if share_first and num_sweeps > 1:
                    given = jax.tree.map(lambda kv: kv[:, 0], fresh)
        if not collect_key_values:
            return x_BTD, None
        return x_BTD, jax.tree.map(lambda *kvs: jnp.concatenate(kvs, axis=1), *collected)

    def _layer_visits(self, visits: range, collect: bool):
        """The body of the scan: the given visits of one block, one after the other."""
        share_first = self.config.shared_kv == "first_visit"

        def visit(block, x_BTD, context, given):
            return block(x_BTD, context, given)

        if (policy := REMAT_POLICIES[self.execution.remat]) is not None:
            # Without a loop around it, XLA would merge the recomputation with the original.
            visit = nn.remat(visit, policy=policy, prevent_cse=self.execution.unroll_layers)

        def body(block, x_BTD, context, given):
            collected = []
            for _ in visits:
                x_BTD, fresh = visit(block, x_BTD, context, given)
                if share_first:
                    given = fresh
                if collect and not (share_first and collected):
                    collected.append(fresh)
            if not collect:
                return x_BTD, None
            return x_BTD, jax.tree.map(lambda *kvs: jnp.stack(kvs), *collected)

        return body


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh fp32 parameters: N(0, `init_std`) matrices, unit norms; a plain nested dict."""
    return jax.jit(lambda key: nn.unbox(_init_boxed(config, key)))(key)


def abstract_params(config: ModelConfig) -> dict:
    """The shapes and dtypes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> dict:
    """The parameter tree with each array's logical axes as a `PartitionSpec`."""
    boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    return nn.get_partition_spec(boxed)


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict:
    # The weights do not depend on how often they are visited; visiting once compiles faster.
    visited_once = dataclasses.replace(config, sharing="none", num_repeats=1, shared_kv="own")
    return MobileLLM(visited_once).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
