"""The streaming worker: pulls, dispatches, settles, drains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from consumers.bury import bury, dead_letter
from consumers.close_session import close_session
from consumers.context import Context, answering, read_event
from consumers.open_session import open_session
from consumers.pool import fill
from consumers.push_files import push_files, send_file
from consumers.run_command import run_command
from consumers.send_input import send_input
from consumers.settlement import DONE, LEAVE, Later, Leave, Refuse, Settlement
from consumers.sweep import sweep
from consumers.tend_session import tend_session
from schemas.envelope import CloudEvent
from schemas.errors import AgentRefused, MalformedEvent, PigeonError, Rejected, SandboxGone
from schemas.events import (
    ClockTicked,
    CommandSubmitted,
    FileRequested,
    FilesPushed,
    InputSent,
    SessionClosed,
    SessionOpened,
    SessionRequested,
    SignalSent,
    TerminalResized,
)
from schemas.ports import Delivery, Subscription
from schemas.topics import (
    DEAD_LETTERS,
    DEAD_LETTERS_SUBSCRIPTION,
    EVENTS_SUBSCRIPTION,
    LINKS_SUBSCRIPTION,
    TICKS_SUBSCRIPTION,
)

DRAIN_SECONDS = 20.0  # how long handlers under way may take after stop(); Kubernetes grants 45
RETRY_MIN_SECONDS, RETRY_MAX_SECONDS = 0.1, 5.0
SETTLE_TRIES = 3  # of an ack, a nack or a dead letter, before the message is left to come again
UNEXPECTED_TRIES = 3  # of a handler that raises what it should not, before the message is refused

log = logging.getLogger(__name__)

Handler = Callable[[Delivery], Awaitable[Settlement]]


class Worker:
    """Serves every subscription of one process. `run` it, and `stop` it to hand its sessions on."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[Subscription, Handler] = {
            EVENTS_SUBSCRIPTION: self._dispatch,
            LINKS_SUBSCRIPTION: self._dispatch,
            TICKS_SUBSCRIPTION: self._dispatch,
            DEAD_LETTERS_SUBSCRIPTION: lambda delivery: bury(self._context, delivery),
        }

    async def handle(self, subscription: Subscription, delivery: Delivery) -> None:
        """Handle and settle one delivery that came by another way than a pull. Raises BusUnavailable where it cannot
        be settled."""
        await self._hold(delivery, subscription, self._handlers[subscription])

    def stop(self) -> None:
        """Take no more messages, finish what is under way, hand tended sessions to another worker."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped or cancelled; what is held and unsettled then comes again elsewhere."""
        self._spawn(fill(self._context))
        try:
            async with asyncio.TaskGroup() as group:
                for subscription, handler in self._handlers.items():
                    group.create_task(self._serve(subscription, handler))
        finally:
            await self._cancel_rest()
            await self._context.controls.close()

    async def _serve(self, subscription: Subscription, handler: Handler) -> None:
        """Pull one subscription; its messages are held until their handlers are done, so leave it only then."""
        async with self._context.bus.pull(subscription) as deliveries:
            stopped = asyncio.create_task(self._stopping.wait())
            pulling = asyncio.create_task(self._pull(deliveries, subscription, handler))
            try:
                await asyncio.wait((stopped, pulling), return_when=asyncio.FIRST_COMPLETED)
                if pulling.done():
                    pulling.result()
            finally:
                for task in (stopped, pulling):
                    task.cancel()
                await asyncio.gather(stopped, pulling, return_exceptions=True)
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=DRAIN_SECONDS)

    async def _pull(self, deliveries: AsyncIterator[Delivery], subscription: Subscription, handler: Handler) -> None:
        async for delivery in deliveries:
            self._spawn(self._hold(delivery, subscription, handler))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a worker task failed", exc_info=task.exception())

    async def _cancel_rest(self) -> None:
        rest = set(self._tasks)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _hold(self, delivery: Delivery, subscription: Subscription, handler: Handler) -> None:
        """Handle while the lease holds; with the lease lost another worker has it, and this one settles nothing."""
        handling = asyncio.create_task(self._verdict(delivery, subscription, handler))
        lost = asyncio.create_task(delivery.lost())
        try:
            await asyncio.wait((handling, lost), return_when=asyncio.FIRST_COMPLETED)
            verdict = handling.result() if handling.done() else LEAVE
        finally:
            handling.cancel()
            lost.cancel()
            await asyncio.gather(handling, lost, return_exceptions=True)
        await self._settle_or_release(delivery, verdict)

    async def _settle_or_release(self, delivery: Delivery, verdict: Settlement) -> None:
        """A message that cannot be settled is let go of: held on to, it would block its key for a whole lease."""
        for tried in range(SETTLE_TRIES):
            try:
                await self._settle(delivery, verdict)
                return
            except Exception as error:
                log.warning("message %s cannot be settled: %r", delivery.message_id, error)
            await self._context.clock.sleep(RETRY_MIN_SECONDS * 2**tried)
        delivery.release()

    async def _settle(self, delivery: Delivery, verdict: Settlement) -> None:
        match verdict:
            case Refuse(code, reason):
                log.warning("message %s is refused: %s: %s", delivery.message_id, code, reason)
                await self._context.bus.publish(DEAD_LETTERS, dead_letter(delivery.message, code, reason))
                await delivery.ack()
            case Leave():
                delivery.release()
            case Later():
                await delivery.nack()
            case _:
                await delivery.ack()

    async def _verdict(self, delivery: Delivery, subscription: Subscription, handler: Handler) -> Settlement:
        """The handler's verdict. Later on an ordered subscription is waited out here: a nack makes the key spin."""
        failures = 0
        delay = RETRY_MIN_SECONDS
        while True:
            try:
                verdict = await handler(delivery)
            except (MalformedEvent, Rejected, AgentRefused) as error:
                return Refuse(error.code, str(error))
            except SandboxGone as error:
                log.info("message %s came too late: %s", delivery.message_id, error)
                return DONE  # the tender says what became of the session
            except PigeonError as error:
                log.warning("message %s is tried again: %r", delivery.message_id, error)
                failures += not error.retryable
                verdict = Later(delay)
            except Exception:
                log.exception("message %s: its handler failed", delivery.message_id)
                failures += 1
                verdict = Later(delay)
            if failures >= UNEXPECTED_TRIES:
                return Refuse("internal", "its handler failed every time")
            if not isinstance(verdict, Later) or not subscription.ordered:
                return verdict
            if verdict.delay == delay:
                delay = min(2 * delay, RETRY_MAX_SECONDS)
            await self._context.clock.sleep(verdict.delay)

    async def _dispatch(self, delivery: Delivery) -> Settlement:
        cloud_event = read_event(delivery.message)
        if not isinstance(cloud_event.event, SessionOpened):
            return await dispatch(self._context, cloud_event)
        with answering(cloud_event):
            return await tend_session(
                self._context,
                cloud_event.subject,
                cloud_event.event,
                message_id=delivery.message_id,
                attempt=delivery.attempt,
                stopping=self._stopping,
            )


async def dispatch(context: Context, cloud_event: CloudEvent) -> Settlement:
    """Call the one handler of this event."""
    with answering(cloud_event):
        return await _handle(context, cloud_event)


async def _handle(context: Context, cloud_event: CloudEvent) -> Settlement:
    session_id, event = cloud_event.subject, cloud_event.event
    match event:
        case SessionRequested():
            return await open_session(context, session_id)
        case CommandSubmitted():
            return await run_command(context, session_id, event, cloud_event.time)
        case InputSent() | TerminalResized() | SignalSent():
            return await send_input(context, cloud_event)
        case FilesPushed():
            return await push_files(context, cloud_event)
        case FileRequested():
            return await send_file(context, cloud_event)
        case SessionClosed(reason=reason):
            return await close_session(context, session_id, reason)
        case ClockTicked():
            return await sweep(context)
    return Refuse("malformed_event", f"no handler for {event.type} on this topic")
