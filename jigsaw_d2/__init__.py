"""Jigsaw pre-training of detector backbones from the detection dataset alone, for Detectron2.

Where what lives, along the way of the data; imports go down this list, never back:

    io, config, cost     what everything shares: errors and files, keys, the log of compute
    data/                detection images -> samples -> store -> batches of Jigsaw images
    modeling/            backbone and classifier, objectives, receptive fields
    checkpoint/          checkpoint -> weights with metadata -> any network
    engine/, evaluation  pre-training in Detectron2's engine
    detection/           training the detector
    visualization/       figures
    tools/               one module a command

The names below are imported when they are first asked for: a command that needs no torch then does
not wait for it. Asking for any of them also registers JigsawPretrainer with Detectron2.
"""

import importlib

__version__ = "0.1.0"
_HOMES = {
    "JigsawTemplate": "data.template",
    "SampleStore": "data.store",
    "add_jigsaw_config": "config",
    "convert_checkpoint": "checkpoint.convert",
    "get_jigsaw_cfg": "config",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("jigsaw_d2.modeling.meta_arch")  # registers it
    return getattr(importlib.import_module(f"jigsaw_d2.{_HOMES[name]}"), name)
