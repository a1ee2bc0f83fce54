"""Jigsaw pre-training of detector backbones from the detection dataset alone, for Detectron2.

Where what lives, along the way of the data:

    data/                                      detection images -> samples -> store -> batches
    meta_arch, losses, erf, erf_weights        backbone + classifier, objectives, region weights
    trainer, evaluation, training/             pre-training in Detectron2's engine
    checkpoint, weights/                       checkpoint -> weights with a passport -> detector
    detection/                                 training the detector
    cost, cost_table                           the ledger of compute
    jobs/, comparison/                         whole jobs, and comparisons over seeds
    config, io                                 what everything shares
    commands/, visualization/                  command lines; figures
"""

from jigsaw_d2 import meta_arch as _  # only registration: JigsawPretrainer
from jigsaw_d2.checkpoint import convert_checkpoint
from jigsaw_d2.config import add_jigsaw_config, get_jigsaw_cfg
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate

__all__ = [
    "JigsawTemplate",
    "SampleStore",
    "add_jigsaw_config",
    "convert_checkpoint",
    "get_jigsaw_cfg",
]
__version__ = "0.1.0"
