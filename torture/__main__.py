"""`python -m torture`: stop, fill and alter for some minutes; say what was tried and what held.
Exit code 1 if something did not hold.

--kills 100 --stops 100 --disks 40 --flips 3200 --words 200 --minutes 15 --seed 0 are the defaults;
the seed makes the choices, the machine's pace the moments of the kills.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from torture.disks import fill, read_only
from torture.flips import flip
from torture.kills import stop_at_random
from torture.verbs import stop_verbs
from torture.words import odd_words
from torture.world import call, make_model, write_recipe

DEFAULTS = {"kills": 100, "stops": 100, "disks": 40, "flips": 3200, "words": 200, "minutes": 15, "seed": 0}


def main() -> int:
    """Do all of it and print what held."""
    parser = argparse.ArgumentParser(prog="python -m torture")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # threads do not survive a fork
    chance, began = random.Random(asked.seed), time.monotonic()
    deadline = began + 60 * asked.minutes
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        work = Path(name)
        os.environ["SVDTUNE_CACHE"] = str(work / "cache")
        model = make_model(work / "model")
        run = work / "reference"
        recipe = write_recipe(work / "reference.yaml", model, run)
        if (done := call(["train", recipe], work / "printed")).code:
            print(done.printed)
            return 1

        flips = flip(work / "flips", model, run, recipe, asked.flips, chance, deadline)
        print(f"altered files: {flips.count:,}")
        for target, counts in flips.outcomes.items():
            print(f"  {target:38} {', '.join(f'{n} {outcome}' for outcome, n in counts.most_common())}")
        wrong += flips.wrong

        words = odd_words(work, model, asked.words, chance, deadline)
        print(f"odd command lines: {words.tried}, {words.refused} refused in one sentence")
        wrong += words.wrong

        disks = fill(work, model, run, asked.disks, chance, deadline)
        print(
            f"small disks: {disks.tried} ({disks.how}), {disks.refused} too small, {disks.resumed} runs gone on from there"
        )
        wrong += disks.wrong

        closed = read_only(work, model, run)
        print(f"read-only: {closed.tried} commands ({closed.how}), {closed.refused} refused in one sentence")
        wrong += closed.wrong

        stops = stop_verbs(work, model, run, asked.stops, chance, deadline)
        print(
            f"stops of other verbs: {stops.count}, {stops.interrupts} of them Ctrl-C: "
            f"{', '.join(f'{name} {n} ({stops.midway[name]} with something written)' for name, n in stops.stopped.items())}"
        )
        wrong += stops.wrong

        kills = stop_at_random(work, model, asked.kills, chance, deadline)
        print(
            f"stops of train: {kills.kills} kills and {kills.interrupts} Ctrl-C in {kills.runs} runs, {kills.resumes} resumed; "
            f"latest checkpoint at the stop: {_spread(kills.after_steps)}"
        )
        wrong += kills.wrong
    short = [
        f"only {got} of {want} {what} in {asked.minutes} minutes"
        for what, got, want in (
            ("altered files", flips.count, asked.flips),
            ("odd command lines", words.tried, asked.words),
            ("small disks", disks.tried, asked.disks),
            ("stops of other verbs", stops.count, asked.stops),
            ("stops of train", kills.kills + kills.interrupts, asked.kills),
        )
        if got < want
    ]
    print(
        f"{time.monotonic() - began:.0f} s, seed {asked.seed}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
    for sentence in [*short, *(f"{text} (×{n})" for text, n in Counter(wrong).most_common(20))]:
        print(f"DID NOT HOLD: {sentence}")
    print("all of it held" if not wrong and not short else f"{len(wrong) + len(short)} did not hold")
    return int(bool(wrong or short))


def _spread(steps: list[int]) -> str:
    counts = Counter(steps)
    return ", ".join(f"{'none' if step < 0 else step}: {counts[step]}" for step in sorted(counts)) or "–"


sys.exit(main())
