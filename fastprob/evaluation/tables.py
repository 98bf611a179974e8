"""Tables as text and in Markdown."""

from collections.abc import Iterable, Sequence

from fastprob.evaluation.statistics import mean_std


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of `rows` under `header`, its columns as wide as what stands in them."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("   ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of `rows` under `header`."""
    head, *lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return "\n".join([head, "|" + "---|" * len(header), *lines])


def percent(shares: Iterable[float], sign: str = "") -> str:
    """Mean and standard deviation of shares, in percent: "84.2 ± 0.3", "84.2" of one share, "" of none.

    sign: "+" shows the sign of a positive mean.
    """
    shares = [100 * share for share in shares]
    if not shares:
        return ""
    mean, std = mean_std(shares)
    return f"{mean:{sign}.1f}" + (f" ± {std:.1f}" if len(shares) > 1 else "")
