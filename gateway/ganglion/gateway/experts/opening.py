"""The room of a gateway that starts: its parts, and what it does beside requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from ganglion.gateway.deployments import Deployments
from ganglion.gateway.experts.admission import Admission
from ganglion.gateway.experts.engine import LeadEngine
from ganglion.gateway.experts.external import ServerClient
from ganglion.gateway.experts.gate import GATE_FOLDER, FolderGate, PriorGate
from ganglion.gateway.experts.outcomes import OutcomeLog, is_logging, read_outcomes
from ganglion.gateway.experts.profile import Kind
from ganglion.gateway.experts.reports import Reporter
from ganglion.gateway.experts.room import ExpertRoom
from ganglion.gateway.experts.saturation import Tally
from ganglion.gateway.experts.scoring import normalized
from ganglion.gateway.experts.servers import Servers
from ganglion.gateway.experts.table import ExpertTable
from ganglion.gateway.generation import Sessions
from ganglion.gateway.leads import LeadClients
from ganglion.gateway.preparing import Preparer
from ganglion.gateway.watch import CoordinatorLink
from ganglion.wire.address import split_address
from ganglion.wire.errors import GanglionError
from ganglion.wire.home import Home
from ganglion.wire.limits import CONNECT_S

Measure = Callable[[], Awaitable[float]]


@contextlib.asynccontextmanager
async def open_room(
    home: Home,
    link: CoordinatorLink,
    deployments: Deployments,
    *,
    preparer: Preparer,
    sessions: Sessions,
    leads: LeadClients,
    table: ExpertTable,
) -> AsyncIterator[ExpertRoom]:
    """The room, reporting to the coordinator; closed afterwards."""
    admission, clients = Admission(deployments, Servers(home)), ServerClient()
    prior = PriorGate(lambda name: found.domains if (found := table.get(name)) is not None else ())
    gate = await asyncio.to_thread(FolderGate, home.path / GATE_FOLDER, prior)

    def expected() -> tuple[Sequence[str], Sequence[Kind]]:
        names = [expert.name for expert in table.experts]
        return names, gate.kinds(names)

    reporter = Reporter(link, partial(_links, table, admission, clients), expected)
    room = ExpertRoom(
        selector=link,
        admission=admission,
        clients=clients,
        preparer=preparer,
        sessions=sessions,
        gate=gate,
        reporter=reporter,
        log=OutcomeLog(home),
        tally=await asyncio.to_thread(_tally_of, home),
        table=table,
        engine=LeadEngine(leads),
    )
    reporting = asyncio.create_task(reporter.run())
    try:
        yield room
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        await clients.close()


def _tally_of(home: Home) -> Tally:
    """What the log of outcomes, where one is kept, tells of how many answers are worth it."""
    tally = Tally()
    for outcome in read_outcomes(home) if is_logging(home) else ():
        if outcome.combine in {"vote", "rerank"}:
            said = [normalized(answer.text) for answer in outcome.answers]
            tally.add(outcome.request_class, said.index(said[outcome.chosen]) + 1, len(said))
    return tally


def _links(table: ExpertTable, admission: Admission, clients: ServerClient) -> Sequence[tuple[str, Measure]]:
    found: list[tuple[str, Measure]] = []
    for expert in table.experts:
        try:
            admitted = admission.admit(expert, expert.name, private=False, structured=False)
            if admitted.server is not None:
                found.append((expert.name, partial(clients.link_s, admitted.server)))
                continue
            lead = admission.route(expert, private=False).lead
        except GanglionError:
            continue
        if lead is not None:
            found.append((expert.name, partial(_connect_s, lead.address)))
    return found


async def _connect_s(address: str) -> float:
    """Time to connect by TCP: one round trip."""
    host, port = split_address(address)
    began_s = time.monotonic()
    async with asyncio.timeout(CONNECT_S):
        _, writer = await asyncio.open_connection(host, port)
    took_s = time.monotonic() - began_s
    writer.close()
    return took_s
