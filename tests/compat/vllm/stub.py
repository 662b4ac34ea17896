"""A stub of vLLM's worker interface: its layer layout, packed tokens, chunked prefill and decode steps, on the CPU.

Written after vllm 0.33's model runner V2 and its Llama: prompts in parts of a token budget, decodes beside them,
padding behind the tokens, ids with a random suffix, batches made by `prepare_inputs`. Weights are a HookedCausalLM's.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from hooklens.compat.vllm import WorkerExtension

N_PADDING = 3


class RMSNorm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().clone()), eps

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return normed if residual is None else (normed, total)


class Attention(nn.Module):
    """Attention of packed tokens over each request's keys so far, as the step's metadata tells them apart."""

    def __init__(self, attn, runner):
        super().__init__()
        self.attn, self.runner, self.cache = attn, [runner], {}

    def forward(self, positions, hidden_states):
        out, at = torch.zeros_like(hidden_states), 0
        batch = self.runner[0].batch
        if batch is None:
            return out
        for key, n_tokens in zip(batch.req_ids, batch.num_scheduled_tokens.tolist(), strict=True):
            here = slice(at, at + n_tokens)
            out[here] = self._one(key, positions[here], hidden_states[here])
            at += n_tokens
        return out

    def _one(self, key, positions, x):
        a = self.attn
        q, k, v = (torch.einsum("pm,hmd->phd", x, W) for W in (a.W_Q, a.W_K, a.W_V))
        q, k = rotate(q, positions), rotate(k, positions)
        if key in self.cache:
            k, v = (torch.cat([old, new]) for old, new in zip(self.cache[key], (k, v), strict=True))
        self.cache[key] = (k, v)
        groups = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.arange(len(k))[None] > positions[:, None], -torch.inf)
        return torch.einsum("hqk,khd,hdm->qm", scores.softmax(-1), v, a.W_O)


def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None, None] / 10000.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class MLP(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return (torch.nn.functional.silu(x @ self.mlp.W_gate) * (x @ self.mlp.W_in)) @ self.mlp.W_out


class LlamaDecoderLayer(nn.Module):
    def __init__(self, block, eps, runner):
        super().__init__()
        self.self_attn, self.mlp = Attention(block.attn, runner), MLP(block.mlp)
        self.input_layernorm = RMSNorm(block.ln1.w, eps)
        self.post_attention_layernorm = RMSNorm(block.ln2.w, eps)

    def forward(self, positions, hidden_states, residual):
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class LlamaModel(nn.Module):
    def __init__(self, model, runner, layer):
        super().__init__()
        self.embed = [model]
        self.layers = nn.ModuleList(layer(block, 1e-6, runner) for block in model.blocks)
        self.norm = RMSNorm(model.ln_final.w, 1e-6)

    def forward(self, input_ids, positions):
        hidden, residual = self.embed[0].embed.W_E[input_ids], None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class LlamaForCausalLM(nn.Module):
    def __init__(self, model, runner, layer):
        super().__init__()
        self.model = LlamaModel(model, runner, layer)

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)


class ModelRunner:
    batch = None

    def prepare_inputs(self, step):
        positions = [p for start, ids in step.values() for p in range(start, start + len(ids))]
        return SimpleNamespace(
            req_ids=list(step),
            num_scheduled_tokens=np.array([len(ids) for _, ids in step.values()], dtype=np.int32),
            positions=torch.tensor(positions + [0] * N_PADDING),
            input_ids=torch.tensor([i for _, ids in step.values() for i in ids] + [0] * N_PADDING),
        )

    def execute_model(self, step):
        self.batch = self.prepare_inputs(step)
        return self.model(self.batch.input_ids, self.batch.positions)


class StubLLM:
    """`vllm.LLM`, as far as it is used, with one worker; `logits[key]` are those at each request's last tokens."""

    def __init__(self, model, *, budget=5, layer=LlamaDecoderLayer, **settings):
        self.hooked, self.budget, self.logits = model, budget, {}
        at = {"enforce_eager": True, "enable_prefix_caching": False, "speculative_config": None}
        at |= {"kv_transfer_config": None, "pipeline_parallel_size": 1, "data_parallel_size": 1}
        at |= {"prefill_context_parallel_size": 1, "use_ubatching": False, "use_v2_model_runner": True}
        at |= {"worker_extension_cls": "hooklens.compat.vllm.WorkerExtension"} | settings
        part = SimpleNamespace(**at, dtype=torch.float32, get_hidden_size=lambda: model.cfg.d_model)
        config = SimpleNamespace(**at, model_config=part, cache_config=part, parallel_config=part)
        # As vLLM puts the extension among the bases of its worker.
        runner = ModelRunner()
        runner.model = LlamaForCausalLM(model, runner, layer)
        self.worker = type("Worker", (_Worker, WorkerExtension), {})()
        self.worker.vllm_config, self.worker.model_runner, self.worker.rank = config, runner, 0
        self.llm_engine = SimpleNamespace(vllm_config=config)
        self.request_counter = SimpleNamespace(counter=7)

    def get_tokenizer(self):
        return self.hooked.tokenizer

    def collective_rpc(self, method, args=()):
        assert all(type(one) is bytes for one in args), "nothing else passes vLLM's serialisation without pickle"
        return [getattr(self.worker, method)(*args)]

    @torch.inference_mode()
    def generate(self, prompts, sampling_params, use_tqdm=True):
        runner, waiting = self.worker.model_runner, {}
        for prompt in prompts:
            key = f"{self.request_counter.counter}-a1b2c3d4"
            waiting[key] = SimpleNamespace(ids=list(prompt["prompt_token_ids"]), done=0, new=[])
            self.request_counter.counter += 1
        running = dict(waiting)
        while running:
            step, left = {}, self.budget
            # Decodes first, as V2 sorts a step's requests by their number of tokens.
            for key, one in sorted(running.items(), key=lambda item: len(item[1].ids) - item[1].done):
                part = one.ids[one.done : one.done + left]
                if part:
                    step[key], left = (one.done, part), left - len(part)
            hidden, at = runner.execute_model(step), 0
            for key, (_, part) in step.items():
                one, at = running[key], at + len(part)
                one.done += len(part)
                if one.done == len(one.ids):
                    logits = hidden[at - 1] @ self.hooked.unembed.W_U
                    self.logits.setdefault(key.split("-")[0], []).append(logits.clone())
                    one.new.append(int(logits.argmax()))
                    one.ids.append(one.new[-1])
                    if len(one.new) == sampling_params.max_tokens:
                        del running[key]
        return [
            SimpleNamespace(request_id=key.split("-")[0], outputs=[SimpleNamespace(token_ids=one.new)])
            for key, one in waiting.items()
        ]


class _Worker:
    def get_model(self):
        return self.model_runner.model
