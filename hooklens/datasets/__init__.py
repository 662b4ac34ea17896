"""Activation data sets: what hook points carry on a corpus, in files that neither model nor corpus is needed to read.

- `record` runs a model on a corpus and keeps the activations of many sites in one pass, in shards of safetensors;
  interrupted, it goes on where it stopped.
- `ActivationDataset` reads them: tokens by number, whole sites, shuffled batches, statistics.
- `fit_probe` trains a linear probe on a site, and measures it on documents that it has not seen.
"""

from hooklens.datasets.corpus import Corpus
from hooklens.datasets.dataset import ActivationDataset, SiteValues
from hooklens.datasets.manifest import Manifest, Shard
from hooklens.datasets.probes import Probe, fit_probe
from hooklens.datasets.recording import record
from hooklens.datasets.statistics import SiteStatistics

__all__ = [
    "ActivationDataset",
    "Corpus",
    "Manifest",
    "Probe",
    "Shard",
    "SiteStatistics",
    "SiteValues",
    "fit_probe",
    "record",
]
