"""The nine GLUE tasks (Wang et al., 2018) as the hub's `nyu-mll/glue` has them, split as in the paper.

The labels of GLUE's own test sets are secret, so the splits are made of the two labelled ones (Zhang et al., 2020). A
task of fewer than 10,000 training rows halves its validation set into validation and test. A larger one tests on its
whole validation set and gives 1,000 training rows away for validation. The sizes are those of the full data sets, so a
part of one is split as the whole would be; "train" below counts the full set.

| task | asks                               | train   | metrics           | test rows          | validation rows |
|------|------------------------------------|---------|-------------------|--------------------|-----------------|
| cola | is the sentence well formed?       | 8,551   | matthews          | half of validation | the other half  |
| sst2 | is the opinion good?               | 67,349  | accuracy          | validation         | from train      |
| mrpc | do both sentences say the same?    | 3,668   | accuracy, f1      | half of validation | the other half  |
| qqp  | do both questions ask the same?    | 363,846 | accuracy, f1      | validation         | from train      |
| stsb | how near in meaning are they, 0-5? | 5,749   | pearson, spearman | half of validation | the other half  |
| mnli | does the premise imply it?         | 392,702 | accuracy          | validation_matched | from train      |
| qnli | does the sentence hold the answer? | 104,743 | accuracy          | validation         | from train      |
| rte  | does sentence 1 imply sentence 2?  | 2,490   | accuracy          | half of validation | the other half  |
| wnli | is the pronoun resolved rightly?   | 635     | accuracy          | half of validation | the other half  |

Labels are the words that T5 was taught to write, in the order of the hub's ids, and the prompts are T5's.
"""

from __future__ import annotations

from unolora.tasks.task import Source, Task


def _task(
    name: str,
    folder: str,
    template: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    description: str,
    *,
    validation_from: str = "test",
    test: str = "validation",
    prompt: str = "",
) -> Task:
    return Task(
        name,
        "classification" if labels else "regression",
        template,
        "label",
        labels,
        metrics,
        Source(test=test, hub="nyu-mll/glue", subset=name, folder=folder, validation_from=validation_from),
        description,
        prompt,
        None if labels else 0.2,
        descriptions=_DESCRIPTIONS[name],
    )


_DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "cola": (
        "Decide whether this English sentence is grammatically acceptable.",
        "Would a native speaker take the sentence for well formed?",
        "Tell correct sentences from those that break the rules of grammar.",
    ),
    "sst2": (
        "Decide whether this piece of a film review is negative or positive.",
        "Does the reviewer speak well or badly of the film?",
        "Binary sentiment of phrases about movies.",
    ),
    "mrpc": (
        "Decide whether two sentences from the news say the same thing.",
        "Is the second sentence a paraphrase of the first?",
        "Paraphrase detection in pairs of news sentences.",
    ),
    "qqp": (
        "Decide whether two questions ask for the same thing.",
        "Would one answer do for both questions?",
        "Find duplicate questions on a public site.",
    ),
    "stsb": (
        "Rate how near in meaning two sentences are, from 0 to 5.",
        "How similar is what the two sentences say?",
        "Semantic similarity of a pair of sentences, as a number.",
    ),
    "mnli": (
        "Decide whether the hypothesis follows from the premise, contradicts it, or neither.",
        "Given the premise, is the hypothesis true, false or undetermined?",
        "Natural language inference with three classes over many genres.",
    ),
    "qnli": (
        "Decide whether the sentence holds the answer to the question.",
        "Can the question be answered from this sentence of an encyclopedia?",
        "Match questions with sentences that answer them.",
    ),
    "rte": (
        "Decide whether the second sentence follows from the first.",
        "Does the first text imply the second one?",
        "Recognise textual entailment in pairs of short texts.",
    ),
    "wnli": (
        "Decide whether the second sentence, which names what a pronoun means, follows from the first.",
        "Is this noun what the pronoun in the first sentence stands for?",
        "Resolve pronouns by knowledge of the world.",
    ),
}
"""What `conditioning: text` goes by."""

_PAIR = ("{sentence1}", "{sentence2}")
_IMPLIED = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "cola",
            "CoLA",
            ("{sentence}",),
            ("unacceptable", "acceptable"),
            ("matthews",),
            "Would a native speaker of English take this sentence for well formed? The sentences are the examples of "
            "books and articles on linguistics, and seven of ten are acceptable, so a model that always says so has "
            "learned nothing: the score is Matthews' correlation.",
        ),
        _task(
            "sst2",
            "SST-2",
            ("{sentence}",),
            ("negative", "positive"),
            ("accuracy",),
            "Does this piece of a film review speak well or badly of the film? The training rows are phrases of all "
            "lengths, down to a word or two; the test rows are whole sentences. Everything is in lower case.",
            validation_from="train",
        ),
        _task(
            "mrpc",
            "MRPC",
            _PAIR,
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            "Do these two sentences from the news say the same thing? They were found by their shared words, so those "
            "alone give little away; two of three pairs are equivalent, which is why F1 stands beside accuracy.",
        ),
        _task(
            "qqp",
            "QQP",
            ("{question1}", "{question2}"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            "Do these two questions, asked on a public site, ask for the same thing, so that one answer would do for "
            "both? About three of eight pairs are duplicates.",
            validation_from="train",
        ),
        _task(
            "stsb",
            "STS-B",
            _PAIR,
            (),
            ("pearson", "spearman"),
            "How near in meaning are these two sentences, from 0 (nothing in common) to 5 (the same)? They come from "
            "news, captions of pictures and forums, and the target is the mean of several people's ratings.",
        ),
        _task(
            "mnli",
            "MNLI",
            ("{premise}", "{hypothesis}"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            "Given the premise, is the hypothesis true (entailment), false (contradiction), or may it be either "
            "(neutral)? The premises come from speech, fiction and reports. The test rows are of the genres of the "
            "training rows (matched); for the others, spell a task of your own whose source has the test split "
            "validation_mismatched.",
            validation_from="train",
            test="validation_matched",
            prompt="mnli hypothesis: {hypothesis} premise: {premise}",
        ),
        _task(
            "qnli",
            "QNLI",
            ("{question}", "{sentence}"),
            _IMPLIED,
            ("accuracy",),
            "Does this sentence of an encyclopedia hold the answer to the question? The questions are those of SQuAD, "
            "and every sentence comes from the paragraph that the question was asked about.",
            validation_from="train",
        ),
        _task(
            "rte",
            "RTE",
            _PAIR,
            _IMPLIED,
            ("accuracy",),
            "Does the first text, from news or an encyclopedia, imply the second one, as somebody who reads it would "
            "say? The rows are those of four yearly contests, and there are few of them.",
        ),
        _task(
            "wnli",
            "WNLI",
            _PAIR,
            ("not_entailment", "entailment"),
            ("accuracy",),
            "The second sentence repeats a part of the first one with a noun in place of a pronoun: is that what the "
            "pronoun meant? Averages over GLUE mostly leave this task out: its rows come in groups that differ by a "
            "word and have opposite answers, so what a model remembers of the training rows misleads it.",
        ),
    )
}

GLUE: tuple[str, ...] = tuple(name for name in TASKS if name != "wnli")
"""The eight tasks of the paper, in its order."""
