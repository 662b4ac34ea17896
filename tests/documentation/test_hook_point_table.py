"""docs/hook_points.md is what the parts declare, and what models have."""

import pytest

import hooklens as hl
from hooklens.axes import find_site
from tests.documentation.hook_point_table import PAGE, make_page, own_sites, parts_with, why_absent

TINY = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 16, "d_vocab": 20, "n_ctx": 16}
NETWORKS = {
    "learned": {"positions": hl.LearnedPositions()},
    "rotary, grouped": {"positions": hl.RotaryPositions(dim=4), "n_kv_heads": 2, "gated_mlp": True},
    "parallel": {"positions": hl.RotaryPositions(dim=4), "wiring": "parallel"},
    "attention only": {"positions": hl.NoPositions(), "attn_only": True, "norm": None, "final_norm": None},
    "mixture": {"positions": hl.LearnedPositions(), "mlp": hl.MoEConfig(n_experts=4, experts_per_token=2, d_expert=8)},
}


def test_the_page_is_what_the_parts_declare() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == make_page(), "run `python -m tests.documentation.hook_point_table`"


@pytest.mark.parametrize("name", NETWORKS)
def test_what_models_lack_is_said_on_the_page(name: str) -> None:
    """Every point of a model is on the page, in a part that it has; every reason that it gives is there, too."""
    model = hl.HookedCausalLM(hl.HookedConfig(**{**TINY, **NETWORKS[name]}))
    rows = own_sites()
    sites = {point: find_site(point) for point in model.hook_points()}
    assert all(site is not None and site.template in rows for site in sites.values())
    for point, site in sites.items():
        part = model.get_submodule(point.rpartition(".")[0])
        names = parts_with(site.template)
        above = [kind.__name__ for kind in type(part).__mro__]
        assert type(part).__name__ == "Norm" or set(names) & set(above), (point, names)
    absent = model.cfg.description.absent
    for template in rows:
        point = template.replace("{i}", "1")
        if point not in model.hook_points() and (reason := model.cfg.description.why_absent(point)) is not None:
            assert reason in why_absent(template), (point, reason)
    assert absent
