"""What the process holds that pages are run in copies of: the package, with what its experiments import when used."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

# What loading a checkpoint imports is half of what most pages would cost.
import accelerate  # noqa: F401
import pandas  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.configuration_llama  # noqa: F401

import hooklens.adapters.dequantised
import hooklens.adapters.families
import hooklens.alignment
import hooklens.analysis
import hooklens.evaluation
import hooklens.patching
import hooklens.pool
import hooklens.sae
import hooklens.steering
import hooklens.training
import hooklens.verification  # noqa: F401
