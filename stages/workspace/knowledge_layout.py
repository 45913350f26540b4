"""Where FedMKT's files are: public rows, vocabularies, the maps between them, and what models know."""

from __future__ import annotations

from pathlib import Path

from stages.workspace.layout import Layout


class KnowledgeLayout(Layout):
    """What a workspace of FedMKT has beyond the others."""

    def public_data(self, client: int | None) -> Path:
        """FedMKT's D_p, the same rows at every party: at the server D^a, at a client a copy of it."""
        return self.auxiliary_data if client is None else self.private / f"client-{client}" / "public.jsonl"

    def vocabulary(self, client: int | None) -> Path:
        """A party's vocabulary as bytes, and how it cuts the public rows: once, from it to all that learn from it."""
        return self._exchange(1) / f"vocabulary-{'server' if client is None else f'client-{client}'}"

    def knowledge(self, round: int, client: int | None) -> Path:
        """What a party's model knows of the public rows: S_k from a client to the server, S_0 from it to all."""
        return self._exchange(round) / "server" if client is None else self.sent_by(round, client)

    def told_in(self, round: int) -> int:
        """In which round the server tells what clients learn from in this one: a fixed LLM tells it once."""
        return round if self.agreement.federation.clients_tell else 1

    def alignment_with(self, client: int, *, at: int | None) -> Path:
        """The maps between a client's vocabulary and the server's, as made by the client (at) or by the server (None).

        Both make the same; each trusts its own.
        """
        if at is None:
            return self.private / "server" / f"alignment-client-{client}"
        return self.private / f"client-{at}" / "alignment"
