"""Mixtures of experts: tiny configurations, and an oracle in which every unit is seen by a hook.

The oracle is written down from what the families' papers say, token by token and expert by expert.
It calls nothing of what it is held against.
"""

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

N_EXPERTS, N_CHOSEN, D_EXPERT, D_SHARED = 4, 2, 24, 16
# Widths are multiples of 8, as the products of grouped experts need whole 16 bytes.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "num_experts_per_tok": N_CHOSEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = SIZES | {"num_local_experts": N_EXPERTS, "intermediate_size": D_EXPERT}
NARROW = SIZES | {"num_experts": N_EXPERTS, "intermediate_size": 70}
NARROW |= {"moe_intermediate_size": D_EXPERT}
GLM = SIZES | {"n_routed_experts": N_EXPERTS, "n_shared_experts": 2, "intermediate_size": 70}
GLM |= {"moe_intermediate_size": D_EXPERT, "norm_topk_prob": True}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**WIDE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**NARROW, norm_topk_prob=True),
    # it normalises queries of all heads together, which must be as wide as the model
    "olmoe": lambda: transformers.OlmoeConfig(
        **(WIDE | {"hidden_size": 48, "head_dim": 8, "num_experts": N_EXPERTS})
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **WIDE,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        swiglu_limit=0.7,  # low enough to matter
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **NARROW, shared_expert_intermediate_size=D_SHARED
    ),
    "flex_olmo": lambda: transformers.FlexOlmoConfig(
        **(WIDE | {"hidden_size": 48, "head_dim": 8, "num_experts": N_EXPERTS})
    ),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(**WIDE),
    "phimoe": lambda: transformers.PhimoeConfig(
        **(WIDE | {"hidden_size": 48, "head_dim": 8}), lm_head_bias=True, attention_bias=True
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**GLM, first_k_dense_replace=0),
    "dots1": lambda: transformers.Dots1Config(**GLM, first_k_dense_replace=0),
    "solar_open": lambda: transformers.SolarOpenConfig(**GLM),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **(NARROW | {"hidden_size": 48, "head_dim": 8}),
        moe_num_experts=N_EXPERTS,
        moe_k=N_CHOSEN,
        moe_num_shared_experts=2,
        moe_layer_start_index=0,
    ),
    "hunyuan_v1_moe": lambda: transformers.HunYuanMoEV1Config(
        **(WIDE | {"num_experts": N_EXPERTS, "moe_topk": N_CHOSEN})
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**WIDE, residual_multiplier=0.7),
    "granitemoeshared": lambda: transformers.GraniteMoeSharedConfig(
        **WIDE, shared_intermediate_size=D_SHARED, logits_scaling=3.0
    ),
}
TWICE = dict.fromkeys(("glm4_moe", "dots1", "solar_open", "ernie4_5_moe"), 2 * D_EXPERT)
SHARED = TWICE | {"hunyuan_v1_moe": D_EXPERT, "qwen2_moe": D_SHARED, "granitemoeshared": D_SHARED}
# of kind mlp in a block
N_UNITS = {name: N_EXPERTS * D_EXPERT + SHARED.get(name, 0) for name in CONFIGS}
# Each lays its matrices out in another way.
LAYOUTS = ("mixtral", "gpt_oss", "qwen2_moe", "granitemoeshared")


def softmax_then_chosen(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of all experts, of which the largest are kept as they are."""
    return logits.softmax(-1).topk(N_CHOSEN)


def chosen_then_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the chosen experts alone: the same as those of all, divided by their sum."""
    largest, experts = logits.topk(N_CHOSEN)
    return largest.softmax(-1), experts


# Of the others, the model's own router is asked.
ROUTES = {
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "granitemoeshared"), chosen_then_softmax
    ),
    **dict.fromkeys(("olmoe", "qwen2_moe"), softmax_then_chosen),
}


class PlainMixture(nn.Module):
    """A mixture in which one linear map, ``down_proj``, writes what all units of the block do.

    Slow, and without any trick: expert by expert, token by token.
    """

    def __init__(self, mixture: nn.Module, shared: nn.Module | None, model_type: str) -> None:
        super().__init__()
        self.model_type = model_type
        router = mixture.router if hasattr(mixture, "router") else mixture.gate
        self.router, self.router_bias = (getattr(router, name, None) for name in ("weight", "bias"))
        self.ask_router = router
        self.correction = getattr(mixture, "e_score_correction_bias", None)
        experts = mixture.experts
        up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        if model_type == "gpt_oss":
            up, down = up.transpose(1, 2), down.transpose(1, 2)
            self.up_bias, self.down_bias = experts.gate_up_proj_bias, experts.down_proj_bias
        self.up = up
        columns = [*down]
        self.shared_gate = None
        if model_type == "qwen2_moe":
            shared = mixture.shared_expert
            self.shared_gate = mixture.shared_expert_gate.weight
            self.shared_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight]).detach()
            columns.append(shared.down_proj.weight.detach())
        elif model_type in TWICE or model_type == "hunyuan_v1_moe":
            shared = mixture.shared_experts if model_type in TWICE else mixture.shared_mlp
            self.shared_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight]).detach()
            columns.append(shared.down_proj.weight.detach())
        elif shared is not None:
            self.shared_up = shared.input_linear.weight.detach()
            columns.append(shared.output_linear.weight.detach())
        weight = torch.cat(columns, 1)
        self.down_proj = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
        self.down_proj.weight = nn.Parameter(weight)

    def activations(self, rows: Tensor) -> Tensor:
        if self.model_type == "gpt_oss":
            gate, up = rows[0::2].clamp(max=0.7), rows[1::2].clamp(-0.7, 0.7)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        gate, up = rows.tensor_split(2)
        return gate * torch.sigmoid(gate) * up

    def routed(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts to which a token goes: (N_CHOSEN,) each."""
        if self.model_type in ROUTES:
            logits = self.router @ state
            logits = logits if self.router_bias is None else logits + self.router_bias
            return ROUTES[self.model_type](logits)
        more = [self.correction] if self.model_type == "minimax_m2" else []
        _, weights, experts = self.ask_router(state[None], *more)
        return weights[0].to(state.dtype), experts[0]

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        states = hidden.reshape(-1, hidden.shape[-1])
        values, biases = [], []
        for state in states:
            weights, experts = self.routed(state)
            own = [state.new_zeros(D_EXPERT) for _ in range(N_EXPERTS)]
            bias = torch.zeros_like(state)
            for weight, expert in zip(weights, experts.tolist(), strict=True):
                rows = self.up[expert] @ state
                if self.model_type == "gpt_oss":
                    rows = rows + self.up_bias[expert]
                    bias = bias + weight * self.down_bias[expert]
                own[expert] = weight * self.activations(rows)
            if hasattr(self, "shared_up"):
                gate = 1 if self.shared_gate is None else torch.sigmoid(self.shared_gate @ state)
                own.append(gate * self.activations(self.shared_up @ state))
            values.append(torch.cat(own))
            biases.append(bias)
        shape = hidden.shape[:-1]
        written = self.down_proj(torch.stack(values).view(*shape, -1))
        written = written + torch.stack(biases).view(*shape, -1)
        return (written, None) if self.model_type == "gpt_oss" else written


def plain(model: nn.Module) -> nn.Module:
    """The model itself, or of a mixture a copy that computes the same in a way to look into."""
    model_type = model.config.model_type
    if model_type not in CONFIGS:
        return model
    clone = copy.deepcopy(model)
    for block in clone.model.layers:
        name = "block_sparse_moe" if model_type.startswith("granite") else "mlp"
        shared = getattr(block, "shared_mlp", None)
        setattr(block, name, PlainMixture(getattr(block, name), shared, model_type))
        if shared is not None:
            block.shared_mlp = None  # part of the mixture now
    return clone
