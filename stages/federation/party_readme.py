"""README.md of a party's own folder: its rows, its commands, and who takes part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stages.exchange.invites import Invite, extras_of
from stages.federation.party_steps import Act, before_rounds, in_round
from stages.parties.names import of, said
from stages.runtime.texts import in_markdown
from stages.runtime.version import VERSION
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, MACHINE
from stages.workspace.settings import Role, clipped


def readme(agreement: Agreement, sha256: str, client: int | None, rows: Sequence[str], invite: Invite | None) -> bytes:
    """The page. rows: where this party's rows go, from the folder down. invite: what the folder was made from."""
    name, party = agreement.federation.name, said(of(client))
    extras = extras_of(agreement, client)
    package = f"fedcollm[{','.join(extras)}]" if extras else "fedcollm"
    begin = (
        f"Install `{package}`, version {invite.made_with if invite else VERSION}.",
        f"Put your rows here: {', '.join(f'`{place}`' for place in rows)}. They never leave this machine.",
        f"Write into `{MACHINE}` where the models are, if they are not fetched, and which device this machine has.",
        f"Nobody edits `{AGREEMENT}` or `tasks/`. After any edit, even of a comment, it is another agreement.",
    )
    parts = [
        f"# {in_markdown(name)}: {party}",
        f"This folder is {party}'s part of the federation {in_markdown(name)}. Other parties have their own.",
        _table(agreed(agreement, sha256, client)),
        "## Begin",
        "\n".join(f"{number}. {act}" for number, act in enumerate(begin, 1)),
        "Then, once:",
        _shell(before_rounds(agreement, client)),
        "`prefetch --no-tasks` leaves out the questions, for a party that does not score.",
        "## A round",
        "This command does the next step, and says what it waits for. It is for cron too:",
        f"```sh\n{Command('next', client=client, server=client is None)}\n```",
        "Step by step, round 1 is:",
        _shell(in_round(agreement, client, 1)),
    ]
    first, second = (_unnumbered(in_round(agreement, client, round)) for round in (1, 2))
    if agreement.federation.rounds > 1:
        other = "" if first == second else " Each later round has these steps:"
        parts.append(f"There are {agreement.federation.rounds} rounds.{other}")
        parts += [] if first == second else [_shell(in_round(agreement, client, 2))]
    parts += _others(client)
    parts += _invited(invite) if invite else []
    return ("\n\n".join(parts) + "\n").encode()


def agreed(agreement: Agreement, sha256: str, client: int | None) -> list[tuple[str, str]]:
    """What was agreed, in short: what it is called, and what it is. Names of others are cut, and still not safe."""
    federation, mine = agreement.federation, agreement if client is None else agreement.of_client(client)
    roles: tuple[Role, ...] = ("slm", "llm") if client is None else ("slm",)
    found = [
        ("federation", federation.name),
        ("party", said(of(client))),
        ("clients and rounds", f"{federation.clients} clients, {federation.rounds} rounds"),
        ("method", f"{federation.method}, {agreement.aggregation.mode} mode"),
        *(("SLM" if role == "slm" else "LLM", clipped(mine.model_of(role).model)) for role in roles),
        ("tasks", clipped(", ".join(agreement.evaluation.tasks or agreement.data.tasks) or "none")),
    ]
    if agreement.privacy.is_on:
        found.append(("differential privacy", f"epsilon {agreement.privacy.epsilon}, delta {agreement.privacy.delta}"))
    return [*found, ("sha256 of the agreement", f"{sha256[:16]}: {sha256}")]


def _table(lines: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {in_markdown(value)} |" for name, value in lines)])


def _shell(acts: Sequence[Act]) -> str:
    width = max(len(str(act.command)) for act in acts)
    return "\n".join(["```sh", *(f"{act.command!s:{width}}  # {act.why}" for act in acts), "```"]) if acts else ""


def _unnumbered(acts: Sequence[Act]) -> list[str]:
    return [str(act.command.also(round=1)) for act in acts]


def _others(client: int | None) -> list[str]:
    push, pull, watch = (Command(verb, client=client, server=client is None) for verb in ("push", "pull", "watch"))
    carried = (
        f"`{Command('pack')}` writes one file, to mail or to carry; `{Command('unpack', 'FILE')}` takes one that has "
        f"arrived. Where all reach one place, name it as `remote` in `{MACHINE}`: then `{watch}` takes every "
        f"step, and carries. Or `{push}` and `{pull}` carry alone."
    )
    help_ = f"`{Command('status')}` says what is done. `{Command('plan')}` says what is missing on this machine."
    return ["## Carry", carried, "`exchange/` is the only folder that travels.", help_]


def _invited(invite: Invite) -> list[str]:
    """What the invitation says besides: models' files, and keys."""
    parts = ["## What the invitation says"]
    for model in invite.models:
        revision = f", revision {in_markdown(clipped(model.revision))}" if model.revision else ""
        parts.append(f"{model.role.upper()}: {in_markdown(clipped(model.name))}{revision}")
        if model.files:
            parts.append("\n".join(["```text", *(f"{digest}  {name}" for name, digest in model.files.items()), "```"]))
    if invite.parties:
        parts.append("Fingerprints of keys that the organiser had:")
        parts.append(_table((said(one.party), one.key) for one in invite.parties))
    if invite.roster:
        parts.append(f"The roster's fingerprint was {invite.roster}. Compare it with another client all the same.")
    return parts
