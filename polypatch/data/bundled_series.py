"""Real series that statsmodels brings along; nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pandas as pd

__all__ = ["BUNDLED_SERIES"]


def _table(data: ModuleType) -> pd.DataFrame:
    table = data.load_pandas().data
    assert isinstance(table, pd.DataFrame)
    return table


def co2() -> pd.DataFrame:
    """Carbon dioxide over Mauna Loa, ppm: 2,284 weeks from 1958 to 2001, 59 of them missing."""
    from statsmodels.datasets import co2 as data

    return _table(data).rename_axis("time").reset_index()


def sunspots() -> pd.DataFrame:
    """Sunspot numbers: 309 years from 1700 to 2008."""
    from statsmodels.datasets import sunspots as data

    return _table(data).rename(columns={"YEAR": "time", "SUNACTIVITY": "sunspots"})


def elnino() -> pd.DataFrame:
    """Sea surface temperature of the El Niño region 1+2, °C: 732 months from 1950 to 2010."""
    from statsmodels.datasets import elnino as data

    table = _table(data).set_index("YEAR")
    months = pd.date_range("2000-01", periods=12, freq="MS").strftime("%b").str.upper()
    values = table[list(months)].to_numpy().ravel()
    times = pd.date_range(f"{int(table.index[0])}-01-01", periods=len(values), freq="MS")
    return pd.DataFrame({"time": times, "temperature": values})


def macro() -> pd.DataFrame:
    """The economy of the United States, 12 series: 203 quarters from 1959 to 2009."""
    from statsmodels.datasets import macrodata as data

    table = _table(data)
    quarters = (
        table["year"].astype(int).astype(str) + "Q" + table["quarter"].astype(int).astype(str)
    )
    times = pd.PeriodIndex(quarters, freq="Q").to_timestamp()
    return table.drop(columns=["year", "quarter"]).assign(time=times)


#: name → table with a column ``time``
BUNDLED_SERIES: dict[str, Callable[[], pd.DataFrame]] = {
    "co2": co2, "sunspots": sunspots, "elnino": elnino, "macro": macro,
}  # fmt: skip
