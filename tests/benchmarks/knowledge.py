"""FedMKT: its steps against what they cannot be faster than, a bare forward pass or a cross-entropy step; memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from stages.artefacts.vocabulary_files import Kind, Vocabulary
from stages.data.examples import Example
from stages.distillation import captures, top_k_logits
from stages.distillation.alignment import MAPPINGS, exact
from stages.distillation.cuts import Cuts
from stages.distillation.knowledge import Knowledge, Told, knowledge_bytes, knowledge_of
from stages.distillation.learning import Learning, Pupil
from stages.distillation.lessons import Lesson, lesson_of
from stages.distillation.pairs import Pair, Voice
from stages.models.packing import answer_logits, collate
from stages.models.tuned import Tuned
from stages.training import recipes, training
from stages.training.objective import Objective, task_loss
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine
from tests.benchmarks import gpt2_on_arc as arc
from tests.benchmarks.repeats import shown

STEPS, RATE, K, LAYERS = 8, 1e-3, 64, 6
SETTINGS = Distillation(steps=STEPS, batch_size=arc.BATCH, top_k=K)
PAPERS_LENGTH = 512


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    rows: list[tuple[str, str, str]] = []
    if arc.available():
        examples = arc.examples(128)
        student = arc.model("slm", LAYERS, autocast=True)
        told = knows(student, examples)
        rows += [
            ("share-knowledge over a bare forward pass", shared(repeats, student, examples), "<= 1.30"),
            *(
                (
                    f"client-distill step ({kind}) over a cross-entropy step",
                    taught(repeats, examples, told, kind),
                    "<= 1.10",
                )
                for kind in ("tokens", "spans", "sorted")
            ),
            *on_the_wire(told, student, len(examples)),
        ]
    seconds, size = aligned()
    rows.append((f"align, {size}: seconds for all three maps, one way", f"{seconds:.0f}", "<= 60"))
    rows.append(("client-distill, 262,144 tokens, batch 8: GB at most", f"{peak():.1f}", "<= 3"))
    return rows


def shared(repeats: int, teacher: Tuned, examples: Sequence[Example]) -> str:
    """What is told, over the logits alone of the same batches."""

    def bare() -> None:
        teacher.model.eval()
        with torch.no_grad():
            for start in range(0, len(examples), arc.BATCH):
                batch = collate(examples[start : start + arc.BATCH], longest_packed=teacher.longest_packed)
                with torch.autocast("cpu", torch.bfloat16):
                    answer_logits(teacher.model, batch)

    def whole() -> None:
        knows(teacher, examples)

    def seconds(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    bare()
    return shown([seconds(whole) / seconds(bare) for _ in range(max(repeats, 3))])


def knows(teacher: Tuned, examples: Sequence[Example]) -> Knowledge:
    """What it knows of these rows."""
    vocabulary = int(teacher.model.get_output_embeddings().weight.shape[0])
    source = top_k_logits.Source("d" * 64, top_k_logits.rows_sha256(examples), 1.0, vocabulary, K)
    with tempfile.TemporaryDirectory() as folder:
        found = captures.capture(
            teacher,
            examples,
            source,
            rows=arc.BATCH,
            every=100,
            folder=Path(folder) / "work",
            inputs={},
            also=("losses", "chances"),
            report=lambda event: None,
        )
    return knowledge_of(found, cuts(examples), Told("d" * 64, "e" * 64, 1.0, vocabulary, K))


def cuts(examples: Sequence[Example]) -> Cuts:
    """As if each token were a byte."""
    ends = [np.arange(one.prompt_tokens, len(one.input_ids)) for one in examples]
    return Cuts(
        "d" * 64,
        "e" * 64,
        np.array([one.answer_tokens for one in examples], np.int32),
        np.concatenate(ends).astype(np.int32),
    )


def lesson(told: Knowledge, examples: Sequence[Example], kind: str) -> Lesson:
    """Of a teacher of the same vocabulary."""
    tokens = [(Kind.TEXT, number.to_bytes(3, "big")) for number in range(told.told.vocabulary)]
    vocabulary, known = Vocabulary.of(tokens, {}, "c" * 64), cuts(examples)
    voice = Voice(vocabulary, known, arc.IDENTITY, "f" * 64)
    return lesson_of("server", told, Pair(voice, voice, exact(vocabulary, vocabulary), None), kind)  # type: ignore[arg-type]


def taught(repeats: int, examples: Sequence[Example], told: Knowledge, kind: str) -> str:
    """A step with a teacher for every row, over one without."""
    pupils = [Pupil(one.input_ids, one.prompt_tokens, row) for row, one in enumerate(examples)]
    lessons, settings = (
        [lesson(told, examples, kind)],
        SETTINGS.model_copy(update={"divergence": "forward" if kind == "tokens" else kind}),
    )
    every = [np.ones(len(pupils), np.float32)]
    weights = {"slm_ft": 1.0, "slm_kd": 1.0, "slm_taught": 0.0}

    def run(make: Callable[[Tuned], Objective]) -> arc.Clock:
        clock = arc.Clock()
        recipe = recipes.Recipe(budget=settings, learning_rates={"slm": RATE}, clips={}, warmup_steps=0, seed=1)
        with tempfile.TemporaryDirectory() as folder:
            training.train(
                make(arc.model("slm", LAYERS, autocast=True)),
                pupils,
                recipe,
                machine=Machine(device="cpu"),
                folder=Path(folder) / "work",
                inputs={},
                report=lambda event: clock.step(dict(event.values)) if event.kind == "step" else None,
            )
        return clock

    clocks = arc.in_turn(
        max(repeats, 3),
        {
            "taught": lambda: run(lambda one: Learning(one, lessons, every, settings, weights)),
            "alone": lambda: run(lambda one: Objective([one], task_loss, weights)),
        },
    )
    return arc.times_faster(clocks, "alone", "taught")


def on_the_wire(told: Knowledge, student: Tuned, rows: int) -> list[tuple[str, str, str]]:
    """Bytes a row, over those of the paper's N x S x K numbers with their ids, and over an adapter's."""
    size = len(knowledge_bytes(told))
    adapter = 4 * sum(one.numel() for one in student.model.parameters() if one.requires_grad)
    return [
        (
            f"knowledge of {rows} rows over N x S x K numbers and ids",
            f"{size / (rows * PAPERS_LENGTH * K * 8):.4f}",
            "",
        ),
        (f"knowledge of {rows} rows over an adapter", f"{size / adapter:.2f}", ""),
    ]


def aligned() -> tuple[float, str]:
    """A vocabulary of 131,072 tokens against one of SmolLM2's size, on one core: words, and what is begun of them."""
    draw = np.random.default_rng(1)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgk", np.uint8)

    def vocabulary(count: int) -> Vocabulary:
        found: dict[bytes, None] = {}
        while len(found) < count:
            word = letters[draw.integers(0, len(letters), draw.integers(1, 9))].tobytes()
            found[b" " + word if draw.random() < 0.5 else word] = None
        return Vocabulary.of([(Kind.TEXT, token) for token in found], {}, "c" * 64)

    teacher, student = vocabulary(131_072), vocabulary(49_152)
    started = time.process_time()
    for mapping in MAPPINGS.values():
        mapping(teacher, student, lambda event: None)
    return time.process_time() - started, f"{teacher.rows:,} x {student.rows:,} tokens"


def peak() -> float:
    """The most memory of one process that learns, in GB, with a large vocabulary and a tiny body."""
    code = "import sys; sys.path.insert(0, 'tests')\n"  # as tests.benchmarks itself does
    code += "from tests.benchmarks import knowledge; knowledge.learn_with_many_tokens()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return int(done.stdout.split()[-1]) / 1e6


def learn_with_many_tokens() -> None:
    """Print the most kilobytes that a step at batch 8, and what is told before it, have taken."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from stages.models import adapters, packing

    generator = torch.Generator().manual_seed(1)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=262_144, n_embd=64, n_layer=2, n_head=2, use_cache=False))
    longest_packed = packing.packs(base)
    tuned = adapters.attach(base, arc.SETTINGS)
    adapters.make_fresh(tuned, 1)
    student = Tuned("slm", tuned, None, arc.IDENTITY, autocast=False, longest_packed=longest_packed)  # type: ignore[arg-type]
    drawn = torch.randint(262_144, (8, 40), generator=generator).tolist()
    pupils = [Pupil(ids, 28, row) for row, ids in enumerate(drawn)]
    told = knows(student, pupils)
    weights = {"slm_ft": 1.0, "slm_kd": 1.0, "slm_taught": 0.0}
    learning = Learning(student, [lesson(told, pupils, "tokens")], [np.ones(8, np.float32)], SETTINGS, weights)
    learning(**learning.collate(pupils))["loss"].backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
