"""Command lines, one module each: ``build_parser()`` and ``main(argv) -> exit status``."""
