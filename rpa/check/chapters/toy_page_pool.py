"""The small book of pages that exercise 2.4 writes into."""

from rpa.check.errors import WrongResult


class PageBook:
    """Who lists which page: `rpa.page_pool.PagePool` without its guards, and without `append`.

    Attributes:
        page_size: tokens of a page.
        free: pages that nobody lists; `take` uses the first one.
        references: for each page, how many sequences list it.
        pages: for each sequence, its pages in the order of its tokens.
        kv_len: for each sequence, how many tokens it has.

    >>> book = PageBook(num_pages=8, page_size=4)
    >>> book.open("a")
    >>> book.pages["a"].append(book.take())
    >>> book.kv_len["a"] = 3
    >>> book.fork("a", "b")
    >>> book.pages["b"], book.references[0]
    ([0], 2)
    """

    def __init__(self, num_pages, page_size):
        self.page_size = page_size
        self.free = list(range(num_pages))
        self.references = [0] * num_pages
        self.pages, self.kv_len = {}, {}

    def open(self, name):
        """Open a sequence without tokens."""
        self.pages[name], self.kv_len[name] = [], 0

    def take(self):
        """Take a free page; its only owner is whoever took it.

        Raises:
            WrongResult: no page is free. The scripts of the check need fewer than there are.
        """
        if not self.free:
            raise WrongResult(
                f"no page is free: all {len(self.references)} are taken, expected fewer; is one "
                "taken that is not needed, or never given back?"
            )
        page = self.free.pop(0)
        self.references[page] = 1
        return page

    def fork(self, parent, child):
        """Open `child` with all tokens of `parent`: the same pages, one owner more."""
        self.pages[child], self.kv_len[child] = list(self.pages[parent]), self.kv_len[parent]
        for page in self.pages[child]:
            self.references[page] += 1

    def close(self, name):
        """Close a sequence; pages that nobody lists any more become free."""
        for page in self.pages.pop(name):
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)
        del self.kv_len[name]
