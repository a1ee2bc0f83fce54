"""Check or summarise a sample store."""

import argparse

from tqdm import tqdm

from jigsaw_d2.data.report import format_report, summarise
from jigsaw_d2.data.store import SampleStore, check_store
from jigsaw_d2.data.template import JigsawTemplate

MAX_FAULTS = 50


def build_parser() -> argparse.ArgumentParser:
    """``store verify STORE ...`` and ``store describe STORE ...``."""
    parser = argparse.ArgumentParser(prog="python -m jigsaw_d2 store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify", help="read every byte and compare it with the index; status 1 at any fault"
    )
    verify.add_argument("store", nargs="+", help="store folder, or the parts of one")
    verify.add_argument("--decode", action="store_true", help="decode every sample, too")
    describe = commands.add_parser("describe", help="counts, sizes, fill of the template, skipped")
    describe.add_argument("store", nargs="+", help="store folder, or the parts of one")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0 = sound, 1 = faults found (each was named)."""
    args = build_parser().parse_args(argv)
    store = SampleStore(args.store)
    if args.command == "describe":
        print(describe_text(store))
        return 0
    return _verify(store, args.decode)


def _verify(store: SampleStore, decode: bool) -> int:
    count = 0
    with tqdm(total=len(store), unit="sample", desc="verify", disable=None) as bar:
        for count, fault in enumerate(check_store(store, decode, bar.update), 1):
            if count <= MAX_FAULTS:
                print(fault)
    if count > MAX_FAULTS:
        print(f"... and {count - MAX_FAULTS} more")
    names = ", ".join(str(path) for path in store.paths)
    verdict = f"{count} faults: extract the samples again" if count else "sound"
    print(f"{names}: {len(store)} samples, {len(store.categories)} categories: {verdict}")
    return 1 if count else 0


def describe_text(store: SampleStore) -> str:
    """The report of a store, of all its parts together."""
    options = store.header.get("options", {})
    template = JigsawTemplate(**options.get("template", {}))
    report = summarise(
        store.index, store.categories, template, options.get("scale_range", (0.8, 1.5))
    )
    # What planning skipped concerns the whole dataset, and every part says the same of it.
    logs = {"dataset": store.header["report"].get("log", {}).get("dataset", {})}
    for number, header in enumerate(store.headers):
        logs[f"part {number}"] = header["report"].get("log", {}).get("part", {})
    shards = [shard for header in store.headers for shard in header["shards"]]
    size = sum(shard["bytes"] for shard in shards)
    head = (
        f"source {store.header.get('source', '?')}, seed {store.header.get('seed', '?')}, "
        f"{len(store.paths)} part(s), {len(shards)} shard(s), {size / 1e6:.1f} MB, "
        f"fingerprint {store.fingerprint[:16]}"
    )
    return f"{head}\n\n{format_report({**report, 'log': logs})}"
