"""Command lines, one module each: parse, call, print; ``build_parser()`` and ``main(argv)``.

Parsers need neither torch nor Detectron2, so that ``--help`` answers at once.
"""
