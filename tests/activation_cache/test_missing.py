"""What a cache says about an activation that it does not hold."""

import pytest
import torch

from hooklens.activation_cache import ActivationCache, MissingActivationError
from hooklens.config import NoPositions
from hooklens.errors import CacheError
from tests.activation_cache.captures import CFG, make_cache


class TestMissing:
    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (("z", 1), r"activation 'blocks\.1\.attn\.hook_z' was not captured; the cache holds 'hook_embed', "
             r".* and 14 more\. Add 'blocks\.1\.attn\.hook_z' to names_filter to have it$"),
            (("result", 1), r"^activation 'blocks\.1\.attn\.hook_result' was not captured; .* to names_filter"),
            (("q_grad", 1), r"the gradient of 'blocks\.1\.attn\.hook_q' was not captured; run with incl_bwd=True"),
            ("blocks.1.attn.hook_patern", r"no hook point is called .* Did you mean 'blocks\.1\.attn\.hook_pattern'"),
            (("patern", 1), r"no hook point is called 'patern'\. Did you mean 'pattern'"),
            ("blocks.7.hook_resid_pre", r"the model has no activation .*: it has 3 layers, 0 to 2"),
            (("resid_pre", 3), "layer 3 is out of range; the model has 3 layers"),
            (("scale", 1), "needs the module it sits in"),
            ("pattern", "exists once per block: give the layer"),
            ("hook_pos_embed", "its positions are no vectors, learned, sinusoidal or shortformer"),
            (("pre_linear", 0), "its MLPs are not gated"),
            (("scale", 0, "q_norm"), "it has no query-key norm"),
            (("normalized", 0, "ln2_post"), "it has no norms after its branches"),
        ],
    )  # fmt: skip
    def test_the_reason_is_told(self, key, text):
        cache = make_cache()
        with pytest.raises(MissingActivationError, match=text):
            cache[key]
        assert key not in cache
        assert cache.get(key) is None

    @pytest.mark.parametrize(
        ("key", "changes", "text"),
        [
            (("resid_mid", 0), {"wiring": "parallel"}, "its blocks are parallel"),
            (("scale", 0, "ln2"), {"wiring": "parallel", "shared_norm": True}, "its MLPs have no norm of their own"),
            (("scale", 0, "ln1"), {"norm_before": False, "norm_after": True}, "it has no norms before its branches"),
            (("rot_q", 0), {"positions": NoPositions()}, "its positions are not rotary"),
            (("k_per_head", 0), {"n_kv_heads": CFG.n_heads}, "its query heads share no keys and values, so hook_k"),
            (("v_per_head", 1), {"n_kv_heads": CFG.n_heads}, "hook_k and hook_v have them per query head"),
        ],
    )
    def test_the_config_decides_what_a_model_has(self, key, changes, text):
        with pytest.raises(MissingActivationError, match=text):
            ActivationCache({}, cfg=CFG.replace(**changes))[key]
        with pytest.raises(MissingActivationError, match="was not captured; the cache is empty"):
            ActivationCache({}, cfg=CFG)[key]

    def test_what_can_be_computed_is_told(self):
        """In TransformerLens compute_head_results changes the cache it is called on; here it gives a new one."""
        zs = {f"blocks.{layer}.attn.hook_z": torch.zeros(2, 5, CFG.n_heads, CFG.d_head) for layer in range(3)}
        with pytest.raises(
            MissingActivationError, match=r"hook_result' .*: cache.compute_head_results\(\) gives a cache"
        ):
            ActivationCache(zs, cfg=CFG)["result", 1]
        del zs["blocks.2.attn.hook_z"]
        with pytest.raises(MissingActivationError, match=r"Add 'blocks\.1\.attn\.hook_result' to names_filter"):
            ActivationCache(zs, cfg=CFG)["result", 1]

    def test_is_a_key_error_that_prints_as_text(self):
        with pytest.raises(KeyError) as caught:
            make_cache()["z", 1]
        assert isinstance(caught.value, CacheError)
        assert str(caught.value).startswith("activation 'blocks.1.attn.hook_z' was not captured")
