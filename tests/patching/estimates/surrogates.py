"""Gradient rules as other networks: what each rule takes for the network, written as hooks on full forwards.

A rule's backward pass is the gradient of a function that agrees with the network at the run, and bends otherwise
around it. Here is that function for each rule, made of the values of the unpatched run; its derivative, taken by
central differences of full forwards, is what the rule has to give. No autograd is involved.
"""

from unittest import mock

import torch

from hooklens.axes import find_site
from hooklens.model.activations import ACTIVATIONS
from hooklens.model.norm import Norm
from hooklens.patching import HalveProducts, HoldNormScale, HoldPattern, LinearizeActivations, SoftenSoftmax


def named(model, *words):
    return [name for name in model.hook_points() if name.rpartition(".")[2] in words]


@torch.no_grad()
def values_at(model, tokens, names):
    return model.run_with_cache(tokens, names_filter=list(names))[1] if names else {}


def hooks_for(model, tokens, rules):
    """The hooks of the network that some rules take for the real one."""
    watched = named(
        model, "hook_scale", "hook_pattern", "hook_attn_scores", "hook_pre", "hook_pre_linear", "hook_mid", "hook_post",
        "hook_z",
    )  # fmt: skip
    base = values_at(model, tokens, watched)
    kinds = {type(rule): rule for rule in rules}
    hooks, now = [], {}

    def keep(tensor, hook):
        now[hook.name] = tensor

    if HoldNormScale in kinds:
        hooks.append((named(model, "hook_scale"), lambda tensor, hook: base[hook.name]))
    if LinearizeActivations in kinds:
        hooks.append((named(model, "hook_pre", "hook_pre_linear"), keep))
        behind = named(model, "hook_mid")
        behind += [name for name in named(model, "hook_post") if name.replace("post", "mid") not in behind]

        def line(tensor, hook):
            place = hook.name.rpartition(".")[0]
            act, old = ACTIVATIONS[model.cfg.act_fn], base[f"{place}.hook_pre"]
            out = now[f"{place}.hook_pre"] * act(old) / old
            linear = now.get(f"{place}.hook_pre_linear")
            return out if linear is None else out * linear

        hooks.append((behind, line))
    halve = kinds.get(HalveProducts)
    if halve is not None:
        places = []
        if halve.mlp:
            places += [n for n in named(model, "hook_post") if n.replace("post", "pre_linear") in watched]
        if halve.attention:
            places += named(model, "hook_z", "hook_attn_scores")
        hooks.append((places, lambda tensor, hook: base[hook.name] + (tensor - base[hook.name]).nan_to_num(0.0) / 2))
    if SoftenSoftmax in kinds:
        warmth = kinds[SoftenSoftmax].temperature
        hooks.append((named(model, "hook_attn_scores"), keep))

        def soften(tensor, hook):
            place = hook.name.rpartition(".")[0]
            sinks = dict(model.named_parameters()).get(f"{place}.sinks")

            def soft(scores):
                scores = scores / warmth
                if sinks is not None:
                    column = (sinks / warmth)[:, None, None].expand(*scores.shape[:-1], 1)
                    scores = torch.cat([scores, column], -1)
                return scores.softmax(-1)[..., : tensor.shape[-1]]

            old = base[f"{place}.hook_attn_scores"]
            return base[hook.name] + warmth * (soft(now[f"{place}.hook_attn_scores"]) - soft(old))

        hooks.append((named(model, "hook_pattern"), soften))
    if HoldPattern in kinds:
        hooks.append((named(model, "hook_pattern"), lambda tensor, hook: base[hook.name]))
    return [hook for hook in hooks if hook[0]]


def index_of(cell):
    site = find_site(cell["site"])
    index = [slice(None)] * len(site.axes)
    for word, names in (("pos", ("pos", "query")), ("head", ("head", "kv_head")), ("source", ("key",))):
        axis = next((site.axes.index(axis) for axis in names if axis in site.axes), None)
        if cell[word] is not None and axis is not None:
            index[axis] = cell[word]
    return tuple(index)


class Surrogate:
    """The network that some rules take for the real one, around the corrupted run."""

    def __init__(self, model, clean, corrupted, rules):
        self.model, self.clean, self.corrupted = model, clean, corrupted
        self.scales = values_at(model, corrupted, named(model, "hook_scale"))
        self.hooks = hooks_for(model, corrupted, rules)
        self.held = any(isinstance(rule, HoldNormScale) for rule in rules)
        self.changes = {}

    def change(self, name):
        """From the corrupted run's activation to the clean run's."""
        if name not in self.changes:
            target, start = (values_at(self.model, tokens, [name])[name] for tokens in (self.clean, self.corrupted))
            self.changes[name] = torch.where(target == start, 0.0, target - start)
        return self.changes[name]

    @torch.no_grad()
    def derivative(self, cell, metric, *, step=1e-4):
        """As one cell's activation moves from the corrupted run's to the clean run's."""
        name, index = cell["site"], index_of(cell)
        change = self.change(name)

        def value(fraction):
            def move(tensor, hook):
                moved = tensor.clone()
                moved[index] = moved[index] + fraction * change[index]
                return moved

            def norm_copies(norm, x, call):
                scale = self.scales[norm.hook_scale.name]
                if x.ndim == 4 and scale.ndim == 3:
                    scale = scale[:, :, None]
                elif x.ndim == 4:
                    scale = scale.repeat_interleave(x.shape[2] // scale.shape[2], 2)
                centred = x - x.mean(-1, keepdim=True) if norm.norm.kind == "layer" else x
                return norm._weigh_divided(centred / scale, x)

            # What is normed beside a norm's input has the same denominator. Hooks of the rules come first, so that what
            # is moved is what the network reads.
            with mock.patch.object(Norm, "apply_beside", norm_copies if self.held else Norm.apply_beside):
                return metric(self.model.run_with_hooks(self.corrupted, fwd_hooks=[*self.hooks, (name, move)]))

        return (value(step) - value(-step)) / (2 * step)
