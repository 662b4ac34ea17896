import pytest

from hooklens.adapters.keys import ConfigReader, qk_norm_flag
from hooklens.config import NormConfig

LAYER, RMS = NormConfig(kind="layer", eps=1e-4), NormConfig(kind="rms", eps=1e-6, bias=False)


@pytest.mark.parametrize("norm", [LAYER, RMS])
@pytest.mark.parametrize("per_head", [True, False])
def test_flag_gives_the_norms_of_the_block(norm, per_head) -> None:
    part = qk_norm_flag(per_head=per_head)
    on = part.read(ConfigReader({"qk_layernorm": True}), {"norm": norm})
    assert on == {"qk_norm": norm, "qk_norm_per_head": per_head}
    assert part.write(on) == {"qk_layernorm": True}
    off = part.read(ConfigReader({"qk_layernorm": False}), {"norm": norm})
    assert off == {"qk_norm": None}
    assert part.write(off) == {"qk_layernorm": False}


@pytest.mark.parametrize("default", [True, False])
def test_default_holds_where_the_config_is_silent_and_a_bias_may_be_left_out(default) -> None:
    found = qk_norm_flag(default=default, bias=False).read(ConfigReader({}), {"norm": LAYER})
    assert found["qk_norm"] == (NormConfig(kind="layer", eps=1e-4, bias=False) if default else None)
