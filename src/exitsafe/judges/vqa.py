"""The judge `vqa`: answers to picture questions and their references in, the official VQA accuracy out.

Source: the evaluation code of VQA v2, https://github.com/GT-Vision-Lab/VQA (vqaEval.py at commit a013f00). With ten or
more references, each annotator in turn is left out and the answer scores min(matches among the others / 3, 1); the mean
over annotators is 0, 0.3, 0.6, 0.9 or 1, depending on the number of matches. Answers and references are normalised
first, unless all references are equal: then the answer has to match them as written, capitals and full stops included.

Deliberate differences from the official code:

- With fewer than ten references (where the official formula gives less than 1 even for a perfect answer), matching any
  of them scores 1. They are always normalised, since a single reference would otherwise demand its exact spelling.
- An empty answer is never correct, not even when a reference is empty.
- A text that the rules would reduce to nothing keeps its words, so "A" is not answered by "the" or "!!!". Officially,
  all articles and punctuation marks are equal.
- Different encodings of the same character compare equal: composed and decomposed letters (Unicode NFC), full-width
  forms, the decimal digits of every script, and the typographic apostrophe.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from exitsafe.records import Response, Sample, Verdict

OFFICIAL_REFERENCES = 10


class VQAAccuracy:
    """Scores the answers to `vqa` samples by their references."""

    name = "vqa"
    measures = ("vqa_accuracy",)

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        return [
            Verdict.of(
                response,
                judge=self.name,
                measure="vqa_accuracy",
                label=normalise_answer(response.text),
                score=vqa_accuracy(response.text, sample.answers),
            )
            for sample, response in zip(samples, responses, strict=True)
            if sample.kind == "vqa"
        ]


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of one answer, 0 to 1.

    >>> [vqa_accuracy("red", ["red"] * right + ["blue"] * (10 - right)) for right in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    >>> vqa_accuracy("Two.", ["2"]), vqa_accuracy("the", ["A"]), vqa_accuracy("Two.", ["2"] * 10)
    (1.0, 0.0, 0.0)
    """
    answer, references = _as_written(answer), [_as_written(reference) for reference in references]
    if not answer:
        return 0.0
    n = len(references)
    if n < OFFICIAL_REFERENCES or len(set(references)) > 1:
        answer, references = normalise_answer(answer), [normalise_answer(reference) for reference in references]
    matches = references.count(answer)
    if n < OFFICIAL_REFERENCES:
        return float(matches > 0)
    # integers until the last division: first the left-out annotators who matched, then those who did not
    return (matches * min(matches - 1, 3) + (n - matches) * min(matches, 3)) / (3 * n)


def normalise_answer(text: str) -> str:
    """Lower case, digits for number words, no articles, little punctuation, apostrophes restored in contractions.

    >>> normalise_answer("The two cats DONT eat a 3.5 kg pie.")
    "2 cats don't eat 3.5 kg pie"
    >>> normalise_answer("1,000 a-b"), normalise_answer("a-b"), normalise_answer("A")
    ('1000 ab', 'b', 'a')
    """
    text = _as_written(text)
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    kept = [word for word in words if word not in _ARTICLES] or words or text.lower().split()
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def _as_written(text: str) -> str:
    """The text on one line, in one canonical Unicode form."""
    text = "".join(map(_in_ascii, text))
    return unicodedata.normalize("NFC", text).replace("\n", " ").replace("\t", " ").strip()


def _in_ascii(character: str) -> str:
    """The same character in ASCII if it is a full-width form, a decimal digit or a typographic apostrophe."""
    if character.isascii():
        return character
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    return "'" if character == "\u2019" else str(unicodedata.decimal(character, character))


def _without_punctuation(text: str) -> str:
    """Remove each mark that is next to a space anywhere in the text; replace every other one by a space."""
    has_thousands = re.search(r"[0-9],[0-9]", text) is not None  # then all marks are removed
    without = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if is_beside_space or has_thousands else " ")
    # at most 32 periods: the official code passes a flag of that value as the count
    return re.sub(r"\.(?![0-9])", "", without, count=32)


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
# ^ marks an apostrophe that an answer may have left out. The official list also has capitals, which never occur in
# lower-cased text, and one entry that removes an apostrophe.
_LEFT_OUT = """
    ain^t aren^t can^t could^ve couldn^t couldn't^ve couldn^t've didn^t doesn^t don^t hadn^t hadn^t've hadn't^ve
    hasn^t haven^t he^d he^d've he'd^ve he^s how^d how^ll how^s isn^t it^d it^d've it'd^ve it^ll ma^am mightn^t
    mightn^t've mightn't^ve might^ve mustn^t must^ve needn^t not^ve o^clock oughtn^t ^ow's'at 'ow^s'at 'ow's^at
    shan^t she^d've she'd^ve should^ve shouldn^t shouldn^t've shouldn't^ve somebody^d've somebody'd^ve somebody^ll
    somebody^s someone^d someone^d've someone'd^ve someone^ll someone^s something^d something^d've something'd^ve
    something^ll that^s there^d there^d've there'd^ve there^re there^s they^d they^d've they'd^ve they^ll they^re
    they^ve ^twas wasn^t we^d've we'd^ve we^ve weren^t what^ll what^re what^s what^ve when^s where^d where^s
    where^ve who^d who^d've who'd^ve who^ll who^s who^ve why^ll why^re why^s won^t would^ve wouldn^t wouldn^t've
    wouldn't^ve y^all y^all'll y'all^ll y^all'd've y'all^d've y'all'd^ve you^d you^d've you'd^ve you^ll you^re
    you^ve
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    form.replace("^", ""): form.replace("^", "'") for form in _LEFT_OUT.split()
}
