"""How lm-eval's questions are put: examples before each, a system's words, a chat template; as its command does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval.api.task import ConfigurableTask

from stages.evaluation.harness import Harness
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.workspace.names import AGREEMENT
from stages.workspace.rows_and_scores import Evaluation

SEED = 1234
"""Of the choice of examples, as the `lm_eval` command has it."""


class Prompting(NamedTuple):
    """What stands before a question. With a chat template examples are turns of their own."""

    num_fewshot: int = 0
    apply_chat_template: bool = False
    system_prompt: str | None = None

    @staticmethod
    def of(settings: Evaluation) -> Prompting:
        """As the agreement has it."""
        return Prompting(settings.num_fewshot, settings.apply_chat_template, settings.system_prompt)

    @property
    def arguments(self) -> dict[str, Any]:
        """For lm-eval's evaluate."""
        return {
            "system_instruction": self.system_prompt,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.apply_chat_template,
        }

    def build(self, lm: Harness, task: ConfigurableTask, limit: int | None) -> None:
        """Make a task's requests, as lm-eval's evaluate would, with the same examples each time.

        A task that says 0 has none, as with lm-eval.
        """
        if task.config.num_fewshot != 0:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        task.set_fewshot_seed(seed=SEED)
        template = lm.apply_chat_template if self.apply_chat_template else None
        task.build_all_requests(limit=limit, rank=0, world_size=1, chat_template=template, **self.arguments)

    def check(self, lm: Harness, tasks: Sequence[ConfigurableTask], report: Report) -> None:
        """Raise UsageProblem where there is no template to apply; tell of examples from the questions themselves."""
        if self.apply_chat_template and not lm.tokenizer.chat_template:
            message = "evaluation.apply_chat_template: this model's tokenizer has no chat template"
            mend = "score an instruct model, or put its chat_template.jinja into the model's folder"
            raise UsageProblem(message, where=AGREEMENT, mend=mend)
        for task in tasks if self.num_fewshot else ():
            if not (task.config.fewshot_split or task.has_training_docs() or task.has_validation_docs()):
                words = (
                    f"{task.config.task} has no other split: its examples are taken from the questions that are scored"
                )
                report(Event("warning", words))


ZERO_SHOT = Prompting()
"""Nothing before a question."""
