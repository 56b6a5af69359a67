"""MobileLLM for the transformers library, each shared block stored once.

Ships in compact Hugging Face folders with model.py beside it, as the code that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs: imports nothing but
torch and transformers, and model.py by its relative name. Letters as there.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import Decoder, grouped_attention


class MobileLLMConfig(PretrainedConfig):
    """config.json of a compact folder.

    Attributes:
      mobilellm: "config" defines the model, with the names of `mobilellm_jax.ModelConfig`;
        "visits" are the executions of its blocks, each with the fields of `model.Visit`.
      num_hidden_layers: slots of the cache, for what makes caches. The other keys with the names
        of Llama say once more what libraries ask for.
    """

    model_type = "mobilellm_jax"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, mobilellm=None, use_cache=True, **kwargs):
        self.mobilellm = mobilellm
        self.use_cache = use_cache
        super().__init__(**kwargs)


class CachedAttention:
    """What the decoder's visits attend to: the tokens of this call and those in `cache`, if any.

    Args:
      cache: a `transformers.Cache` with a layer for each slot.
      places_T: of the tokens of this call in the cache.
      mask: None; `[B, S]`, 0 where a token of the cache or this call is padding; or what is added
        to the scores (or True where a key is visible) `[B, 1, T, S]`.
      is_reread: whether keys and values of a slot are asked for again within this call.
    """

    def __init__(self, cache, places_T, mask, is_reread: bool):
        self._cache, self._places_T, self._mask = cache, places_T, mask
        self._is_reread, self._is_prepared = is_reread, False
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, attention, slot, q_BTNH, k_BTKH=None, v_BTKH=None):
        if k_BTKH is None:
            k_BSKH, v_BSKH = self._held[slot]
        else:
            k_BSKH, v_BSKH = self._stored(slot, k_BTKH, v_BTKH)
            if self._is_reread:
                self._held[slot] = k_BSKH, v_BSKH
        S = k_BSKH.shape[1]
        if self._mask is None and q_BTNH.shape[1] == S:
            return attention.among_themselves(q_BTNH, k_BSKH, v_BSKH)
        if not self._is_prepared:
            self._mask, self._is_prepared = self._visible(attention, S), True
        return grouped_attention(q_BTNH, k_BSKH, v_BSKH, mask=self._mask)

    def _stored(self, slot, k_BTKH, v_BTKH):
        if self._cache is None:
            return k_BTKH, v_BTKH
        places = {"cache_position": self._places_T}  # for static caches of transformers 4
        k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        k_BKSH, v_BKSH = self._cache.update(k_BKTH, v_BKTH, slot, places)
        return k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2)

    def _visible(self, attention, S: int):
        """Which keys each query sees. A cache of static size has more keys than tokens."""
        if self._mask is not None and self._mask.dim() == 4:
            return self._mask
        keys_S, queries_T1 = torch.arange(S, device=self._places_T.device), self._places_T[:, None]
        visible_TS = attention.visible(queries_T1, keys_S)
        if self._mask is None:
            return visible_TS
        real_BS = F.pad(self._mask.to(torch.bool), (0, S - self._mask.shape[1]))
        # Padding sees itself: a row without any visible key has no defined result.
        return (visible_TS & real_BS[:, None, None, :]) | (keys_S == queries_T1)


class MobileLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; everything that `generate` and `Trainer` ask of one."""

    config_class = MobileLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MobileLLMConfig):
        super().__init__(config)
        c = SimpleNamespace(**config.mobilellm["config"])
        c.visits = [SimpleNamespace(**visit) for visit in config.mobilellm["visits"]]
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Logits `[B, T, V]` (of the last `logits_to_keep` tokens), and the loss of `labels`."""
        if output_attentions or output_hidden_states:
            raise ValueError("attentions and hidden states of the blocks are not given out")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        places_T = start + torch.arange(input_ids.shape[1], device=input_ids.device)
        if position_ids is None:
            position_ids = places_T
        attend = CachedAttention(past_key_values, places_T, attention_mask, self.model.rereads)
        x_BTD = self.model(input_ids, attend, position_ids.expand_as(input_ids))
        # 0 keeps all; a tensor names the places.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(loss, logits, past_key_values)
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.mobilellm["config"]["vocab_size"] = embeddings.num_embeddings
        return embeddings
