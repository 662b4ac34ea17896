"""What the installed PyTorch can do, for tests that need it."""

import pytest
import torch
import torch.nn.functional as F

TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])

traces_whole = pytest.mark.skipif(
    TORCH < (2, 11), reason="earlier tracers follow neither `isinstance(x, A | B)` nor context variables"
)
takes_groups = pytest.mark.skipif(TORCH < (2, 9), reason="earlier kernels on the CPU take no grouped queries")
multiplies_groups = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="there is no grouped matrix product")
takes_any_width = pytest.mark.skipif(TORCH < (2, 7), reason="earlier flex attention takes widths of powers of 2 only")
draws_bfloat16_anew = pytest.mark.skipif(
    torch.rand(1, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16).item() != 0.53515625,
    reason="earlier generators draw other bfloat16 numbers from the same seed",
)
draws_tokens_anew = pytest.mark.skipif(
    torch.multinomial(torch.full((3, 20), 0.05), 1, generator=torch.Generator().manual_seed(7)).tolist()
    != [[16], [15], [10]],
    reason="earlier versions draw other entries from the same seed",
)
# Dtypes that nothing computes in; PyTorch 2.6 and 2.7 have none.
FOUR_BITS = (torch.float4_e2m1fn_x2,) if hasattr(torch, "float4_e2m1fn_x2") else ()
