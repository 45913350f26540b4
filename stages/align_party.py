"""align, FedMKT: a party tells how its tokenizer reads, and is aligned with whoever has told that too.

Reads its tokenizer and its public rows, no weights but their bytes. Writes exchange/round-0001/vocabulary-client-k
(-server): its vocabulary as bytes, and where it cuts each row: all that others need of its tokenizer. And, as soon as
the other's is there, maps and report in private/client-k/alignment (at the server private/server/alignment-client-k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import PUBLIC, already_made, publish
from stages.artefacts.steps import Over, Step
from stages.files import writing
from stages.parties import names
from stages.parties.party import Party
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, CUTS, VOCABULARY
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.artefacts.vocabulary_files import Vocabulary
    from stages.distillation.alignment_figures import AlignmentReport
    from stages.distillation.cuts import Cuts
    from stages.distillation.public import Public
    from stages.models.tuned import Outline


def align_party(
    workspace: Workspace, *, client: int | None = None, overwrite: bool = False, report: Report = ignore
) -> dict[int, AlignmentReport]:
    """Tell how one party (None: the server) reads, and align it with whoever has told that too.

    Returns the report of each pair, by its client. Raises UsageProblem where the method needs none of it, and for a
    tokenizer that cannot be aligned.
    """
    if not workspace.agreement.federation.server_tells:
        message = f"method {workspace.agreement.federation.method} has one SLM and one LLM: align them by themselves"
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=Command("align"))
    if client is not None:
        workspace.check_client(client)
    party, folder = Party.of(workspace, client), workspace.vocabulary(client)
    log = workspace.log("align", 1, client)
    ShareVocabulary(party=party, publishes=[folder], log=log, overwrite=overwrite, report=report).take()
    from stages.distillation.pairs import pair_with
    from stages.distillation.public import read_public

    public = read_public(party, report)
    others = [k for k in workspace.clients if workspace.vocabulary(k).exists()] if client is None else [client]
    if client is not None and not workspace.vocabulary(None).exists():
        waits = "the server's vocabulary is not here yet, so the pair is not measured"
        report(Event("note", f"{waits}: client-distill does that, or the same command once it has come"))
        return {}
    return {k: pair_with(party, k, public, report, overwrite=overwrite).report for k in others}


class Own(NamedTuple):
    """The public rows, and how the party's tokenizer reads them."""

    public: Public
    outline: Outline
    vocabulary: Vocabulary
    cuts: Cuts
    left_out: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ShareVocabulary(Step[Own, Draft, Manifest]):
    """A party tells its vocabulary as bytes, and where it cuts each public row: others need no more of it."""

    @property
    def role(self) -> Role:
        """What its model is."""
        return "llm" if self.party.is_server else "slm"

    def open(self) -> Own:
        """Read the tokenizer, and the rows by it."""
        from stages.distillation.cuts import cuts_of
        from stages.distillation.public import examples_of, read_public, tell_left_out
        from stages.models.loading import Models
        from stages.models.token_bytes import vocabulary_of

        self.report(Event("stage", f"align: how {names.said(self.party.name)} reads"))
        public, outline = read_public(self.party, self.report), Models(self.workspace).outline(self.role)
        whose = "the LLM" if self.party.is_server else f"client {self.party.number}'s model"
        vocabulary = vocabulary_of(outline.tokenizer, outline.vocabulary, whose)
        examples = examples_of(public, outline, self.workspace)
        cuts = cuts_of(public.rows, examples, vocabulary, public.sha256)
        told = [positions for positions in cuts.positions.tolist() if positions]
        return Own(public, outline, vocabulary, cuts, tell_left_out(public, told, self.report))

    def look(self, opened: Own, again: bool) -> Manifest | None:
        """What was told before. Raises Refused if the tokenizer is another one now."""
        [folder], data = self.publishes, opened.public.sha256
        done = already_made(folder, {}, by=self.party, overwrite=again, log=self.log, data=data, rows=PUBLIC)
        if done and done.files[VOCABULARY].sha256 != opened.vocabulary.sha256:
            message = f"{self.workspace.shown(folder)} was made from other inputs; changed since: the tokenizer"
            raise Refused(message, where=folder, mend="give the command again with --overwrite to replace it")
        return done

    def compute(self, opened: Own, again: bool) -> Draft:
        """Identify the base by its files: what is told is of this model, and of no other."""
        from stages.bases import base_folders
        from stages.models.identity import identify

        quantization = self.workspace.agreement.model_of(self.role).quantization
        base = identify(base_folders.folder(self.workspace, self.role), opened.outline.tokenizer, quantization)
        return Draft(
            stage="align",
            role=self.role,
            round=1,
            parents={},
            base=base,
            parameters=0,
            examples=int((opened.cuts.positions > 0).sum()),
            tokens=len(opened.cuts.ends),
            metrics=opened.left_out,
        )

    def publish(self, opened: Own, computed: Draft, over: Over) -> Manifest:
        """Publish it, and write the log."""
        from stages.artefacts.vocabulary_files import vocabulary_bytes
        from stages.distillation.cuts import cuts_bytes

        [folder] = self.publishes
        contents = {VOCABULARY: vocabulary_bytes(opened.vocabulary), CUTS: cuts_bytes(opened.cuts)}
        manifest = publish(folder, contents, computed, by=self.party, over=over[folder])
        writing.write_log(self.log, [{"inputs": {"data": opened.public.sha256}}])
        return manifest
