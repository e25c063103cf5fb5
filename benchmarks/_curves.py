"""The curves of the levels: our time beside dense as gates close, and as tokens or batch grow.

A point is our time over dense's, both measured in turn in one run, so that it does not depend on
how fast the machine was just then. Along a curve it must not rise, nor be above dense at all.
"""

import dataclasses
import math

FIELDS = ("level", "model", "batch", "tokens", "lora", "dtype", "open")
ALONG = {"open": True, "tokens": False, "batch": False}  # field -> whether it falls along a curve
POINTS = 3  # at least, of a curve
ABOVE = 1.03  # times dense, as in goals.GOALS
RULE = (
    "Our time over dense's in the same run, first point to last: as gates close, or as tokens or "
    "the batch grow, at the newest commit with three points or more. It must not rise: a point "
    "fails where it is above one before it by more than noise, the root of the sum of squares of "
    "four spreads, those of ours and of dense at both points, each half of p80 - p20 over the "
    f"median. Nor may any point be above {ABOVE:.2f}, where we take longer than dense."
)
HEADER = ("curve", "along", "of dense", "rises at", "above dense at", "")


@dataclasses.dataclass(frozen=True)
class Point:
    """at: the value of the field along the curve. share: our time over dense's. noise: of it, as a
    fraction. row: ours."""

    at: float
    share: float
    noise: float
    row: dict

    @classmethod
    def of(cls, along: str, ours: dict, dense: dict) -> "Point":
        noise = math.hypot(*((row["p80"] - row["p20"]) / 2 / row["ms"] for row in (ours, dense)))
        return cls(ours[along], ours["ms"] / dense["ms"], noise, ours)

    def rises_over(self, earlier: "Point") -> bool:
        return self.share > earlier.share * (1 + math.hypot(self.noise, earlier.noise))


@dataclasses.dataclass(frozen=True)
class Curve:
    """points in the order in which gates close, or tokens or the batch grow."""

    along: str
    points: tuple[Point, ...]

    @property
    def rising(self) -> list[Point]:
        """The points that are above one before them by more than noise."""
        return [
            point
            for index, point in enumerate(self.points)
            if any(point.rises_over(earlier) for earlier in self.points[:index])
        ]

    @property
    def above(self) -> list[Point]:
        """The points at which we take longer than dense."""
        return [point for point in self.points if point.share > ABOVE]

    def cells(self) -> list[str]:
        """Of HEADER."""
        first, last = self.points[0], self.points[-1]
        row = first.row
        batch = "B" if self.along == "batch" else row["batch"]
        tokens = "T" if self.along == "tokens" else row["tokens"]
        said = [row["level"], row["model"], f"{batch} x {tokens}", row["dtype"]]
        said += [] if self.along == "open" else [f"{row['open']:.0%} open"]
        said += [f"LoRA {row['lora']}"] if row["lora"] else []
        return [
            ", ".join(said),
            f"{self.along} {self._at(first)} to {self._at(last)}, {len(self.points)} points",
            f"{first.share:.2f} to {last.share:.2f}",
            self._named(self.rising),
            self._named(self.above),
            "short" if self.rising or self.above else "pass",
        ]

    def _at(self, point: Point) -> str:
        return f"{point.at:.0%}" if self.along == "open" else str(point.at)

    def _named(self, points: list[Point]) -> str:
        return ", ".join(f"{self._at(point)} ({point.share:.2f})" for point in points)


def curves(results: list[dict]) -> list[Curve]:
    """Every curve of one device's results, oldest first, closing gates before growing sizes."""
    runs: dict[tuple, dict[str, dict]] = {}
    for row in results:
        if row["bench"] == "level" and row.get("contender") in ("ours", "dense") and "p20" in row:
            run = (row.get("commit"), row.get("date"), *(row[field] for field in FIELDS))
            runs.setdefault(run, {})[row["contender"]] = row
    pairs = [(run["ours"], run["dense"]) for run in runs.values() if len(run) == 2]
    return [curve for along in ALONG for curve in _along(along, pairs)]


def _along(along: str, pairs: list[tuple[dict, dict]]) -> list[Curve]:
    """The curves in which only one field changes, each of one commit."""
    found: dict[tuple, dict[str, dict[float, Point]]] = {}
    for ours, dense in pairs:
        fixed = tuple(ours[field] for field in FIELDS if field != along)
        commits = found.setdefault(fixed, {})
        # Taken out and put back: the commit that measured last is the last.
        points = commits.pop(ours.get("commit"), {})
        points[ours[along]] = Point.of(along, ours, dense)
        commits[ours.get("commit")] = points
    made = []
    for fixed in sorted(found):
        long = [points for points in found[fixed].values() if len(points) >= POINTS]
        if long:
            order = sorted(long[-1], reverse=ALONG[along])
            made.append(Curve(along, tuple(long[-1][at] for at in order)))
    return made
