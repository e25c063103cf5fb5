"""Stage 7, command line: what long work says of itself, to a person or to a program."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tqdm import tqdm

FORMS = ("text", "json", "quiet")
# (done) or (done, total), and values by name that are shown beside the bar.
Tell = Callable[..., None]


@dataclass(frozen=True)
class Log:
    """Where work reports to.

    form "text": sentences and results on stdout, bars on stderr. "json": one object a line on
    stdout, with `time` (seconds since 1970) and `event`: "message" (text), "progress" (phase, done,
    total and values), "result" (what the work returned) or "error" (text). "quiet": results and
    errors only, as text. Errors as text go to stderr.
    """

    form: str = "text"

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")

    def say(self, text: str) -> None:
        if self.form == "json":
            self._event("message", text=text)
        elif self.form == "text":
            print(text, flush=True)

    def error(self, text: str) -> None:
        if self.form == "json":
            self._event("error", text=text)
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)

    def result(self, result: dict, show: Callable[[dict], None]) -> None:
        """show prints the result for a person."""
        if self.form == "json":
            self._event("result", result=result)
        else:
            show(result)

    @contextmanager
    def bar(
        self, title: str, unit: str, total: int | None = None, done: int = 0, leave: bool = False
    ) -> Iterator[Tell]:
        """A bar that starts at `done`; leave keeps it on the screen at the end."""
        if self.form == "json":
            yield lambda done, of=total, **values: self._event(
                "progress", phase=title, done=done, total=of, **values
            )
            return
        off = self.form == "quiet"
        with tqdm(
            desc=title, unit=unit, total=total, initial=done, leave=leave, disable=off
        ) as bar:

            def tell(done: int, of: int | None = total, **values) -> None:
                bar.total = of
                if values:
                    bar.set_postfix(values, refresh=False)
                bar.update(done - bar.n)

            yield tell

    @contextmanager
    def phases(self) -> Iterator[Callable[[str, int, int], None]]:
        """A callback (phase, done, total) that shows one bar for each phase, one after another."""
        with ExitStack() as bars:
            tells: dict[str, Tell] = {}

            def tell(phase: str, done: int, total: int) -> None:
                if phase not in tells:
                    bars.close()
                    tells[phase] = bars.enter_context(self.bar(phase, "it", total, leave=True))
                tells[phase](done)

            yield tell

    def _event(self, event: str, **fields) -> None:
        stamp = {"time": round(time.time(), 3), "event": event}
        print(json.dumps({**stamp, **fields}, default=str), flush=True)
