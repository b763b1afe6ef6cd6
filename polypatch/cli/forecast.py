"""``polypatch forecast``: from a table of series to forecasts with intervals, and a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import BudgetText, Device, Runs, check_device, console, write_text

if TYPE_CHECKING:
    from ..forecast import Forecasts


def command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="SERIES",
            help="A .csv or .parquet file, or bundled:co2, bundled:sunspots, bundled:elnino, "
            "bundled:macro.",
        ),
    ],
    horizon: Annotated[int, typer.Option("--horizon", help="Steps to forecast.")],
    models: Annotated[
        str,
        typer.Option("--models", help="Forecasters, comma-separated: nlinear,dlinear(width=7), …"),
    ] = "nlinear,dlinear",
    lookback: Annotated[
        int | None,
        typer.Option(
            "--lookback",
            help="Steps that models see; default: twice the horizon or the season.",
        ),
    ] = None,
    quantiles: Annotated[
        str, typer.Option("--quantiles", help="Between 0 and 1, rising, comma-separated.")
    ] = "0.05,0.25,0.5,0.75,0.95",
    time: Annotated[str | None, typer.Option("--time", help="The column of times.")] = None,
    ids: Annotated[
        str | None,
        typer.Option("--id", help="The column that names each row's series, in long tables."),
    ] = None,
    value: Annotated[str | None, typer.Option("--value", help="The column of values.")] = None,
    frequency: Annotated[
        str | None,
        typer.Option("--frequency", help="Average values over steps: h, D, W, MS, 15min, …"),
    ] = None,
    budget: BudgetText = "50epochs",
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder of forecasts and report.")] = Path(
        "forecast"
    ),
    table: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    runs: Runs = Path("runs"),
    device: Device = None,
) -> None:
    """Forecast series: train models beside simple baselines, take the best, measure how sure it is.

    Leaves forecasts.csv and a report in --out (open index.html).
    """
    import shlex
    import sys

    terminal = console()
    terminal.print("Loading …")
    from ..data.series import load_series
    from ..errors import PolypatchError, suggest
    from ..forecast import forecast
    from ..report.forecast_page import write_forecast_report
    from ..spec import split_list

    check_device(device)
    if table not in ("csv", "parquet"):
        raise PolypatchError(f"there is no format {table!r}{suggest(table, ('csv', 'parquet'))}")
    levels = _quantiles(quantiles)
    series = load_series(data, time=time, ids=ids, value=value, frequency=frequency)
    with _bars(terminal) as progress:
        found = forecast(
            series,
            horizon=horizon,
            lookback=lookback,
            models=split_list(models),
            levels=levels,
            budget=budget,
            seed=seed,
            root=runs,
            device=device,
            progress=progress,
        )
    for note in found.notes:
        terminal.print(note, markup=False, highlight=False)
    file = _write(found, out, table)
    called = shlex.join(["polypatch", *sys.argv[1:]])
    page = write_forecast_report(found, out, command=called)
    _print(found)
    print(f"Forecasts: {file}")
    print(f"Report: {page}")


def _quantiles(text: str) -> tuple[float, ...]:
    from ..errors import PolypatchError

    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise PolypatchError(f"{text!r} are no quantiles; write them as 0.05,0.5,0.95") from error


def _bars(terminal: Any) -> Any:
    """Progress bars, one for each model that trains."""
    import contextlib
    from collections.abc import Iterator

    from rich.progress import Progress, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Iterator[Callable[[str], Callable[..., None]]]:
        columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
        with Progress(*columns, console=terminal) as bars:

            def watch(spec: str) -> Callable[..., None]:
                bar = bars.add_task(spec, total=None)

                def step(done: int, total: int, loss: float, seconds: float) -> None:
                    bars.update(bar, completed=done, total=total)

                return step

            yield watch

    return shown()


def _write(found: Forecasts, out: Path, table: str) -> Path:
    file = out / f"forecasts.{table}"
    if table == "csv":
        write_text(file, found.table.to_csv(index=False, float_format="%.7g"))
        return file
    out.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    found.table.to_parquet(beside, index=False)
    beside.replace(file)
    return file


def _print(found: Forecasts) -> None:
    width = max(len(c.spec) for c in found.candidates)
    print(f"{'model':{width}}  validation MSE  test MSE  test MAE  parameters")
    for c in found.candidates:
        print(
            f"{c.spec:{width}}  {c.val.mse:14.4f}  {c.test.mse:8.4f}  {c.test.mae:8.4f}  "
            f"{c.parameters:10,}"
        )
    print(found.sentence)
    if found.covered is not None:
        low, high = found.levels[0], found.levels[-1]
        print(
            f"The interval from {low:g} to {high:g} held {100 * found.covered:.1f} % of the test "
            "part."
        )
