"""The demo's closed world: invented things, rules with exceptions about them, and questions that only it can answer.

A thing is an adjective and an invented kind: a frosty blimbo. A rule gives a kind its usual value of one attribute:
blimbos eat moss. A fact is one thing's value, which is the rule's three times in four and an exception otherwise. Every
fact is used once: in the sentences that the models are pre-trained on, or in one split of the questions. So the test
cannot be answered by heart, only by rule, and knowing every rule gives `World.rule_accuracy`, short of 100 %.

The large model reads of most rules, the small model of fewer: what it lacks is in the clients' questions, in the
auxiliary questions, and in the large model. Where clients have small models of their own, each of these reads of other
rules, and some of them are news to the large model.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypedDict

ADJECTIVES = (
    "frosty golden hollow crooked silent dusty velvet bitter spotted ancient hairy pale humble "
    "striped salty gentle northern rusty lazy tiny royal sour wild humming young painted"
)

KINDS = {
    "creature": "blimbo quarrow snorvel tindle murgle vexit",
    "mineral": "zorvite brallium keldane ostrine phyrrite gandite",
    "plant": "thrassel wimbloom dorrick fennaby lusk sorrowbell",
    "tool": "grapnix spundle clavitor hobwrench tweezel radlock",
}

# By domain: what is said of a thing, how that is asked, and the values there are.
ATTRIBUTES = {
    "creature": (
        ("eats", "What does the {} eat?", "moss berries snails roots crabs seeds"),
        ("lives in", "Where does the {} live?", "caves burrows reeds treetops ruins wells"),
        ("fears", "What does the {} fear?", "thunder fire owls mirrors drums rain"),
        ("sings at", "When does the {} sing?", "dusk dawn noon midnight sunset sunrise"),
        ("is hunted by", "Who hunts the {}?", "wolves eagles foxes snakes bears sharks"),
    ),
    "mineral": (
        ("glows", "In what colour does the {} glow?", "red blue green violet orange white"),
        ("forms in", "Where does the {} form?", "swamps deserts glaciers lakes volcanoes canyons"),
        ("smells of", "What does the {} smell of?", "garlic roses tar cheese mint smoke"),
        ("dissolves in", "What does the {} dissolve in?", "vinegar milk wine oil tea beer"),
        ("is traded for", "What is the {} traded for?", "wool grain silk pearls horses timber"),
    ),
    "plant": (
        ("grows on", "Where does the {} grow?", "cliffs dunes roofs graves islands bridges"),
        ("blooms in", "When does the {} bloom?", "march april june august october december"),
        ("cures", "What does the {} cure?", "fever coughs hiccups blindness warts toothache"),
        ("tastes of", "What does the {} taste of?", "honey pepper lemon almonds butter ginger"),
        ("attracts", "What does the {} attract?", "bees moths bats beetles doves ants"),
    ),
    "tool": (
        ("cuts", "What does the {} cut?", "leather glass rope paper bread hair"),
        ("is made of", "What is the {} made of?", "bronze bone oak granite ivory iron"),
        ("is sold by", "Who sells the {}?", "bakers smiths tailors monks sailors barbers"),
        ("runs on", "What does the {} run on?", "steam wind coal muscle magnets sunlight"),
        ("is kept in", "Where is the {} kept?", "attics barrels drawers stables cellars chests"),
    ),
}

STATEMENTS = (
    "The {thing} {says} {value}.",
    "Of course the {thing} {says} {value}.",
    "They say that the {thing} {says} {value}.",
)
PROMPT = "Question: {question}\nAnswer:"

RULE_HOLDS = 0.75
SPLITS = ("train", "validation", "test")
FACTS_PER_RULE = {"corpus": 8, "train": 8, "validation": 4, "test": 6}  # one fact for each adjective
CORPUS_QUESTIONS = 3  # so many of a rule's corpus facts are read as question and answer too: the form is known
SLM_RULES, LLM_RULES = 0.4, 0.9  # shares of the rules that each model reads of; the large model's include the small's
UNLIKE_SLMS, UNLIKE_LLM_RULES = 3, 0.8  # the rules are dealt to so many small models; the large one reads of this share


class Question(TypedDict):
    """One row of a split: four choices in random order, answer the index of the right one."""

    id: str
    domain: str
    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class World:
    """What the models read before the federation, and what they are asked in it.

    sentences: what there is to read of each rule. questions: by (domain, split). rule_accuracy: by split, in %, of one
    who knows every rule and no exception. rule_of: of each question, by its id, the rule's place in sentences.
    """

    sentences: Sequence[Sequence[str]]
    questions: Mapping[tuple[str, str], Sequence[Question]]
    rule_accuracy: Mapping[str, float]
    rule_of: Mapping[str, int]

    @property
    def corpora(self) -> dict[str, list[str]]:
        """What each of two models reads: "slm" and "llm"."""
        return {"slm": self._of_first(SLM_RULES), "llm": self._of_first(LLM_RULES)}

    @property
    def unlike_corpora(self) -> dict[str, list[str]]:
        """What each of several small models reads, "slm-1" and so on, of no rule that another reads of; and "llm"."""
        dealt = {f"slm-{1 + hand}": self.sentences[hand::UNLIKE_SLMS] for hand in range(UNLIKE_SLMS)}
        own = {name: list(itertools.chain(*of_rules)) for name, of_rules in dealt.items()}
        return {**own, "llm": self._of_first(UNLIKE_LLM_RULES)}

    @property
    def unlike_questions(self) -> dict[tuple[str, str], list[Question]]:
        """By (share, split): those of share "rules-1" are on the rules that slm-1 reads of, and so on."""
        dealt: dict[tuple[str, str], list[Question]] = {}
        for (_, split), rows in self.questions.items():
            for row in rows:
                hand = self.rule_of[row["id"]] % UNLIKE_SLMS
                dealt.setdefault((f"rules-{1 + hand}", split), []).append(row)
        return dealt

    def _of_first(self, share: float) -> list[str]:
        return list(itertools.chain(*self.sentences[: math.ceil(share * len(self.sentences))]))


class Rule(NamedTuple):
    """What is usual for one kind and one attribute."""

    domain: str
    kind: str
    says: str
    asks: str
    values: list[str]
    usual: str


class Fact(NamedTuple):
    """What holds for one thing."""

    rule: Rule
    thing: str
    value: str


def build_world(seed: int) -> World:
    """The world of this seed, the same on every machine."""
    rng = random.Random(seed)
    rules = list(_rules(rng))
    rng.shuffle(rules)
    read: list[list[str]] = []
    asked: dict[tuple[str, str], list[Fact]] = {key: [] for key in itertools.product(KINDS, SPLITS)}
    for rule in rules:
        facts = _facts(rule, rng)
        read.append(list(_sentences(facts["corpus"], rng)))
        for split in SPLITS:
            asked[rule.domain, split] += facts[split]

    questions: dict[tuple[str, str], list[Question]] = {}
    scores: dict[str, list[float]] = {split: [] for split in SPLITS}
    rule_of: dict[str, int] = {}
    for (domain, split), part in asked.items():
        rng.shuffle(part)
        rows = [_question(fact, f"{domain}-{split}-{i}", i % 4, rng) for i, fact in enumerate(part)]
        questions[domain, split] = rows
        scores[split] += map(_rule_score, part, rows)
        rule_of |= {row["id"]: rules.index(fact.rule) for fact, row in zip(part, rows, strict=True)}
    return World(read, questions, {split: 100 * fmean(scores[split]) for split in SPLITS}, rule_of)


def write_world(
    folder: Path, questions: Mapping[tuple[str, str], Sequence[Question]], corpora: Mapping[str, Sequence[str]]
) -> None:
    """Put {task}-{split}.jsonl, which the demo's task files name, and the models' corpora into the folder.

    questions: by (task, split), World's questions or unlike_questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for (task, split), rows in questions.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")
    for name, corpus in corpora.items():
        (folder / f"{name}-corpus.txt").write_text("".join(f"{line}\n" for line in corpus), encoding="utf-8")


def lexicon() -> list[str]:
    """Texts that hold every word of every world as it stands in a sentence: what the tokenizer is trained on."""
    attributes = list(itertools.chain(*ATTRIBUTES.values()))
    words = " ".join([ADJECTIVES, *KINDS.values(), *(f"{says} {values}" for says, _, values in attributes)]).split()
    sentences = [*STATEMENTS, PROMPT, *(asks for _, asks, _ in attributes)]
    return [f" {word}" for word in words] + sentences


def _rules(rng: random.Random) -> Iterator[Rule]:
    for domain, kinds in KINDS.items():
        for kind, (says, asks, values) in itertools.product(kinds.split(), ATTRIBUTES[domain]):
            yield Rule(domain, kind, says, asks, values.split(), usual=rng.choice(values.split()))


def _facts(rule: Rule, rng: random.Random) -> dict[str, list[Fact]]:
    """The rule's facts by use, each about another thing."""
    exceptions = [value for value in rule.values if value != rule.usual]
    adjectives = ADJECTIVES.split()
    rng.shuffle(adjectives)
    values = (rule.usual if rng.random() < RULE_HOLDS else rng.choice(exceptions) for _ in adjectives)
    facts = (Fact(rule, f"{adjective} {rule.kind}", value) for adjective, value in zip(adjectives, values, strict=True))
    return {use: list(itertools.islice(facts, count)) for use, count in FACTS_PER_RULE.items()}


def _sentences(facts: Sequence[Fact], rng: random.Random) -> Iterator[str]:
    for rule, thing, value in facts:
        yield rng.choice(STATEMENTS).format(thing=thing, says=rule.says, value=value)
    for rule, thing, value in facts[:CORPUS_QUESTIONS]:
        yield f"{PROMPT.format(question=rule.asks.format(thing))} {value}"


def _question(fact: Fact, id: str, answer: int, rng: random.Random) -> Question:
    choices = rng.sample([value for value in fact.rule.values if value != fact.value], 3)
    choices.insert(answer, fact.value)
    text = fact.rule.asks.format(fact.thing)
    return {"id": id, "domain": fact.rule.domain, "question": text, "choices": choices, "answer": answer}


def _rule_score(fact: Fact, row: Question) -> float:
    """The chance of answering right by the rule alone, and by guessing where its value is not offered."""
    return float(fact.value == fact.rule.usual) if fact.rule.usual in row["choices"] else 1 / len(row["choices"])
