"""What people see while the command line works: the console and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def open_console(json: str | None = None) -> Any:
    """Standard output for people, unless JSON goes there."""
    from rich.console import Console

    console = Console(stderr=json == "-", highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width: nothing should be cut
    return console


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, of) that draws progress bars on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)

    def show(what: str, done: int, of: int) -> None:
        bars.start()  # not before there is something to show
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=of)
        bars.update(tasks[what], completed=done, total=of)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
