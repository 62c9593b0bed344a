"""
The DiJiang decoder: one class for LLaMA- and GPT-NeoX-type models, each layer linear, full or sliding attention.

With every layer `full_attention` its logits are those of the source model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_dijiang import DiJiangCache
from .configuration_dijiang import DiJiangConfig
from .decoder_modules import DiJiangMLP, DiJiangRotaryEmbedding, ProjectedAttention, build_norm
from .feature_map_base import FeatureMap
from .kept_heads import LinearMasks
from .layer_parts import Decay, LogScale, OutputGate
from .linear_attention_layer import DiJiangLinearAttention
from .linear_state import LinearState
from .memory_scores import LearnedScore
from .packing import PackedGroup, group_sequences, sequence_bounds
from .transformers_compat import CACHE_NAME, is_paged, one_cache, refuse_unknown_arguments, warn_of_untested_version

# out of a checkpoint in a folder transformers 5.9 copies only the files that this one imports, so it imports all of them
# isort: split
from .decode_step import StepWeights  # noqa: F401
from .decode_step_native import native_step  # noqa: F401
from .decode_step_native_source import SOURCE as STEP_SOURCE  # noqa: F401
from .decode_step_triton import triton_step  # noqa: F401
from .delta_rule import delta_rule  # noqa: F401
from .exact_attention_native import exact_is_native  # noqa: F401
from .exact_attention_native_source import SOURCE as EXACT_SOURCE  # noqa: F401
from .exact_memory import plan_memory  # noqa: F401
from .exponential_maps import ExponentialMap  # noqa: F401
from .feature_maps import build_feature_map  # noqa: F401
from .frequency import dct_matrix  # noqa: F401
from .kept_attention_native import native_attend_to_all  # noqa: F401
from .layer_exact_memory import ExactMemoryAttention  # noqa: F401
from .layer_linear_branch import LinearBranchAttention  # noqa: F401
from .layer_linear_heads import LinearHeadsAttention  # noqa: F401
from .layer_step import OneTokenAttention  # noqa: F401
from .linear_attention import linear_attention  # noqa: F401
from .linear_attention_chunk import CHUNK_SIZE  # noqa: F401
from .linear_attention_fla import fla_is_usable  # noqa: F401
from .linear_attention_native import native_is_usable  # noqa: F401
from .linear_attention_native_source import SOURCE  # noqa: F401
from .native_build import load_library  # noqa: F401
from .native_vectors_source import VECTORS  # noqa: F401
from .optional_kernel import OptionalKernel  # noqa: F401
from .simple_maps import Identity  # noqa: F401
from .window_attention import block_window_attention  # noqa: F401
from .window_attention_flex import window_attention  # noqa: F401


class DiJiangSoftmaxAttention(ProjectedAttention):
    """The source model's own attention, full or with a sliding window."""

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden_states, position_embeddings)[:3])
        cache = one_cache(past_key_values, cache)
        if is_paged(cache) and CACHE_NAME != "cache":
            kwargs["cache"] = cache  # the attention function updates it
        elif is_paged(cache):
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        elif cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        o, weights = self.softmax_attention(q, k, v, attention_mask, **kwargs)
        return self.o_proj(o.flatten(2)), weights


class DiJiangDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, one after the other or, if `parallel_residual`, both on the same input (GPT-NeoX)."""

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__()
        linear = config.attention_types[layer_idx] == "linear_attention"
        self.self_attn = (DiJiangLinearAttention if linear else DiJiangSoftmaxAttention)(config, layer_idx)
        self.mlp = DiJiangMLP(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.parallel_residual = config.parallel_residual

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if self.parallel_residual:
            return self.mlp(self.post_attention_layernorm(hidden_states)) + attention + hidden_states
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DiJiangPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization, which all heads share."""

    config: DiJiangConfig
    config_class = DiJiangConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiJiangDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay", "memory_score"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DiJiangDecoderLayer, "attentions": DiJiangSoftmaxAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # loading empties the buffers that __init__ filled, so the maps fill them again
        if isinstance(module, FeatureMap | LogScale | Decay | OutputGate | LearnedScore):
            module.reset_parameters()

    def cache_bytes(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """
        Bytes of the cache of one sequence of `tokens`, keys and values in `dtype`, by default the model's own: what
        `DiJiangCache.memory_bytes` finds after a prompt.
        """
        dtype = dtype or self.dtype
        config = self.config
        total = tokens * config.bytes_per_token(dtype.itemsize)
        of_sliding = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        if config.sliding_window is not None:
            total += config.attention_types.count("sliding_attention") * of_sliding * min(tokens, config.sliding_window - 1)
        for module in self.modules():
            if isinstance(module, DiJiangLinearAttention):
                k = torch.empty(1, 1, len(module.linear_heads), module.head_dim, dtype=dtype, device="meta")
                total += sum(x.nbytes for x in LinearState.empty(k, k, module.state_sizes).tensors())
        return total


class DiJiangModel(DiJiangPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: DiJiangConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DiJiangDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.rotary_emb = DiJiangRotaryEmbedding(config)
        self.gradient_checkpointing = False
        # a state cannot be rolled back, so generate() must refuse modes that propose tokens and reject some
        self._is_stateful = config.has_linear_layers
        warn_of_untested_version()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DiJiangCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: DiJiangCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        The last hidden states (B, T, hidden), and the cache.

        Args:
            input_ids: (B, T), or inputs_embeds: (B, T, hidden).
            attention_mask: (B, past + T), 1 for tokens and 0 for padding on either side.
            position_ids: (B, T). Default: counted over real tokens, so padding does not shift them. Where they do not
                rise by one, another sequence begins, which sees none of those before (packed rows, which get no cache).
            past_key_values: a `DiJiangCache` of the tokens before; a new one if `use_cache`.
            cache: the name of past_key_values from transformers 5.24 on; either will do with any version.
            kwargs: those of `EXTRA_ARGUMENTS` in transformers_compat.py. One is `cu_seq_lens_q` (N + 1,), instead of
                position_ids: where the sequences packed into a single row begin and end.

        Raises:
            TypeError: on any other keyword argument.
            ValueError: on neither or both inputs, a foreign cache, or inputs that linear layers cannot handle: masks that
                are not (B, past + T), is_causal=False, and packed rows with padding or a cache.
        """
        refuse_unknown_arguments(self, kwargs)
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        B, T = inputs_embeds.shape[:2]
        past = 0 if cache is None or is_paged(cache) else cache.get_seq_length()
        groups = None
        if self.config.has_linear_layers:
            refuse_what_linear_layers_cannot_do(past, T, attention_mask, cache, kwargs.get("is_causal"))
            cu_seqlens = kwargs.get("cu_seq_lens_q")
            if cu_seqlens is not None:
                cu_seqlens = cu_seqlens.to(inputs_embeds.device, torch.long)
            bounds = packed_bounds(B, T, attention_mask, position_ids, cu_seqlens, cache)
            if bounds is not None:
                groups = group_sequences(bounds, B * T)
                attention_mask = None
                if position_ids is None:
                    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
                    position_ids = (torch.arange(T, device=starts.device) - starts)[None]
        if use_cache and cache is None and groups is None:
            cache = DiJiangCache(self.config)

        if position_ids is None and torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=inputs_embeds.device).unsqueeze(0)

        masks = self.masks_by_layer_type(inputs_embeds, attention_mask, cache, position_ids, groups)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer, layer_type in zip(self.layers, self.config.attention_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,  # FlashAttention reads where packed sequences begin from them
                **by_its_name(cache),  # gradient checkpointing looks for it under that name
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **by_its_name(cache))

    def masks_by_layer_type(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        cache: Any,
        position_ids: Tensor,
        groups: list[PackedGroup] | None,
    ) -> dict[str, Any]:
        """Masks by layer type: `LinearMasks` for linear layers, transformers' own for softmax ones."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            CACHE_NAME: None if is_paged(cache) and CACHE_NAME != "cache" else cache,
            "position_ids": position_ids,
        }
        masks: dict[str, Any] = {}
        attention_types = self.config.attention_types
        if "linear_attention" in attention_types:
            new = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :].bool()
            if new is not None and not torch.compiler.is_compiling() and bool(new.all()):
                new = None
            kept = create_causal_mask(**arguments) if any(self.config.full_heads) else None
            masks["linear_attention"] = LinearMasks(groups if new is None else new, kept)
        if "full_attention" in attention_types:
            masks["full_attention"] = create_causal_mask(**arguments)
        if "sliding_attention" in attention_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return masks


def refuse_what_linear_layers_cannot_do(past: int, T: int, attention_mask: Any, cache: Any, is_causal: bool | None) -> None:
    """Raise ValueError on inputs that would silently give wrong results."""
    if is_causal is False:
        raise ValueError("is_causal=False: linear layers are causal; leave it out")
    if cache is not None and not hasattr(cache, "memory_bytes"):
        raise ValueError(f"{CACHE_NAME} is a {type(cache).__name__}; linear layers need a DiJiangCache")
    if torch.is_tensor(attention_mask) and (attention_mask.dim() != 2 or attention_mask.shape[1] != past + T):
        shape = tuple(attention_mask.shape)
        needed = f"(batch, {past + T}), {past} tokens of the past included"
        raise ValueError(f"attention_mask has shape {shape}; linear layers need {needed}")


def by_its_name(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of this version of transformers."""
    return {CACHE_NAME: cache}


def packed_bounds(
    B: int, T: int, attention_mask: Any, position_ids: Tensor | None, cu_seqlens: Tensor | None, cache: Any
) -> Tensor | None:
    """
    The bounds of the sequences packed into the rows, (N + 1,) with the rows laid end to end, or None if each row is one
    sequence: by position_ids (B, T) that restart, or by the `cu_seqlens` of a padding-free collator.

    Raises:
        ValueError: on packed rows with padding or with a cache, which holds one sequence per row, and on bounds that do not
            fit the row.
    """
    if T == 1 or (position_ids is None and cu_seqlens is None):
        return None
    bounds = None
    real = attention_mask[:, -T:].bool() if torch.is_tensor(attention_mask) else None
    if cu_seqlens is not None:
        bounds = cu_seqlens
        if B != 1 or len(bounds) < 2 or int(bounds[-1]) != T:
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {T} tokens of a single row, of which there are {B}")
        bounds = bounds if len(bounds) > 2 else None
    elif position_ids is not None:
        bounds = sequence_bounds(position_ids.expand(B, T), real)
    if bounds is None:
        return None
    if cache is not None:
        raise ValueError("a cache holds one sequence per row; packed rows need use_cache=False and no past_key_values")
    if real is not None and not bool(real.all()):
        raise ValueError("packed rows (position_ids that restart) with padding are not supported; leave the padding out")
    return bounds


class DiJiangForCausalLM(DiJiangPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DiJiangConfig):
        super().__init__(config)
        self.model = DiJiangModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = config.has_linear_layers
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DiJiangCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: DiJiangCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Logits (B, logits_to_keep or T, V), and the loss for labels (B, T), -100 where none is wanted. Other arguments as
        `DiJiangModel`.
        """
        refuse_unknown_arguments(self, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=one_cache(past_key_values, cache),
            **kwargs,
        )
        tokens = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, tokens])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **by_its_name(outputs.get(CACHE_NAME)),
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        past_key_values: DiJiangCache | None = None,
        cache: DiJiangCache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of forward for the next tokens, the cache under both its names, since PEFT reads the old one."""
        cache = one_cache(past_key_values, cache)
        # generate accepts inputs_embeds only if this signature has them
        kwargs |= {CACHE_NAME: cache, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return inputs if cache is None else inputs | {"past_key_values": cache, "cache": cache}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        caches = [model_kwargs.pop(name, None) for name in ("past_key_values", "cache")]
        if (cache := one_cache(*caches)) is not None:
            model_kwargs[CACHE_NAME] = cache
        elif generation_config.use_cache is not False:
            # assisted decoding in transformers 5.9 asks for the last one, layers that can be cropped
            croppable = not {"linear_attention", "sliding_attention"} & set(self.config.attention_types)
            if generation_config.cache_implementation not in (None, "dynamic", *(("dynamic_full",) if croppable else ())):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not supported; leave it unset"
                )
            model_kwargs[CACHE_NAME] = DiJiangCache(self.config)
            return None
        # transformers annotates self by a protocol that no class declares
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


class DiJiangForSequenceClassification(DiJiangPreTrainedModel):
    """The decoder with a linear head on the last real token of each row."""

    def __init__(self, config: DiJiangConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DiJiangModel(config)
        # transformers annotates num_labels as one that may be None, which it never is
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DiJiangCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: DiJiangCache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """
        Logits (B, num_labels) of the last real token, and the loss for labels (B,) or (B, num_labels). Other arguments as
        `DiJiangModel`.

        Raises:
            ValueError: on several rows whose padding cannot be known: no attention_mask and no pad_token_id.
        """
        refuse_unknown_arguments(self, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=one_cache(past_key_values, cache),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        B, T = hidden_states.shape[:2]
        if attention_mask is not None:
            real = attention_mask[:, -T:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif B == 1:
            real = torch.ones(1, T, dtype=torch.bool, device=hidden_states.device)
        else:
            raise ValueError("several rows need an attention_mask, or a pad_token_id in the config")
        last = (real * torch.arange(T, device=real.device)).argmax(-1)
        logits = self.score(hidden_states[torch.arange(B, device=real.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **by_its_name(outputs.get(CACHE_NAME)),
        )


__all__ = ["DiJiangForCausalLM", "DiJiangForSequenceClassification", "DiJiangModel", "DiJiangPreTrainedModel"]
