"""`hooklens info`: what a checkpoint is, before anybody runs it."""

import dataclasses

from rich.console import Console

from hooklens.axes import HookSite, find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model
from hooklens.cli.screen import make_console, make_table, say, say_heading
from hooklens.config import HookedConfig
from hooklens.display.numbers import format_bytes


def info(model: Model) -> None:
    """Print a model's configuration, parameters, hook points, and what its key-value cache costs."""
    hooked = HookedCausalLM.from_pretrained(model)
    cfg, console = hooked.cfg, make_console()
    weight_bytes = sum(parameter.nbytes for parameter in hooked.parameters())
    cache_bytes = cfg.cache_width * hooked.dtype.itemsize
    dtype = str(hooked.dtype).removeprefix("torch.")

    say_heading(console, model)
    say(console, f"parameters        {hooked.n_params_total:,} ({format_bytes(weight_bytes)} in {dtype})")
    say(console, f"key-value cache   {format_bytes(cache_bytes)} per token and row")
    say(console, f"weight processing {', '.join(hooked.transforms) or 'none'}")
    say_heading(console, "Configuration")
    _print_config(console, cfg)
    say_heading(console, f"Hook points ({len(hooked.hook_points())})")
    _print_hook_points(console, hooked)


def _print_config(console: Console, cfg: HookedConfig) -> None:
    table = make_table(console, ["field", "value"])
    for field in dataclasses.fields(cfg):
        if field.name != "origin":
            table.add_row(field.name, str(getattr(cfg, field.name)))
    console.print(table)


def _find_sites(model: HookedCausalLM) -> list[HookSite]:
    """The kinds of hook points a model has, each once."""
    sites = (find_site(name) for name in model.hook_points())
    return list(dict.fromkeys(site for site in sites if site is not None))


def _print_hook_points(console: Console, model: HookedCausalLM) -> None:
    say(console, "{i} is the layer. Points marked * are expensive, and captured only when they are named.")
    table = make_table(console, ["name", "axes", "what it is"])
    for site in _find_sites(model):
        table.add_row(site.template + (" *" if site.on_request else ""), " ".join(site.axes), site.description)
    console.print(table)
