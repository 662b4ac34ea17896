"""What the process holds that pages are run in copies of: the package, with what its experiments import when used."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pandas  # noqa: F401
import transformers  # noqa: F401

import hooklens.alignment
import hooklens.analysis
import hooklens.evaluation
import hooklens.patching
import hooklens.pool
import hooklens.sae
import hooklens.steering
import hooklens.training
import hooklens.verification  # noqa: F401
