"""Edge attribution as published, written out edge by edge and run by run, on hook points that show each node alone.

A reader's own copy of the stream is a leaf of its graph (`hook_q_input` and the like), a writer's output is read from
`hook_result`; nothing is shared between edges but the runs.
"""

import torch

from hooklens.patching.graph.nodes import list_readers, list_writers, reaches


def node_value(tensor, node):
    return tensor[:, :, node.head] if tensor.ndim == 4 else tensor


@torch.no_grad()
def outputs(model, tokens):
    names = sorted({writer.hook_name for writer in list_writers(model.cfg)})
    _, cache = model.run_with_cache(tokens, names_filter=names)
    return {str(writer): node_value(cache[writer.hook_name], writer) for writer in list_writers(model.cfg)}


def gradients(model, tokens, metric, hooks):
    """The metric's gradient at every reader's input, summed metric over pairs, in a run with some hooks."""
    found = {}

    def keep(gradient, hook):
        found[hook.name] = gradient.detach().clone()

    names = sorted({reader.hook_name for reader in list_readers(model.cfg)})
    with torch.enable_grad():
        embed = [("hook_embed", lambda tensor, hook: tensor.detach().clone().requires_grad_())]
        with model.hooks(hooks or embed, [(names, keep)]):
            metric(model(tokens)).sum().backward()
    model.zero_grad()
    # What the metric does not depend on has no gradient.
    zero = torch.zeros(*tokens.shape, model.cfg.d_model, dtype=torch.float64)
    return {
        str(reader): node_value(found[reader.hook_name], reader) if reader.hook_name in found else zero
        for reader in list_readers(model.cfg)
    }


def scores(model, clean, corrupted, metric, runs):
    """`sum over positions of (corrupted - clean output) . mean gradient over the runs`, for each pair.

    Args:
        runs: token ids and hooks of each run.
    """
    of_clean, of_corrupted = outputs(model, clean), outputs(model, corrupted)
    taken = [gradients(model, tokens, metric, hooks) for tokens, hooks in runs]
    table = {}
    for writer in list_writers(model.cfg):
        for reader in list_readers(model.cfg):
            if reaches(writer, reader, model.cfg):
                slope = sum(one[str(reader)] for one in taken) / len(taken)
                change = of_corrupted[str(writer)] - of_clean[str(writer)]
                table[str(writer), str(reader)] = (change * slope).sum((1, 2))
    return table


def between(model, clean, corrupted, place, weight):
    """A hook that puts `weight clean + (1 - weight) corrupted` at a place, as a leaf."""
    with torch.no_grad():
        values = [model.run_with_cache(tokens, names_filter=place)[1][place] for tokens in (clean, corrupted)]

    def put(tensor, hook):
        return (weight * values[0] + (1 - weight) * values[1]).detach().clone().requires_grad_()

    return (place, put)


def eap(model, clean, corrupted, metric):
    """Syed et al. 2023: the gradient of the clean run."""
    return scores(model, clean, corrupted, metric, [(clean, [])])


def eap_ig_inputs(model, clean, corrupted, metric, weights):
    """Hanna et al. 2024: the clean run with input embeddings at `corrupted + weight (clean - corrupted)`."""
    runs = [(clean, [between(model, clean, corrupted, "hook_embed", weight)]) for weight in weights]
    return scores(model, clean, corrupted, metric, runs)


def eap_ig_activations(model, clean, corrupted, metric, weights):
    """The clean run with one output at a time between both runs' values."""
    embedded = ("hook_embed", lambda tensor, hook: tensor.detach().clone().requires_grad_())
    runs = []
    places = [f"blocks.{i}.hook_{kind}_out" for i in range(model.cfg.n_layers) for kind in ("attn", "mlp")]
    for place in ["hook_embed", *(place for place in places if place in model.hook_points())]:
        for weight in weights:
            hooks = [between(model, clean, corrupted, place, weight)]
            runs.append((clean, hooks if place == "hook_embed" else [embedded, *hooks]))
    return scores(model, clean, corrupted, metric, runs)


def clean_corrupted(model, clean, corrupted, metric):
    """Hanna et al. 2024: the mean of the clean run's and the corrupted run's gradient."""
    return scores(model, clean, corrupted, metric, [(clean, []), (corrupted, [])])


@torch.no_grad()
def exact(model, clean, corrupted, metric):
    """The clean run with one reader's input moved by one writer's change, everything behind it recomputed."""
    of_clean, of_corrupted = outputs(model, clean), outputs(model, corrupted)
    base = metric(model(clean))
    table = {}
    for writer in list_writers(model.cfg):
        for reader in list_readers(model.cfg):
            if not reaches(writer, reader, model.cfg):
                continue
            change = of_corrupted[str(writer)] - of_clean[str(writer)]

            def move(tensor, hook, reader=reader, change=change):
                moved = tensor.clone()
                part = moved[:, :, reader.head] if tensor.ndim == 4 else moved
                part += change
                return moved

            value = metric(model.run_with_hooks(clean, fwd_hooks=[(reader.hook_name, move)]))
            table[str(writer), str(reader)] = value - base
    return table
