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
    link.check_process()
    with link.outbox.lock:  # nobody gets a write in between
        query = link.submit(message, site, urgent=True)
        try:
            link.outbox.borrows.begin(borrow, query)
        except BaseException:  # Ctrl-C: the borrow does not know its number yet
            link.inbox.abandon(query)
            raise
        return link.outbox.writes


def lend_again(link: Link, borrow: Borrow, message: Message, site: Site, writes: int) -> bool:
    """The same without an answer, if nothing that may write was sent since ``writes``.

    Not where something is private: a worker may have to refuse, whatever was written. Nor where
    submitting would wait.
    """
    link.check_process()
    with link.outbox.lock:
        waits = link.lockstep != 0.0 or link.inbox.unanswered() > MOST_UNANSWERED // 2
        if link.outbox.writes != writes or link.keeps_private or waits:
            return False
        borrow.answered = False
        number = link.submit(message, site, more=True)
        try:
            link.outbox.borrows.begin(borrow, number)
        except BaseException:
            link.release(number)
            raise
    return True


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
