"""`MobileLLM`: one module for every model of the paper.

The blocks' weights are stacked on a leading `layers` axis and run by `nn.scan`, whatever the
sharing order and however the layers are executed: layer sharing scans over the same weights again,
so a shared block exists once in memory, in the gradient and on disk.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.model.attention import KeyValue, token_context
from mobilellm_jax.model.block import Block
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import REMAT_POLICIES, Execution
from mobilellm_jax.model.layers import RMSNorm, constrain, declare_matrix
from mobilellm_jax.model.visits import Visit

jax.tree_util.register_dataclass(Visit)  # so that a scan can go through the visits of all blocks


class MobileLLM(nn.Module):
    """Deep and thin decoder with optional layer sharing (arXiv 2402.14905).

    Usage: `MobileLLM(config).apply({"params": params}, tokens)` gives fp32 logits `[B, T, V]`.
    The other public methods are called as `apply(..., method="hidden_states")`.
    """

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self):
        c = self.config
        shape = (c.vocab_size, c.embed_dim)
        self.embedding = declare_matrix(self, "embedding", shape, ("vocab", "embed"), c.init_std)
        if not c.tie_embeddings:
            self.head = declare_matrix(self, "head", shape[::-1], ("embed", "vocab"), c.init_std)
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
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Final hidden states `[B, T, D]`, for losses that compute logits in slices."""
        return self.transform(self.embed(tokens_BT), segment_ids_BT)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings `[B, T, D]` of the tokens."""
        return self.embedding[tokens_BT]

    def transform(
        self, embedded_BTD: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Final hidden states `[B, T, D]` of embedded tokens."""
        return self._run(embedded_BTD, segment_ids_BT)[0]

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
        `[L, R', B, K, T, H]`, with the R' visits of each block that project them.
        """
        return self._run(self.embed(tokens_BT), collect_kv=True)

    def _run(
        self,
        embedded_BTD: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        collect_kv: bool = False,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Runs all visits and the final norm; keys and values as in `prefill`."""
        c = self.config
        positions_BT = jnp.arange(embedded_BTD.shape[1])[None, :]
        context = token_context(c, positions_BT, segment_ids_BT)
        x_BTD = embedded_BTD.astype(self.execution.dtype)
        x_BTD = constrain(x_BTD, ("batch", "seq", "act_embed"))
        x_BTD, key_value = self._run_sweeps(x_BTD, context, collect_kv)
        return self.final_norm(x_BTD), key_value

    def _run_sweeps(self, x_BTD, context, collect_kv):
        """Each sweep over the blocks is a scan.

        The repeats within a sweep are a Python loop in the traced body (R is 2 to 4): the first
        visit is then a different program from the later ones for `first_visit`, and XLA sums a
        shared block's gradient once per block.
        """
        c = self.config
        reused_kv, collected = None, []
        for number, sweep in enumerate(c.sweeps):
            # Keys and values leave the scan where they are asked for or read by later sweeps.
            reuse = c.shared_kv == "first_visit" and number < len(c.sweeps) - 1
            visits = [_stack_visits(c, repeat) for repeat in sweep.repeats]
            run = nn.scan(
                functools.partial(self._visit_block, collect_kv=collect_kv or reuse),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=c.num_layers,
                reverse=sweep.reverse,
                unroll=c.num_layers if self.execution.unroll_layers else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD, key_value = run(self.blocks, x_BTD, context, visits, reused_kv)
            if key_value is not None:
                collected.append(key_value)
                if reuse:
                    reused_kv = jax.tree.map(lambda kv: kv[:, 0], key_value)
        if not collect_kv:
            return x_BTD, None
        return x_BTD, jax.tree.map(lambda *kvs: jnp.concatenate(kvs, axis=1), *collected)

    def _visit_block(self, block, x_BTD, context, visits: list[Visit], reused_kv, *, collect_kv):
        """The body of the scan: the visits of one block in one sweep, one after the other."""

        def run(block, x_BTD, context, visit, reused_kv):
            return block(x_BTD, context, visit, reused_kv)

        if (policy := REMAT_POLICIES[self.execution.remat]) is not None:
            # Without a loop around it, XLA would merge the recomputation with the original.
            run = nn.remat(run, policy=policy, prevent_cse=self.execution.unroll_layers)
        collected = []
        for visit in visits:
            x_BTD, key_value = run(
                block, x_BTD, context, visit, None if visit.projects_kv else reused_kv
            )
            if visit.projects_kv:
                reused_kv = key_value
                collected.append(key_value)
        if not (collect_kv and collected):
            return x_BTD, None
        return x_BTD, jax.tree.map(lambda *kvs: jnp.stack(kvs), *collected)


def _stack_visits(config: ModelConfig, repeat: int) -> Visit:
    """The visits of all blocks at one repeat, in order of the blocks, as one with arrays `[L]`."""
    found = sorted((v for v in config.visits if v.repeat == repeat), key=lambda v: v.block)
    return jax.tree.map(lambda *numbers: np.array(numbers, np.int32), *found)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh fp32 parameters: N(0, `init_std`) matrices, unit norms; a plain nested dict."""
    return jax.jit(lambda key: nn.unbox(_init_boxed(config, key)))(key)


def abstract_params(config: ModelConfig) -> dict:
    """The shapes and dtypes of `init_params`, without computing anything."""
    return nn.unbox(_abstract_boxed(config))


def logical_axes(config: ModelConfig) -> dict:
    """The parameter tree with each array's logical axes as a `PartitionSpec`."""
    return nn.get_partition_spec(_abstract_boxed(config))


@functools.cache  # traced once for each model
def _abstract_boxed(config: ModelConfig) -> dict:
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict:
    # The weights do not depend on how often they are visited; visiting once compiles faster.
    visited_once = dataclasses.replace(config, sharing="none", num_repeats=1, shared_kv="own")
    return MobileLLM(visited_once).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
