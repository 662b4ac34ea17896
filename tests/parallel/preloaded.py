"""What the process holds that others are forked from: all that they would each import when it is used."""

import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.configuration_llama  # noqa: F401

import hooklens.adapters.dequantised
import hooklens.adapters.families
import hooklens.patching  # noqa: F401
import tests.parallel.behaviours
import tests.parallel.comparing  # noqa: F401
