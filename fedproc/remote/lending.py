"""Reading the memory of a worker: what may write there waits meanwhile. Runs in the parent."""

from fedproc.remote.borrows import Borrow
from fedproc.remote.link import MOST_UNANSWERED, Link
from fedproc.remote.message import Message
from fedproc.remote.site import Site


def lend(link: Link, borrow: Borrow, message: Message, site: Site) -> int:
    """Send a query that exports memory; from it on, commands that may write wait.

    Returns:
        ``link.outbox.writes``, with which what the answer tells is good.
    """
    writes = _begin(link, borrow, message, site)
    assert writes is not None
    link.flush()
    return writes


def lend_again(link: Link, borrow: Borrow, message: Message, site: Site, writes: int) -> bool:
    """The same without an answer, if nothing that may write was sent since ``writes``.

    Not where something is private: a worker may have to refuse, whatever was written. Nor where
    submitting would wait.
    """
    # the janitor writes it, or the next command takes it along
    return _begin(link, borrow, message, site, writes) is not None


def _begin(
    link: Link, borrow: Borrow, message: Message, site: Site, known: int | None = None
) -> int | None:
    """Send and note the borrow; nothing gets in between, and signal handlers are refused.

    Returns:
        ``link.outbox.writes``; None: it is not what is ``known``, and nothing was sent.
    """
    outbox, number = link.outbox, 0
    try:
        link.check()
        with outbox.lock:
            if link.end is not None or outbox.sending:
                link.refuse(message.what)
            outbox.sending, outbox.drawn, last = True, 0, outbox.last
            try:
                if known is not None:
                    if outbox.writes != known or not _may_lend_unasked(link):
                        return None
                    borrow.answered = False
                outbox.send(message, site)
                outbox.borrows.begin(borrow, outbox.drawn)
                if known is not None:
                    outbox.last = last  # nobody waits for it: with no other work a worker is idle
                return outbox.writes
            finally:
                number, outbox.sending = outbox.drawn, False
    except BaseException:  # Ctrl-C, too: the borrow may not know its number yet
        outbox.disown(number, message)
        raise


def _may_lend_unasked(link: Link) -> bool:
    waits = link.lockstep != 0.0 or link.inbox.unanswered() > MOST_UNANSWERED // 2
    return not (waits or link.keeps_private)


def free_to_write(link: Link, borrow: Borrow) -> None:
    """A copy is read: what waits for this borrow goes out, its blocks stay."""
    link.outbox.borrows.read_a_copy(borrow)
    link.outbox.go_on()


def give_back(link: Link, borrow: Borrow) -> None:
    """The end of a borrow: what waited for it goes out. Ending it twice does nothing."""
    if borrow.lasts:
        if borrow.exported:  # first: Ctrl-C in between releases twice, which does no harm
            link.release(borrow.query)
        link.outbox.borrows.end(borrow)
    link.outbox.go_on()
