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
"""

__version__ = "0.1.0"
