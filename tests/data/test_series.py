"""Tables of series: what is read, what is left out with a word, what is refused with its line."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest

from polypatch.data.calendar import season_of, step_of
from polypatch.data.series import load_series, series_of
from polypatch.errors import PolypatchError


@pytest.fixture
def csv(tmp_path):
    def write(text: str, name: str = "sales.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


D1, D2, D3 = "2024-01-01", "2024-01-02", "2024-01-03"


def hours(count, start="2024-01-01"):
    return pd.date_range(start, periods=count, freq="h")


def wide(count=6):
    """A table of a column of times and two of numbers."""
    return pd.DataFrame(
        {"date": hours(count), "a": np.arange(count) * 1.0, "b": -1.0 * np.arange(count)}
    )


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "frequency", "season"),
    [
        ("co2", (2284, 1), "W-SAT", 52),
        ("sunspots", (309, 1), "YS-JAN", 1),
        ("elnino", (732, 1), "MS", 12),
        ("macro", (203, 12), "QS-JAN", 4),
    ],
)
def test_bundled_series(name, shape, frequency, season):
    series = load_series(f"bundled:{name}")
    assert series.values.shape == shape
    assert series.frequency == frequency
    assert season_of(series.index) == season


def test_a_wide_table(csv):
    series = load_series(csv("date,a,b\n2024-01-01,1,2\n2024-01-02,3,\n2024-01-03,5,6\n"))
    assert series.columns == ("a", "b")
    assert series.frequency == "D"
    np.testing.assert_array_equal(series.values, [[1, 2], [3, np.nan], [5, 6]])
    assert series.notes == ("1 of 6 values are missing",)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(csv, delimiter):
    text = "date,a\n2024-01-01,1\n2024-01-02,2\n2024-01-03,3\n".replace(",", delimiter)
    np.testing.assert_array_equal(load_series(csv(text)).values[:, 0], [1, 2, 3])


def test_decimal_commas_between_semicolons(csv):
    series = load_series(csv("date;a\n2024-01-01;1,5\n2024-01-02;2\n2024-01-03;-3,25\n"))
    np.testing.assert_array_equal(series.values[:, 0], [1.5, 2, -3.25])


def test_a_long_table_becomes_wide(csv):
    days, shops = ("2024-01-01", "2024-01-02", "2024-01-03"), ("west", "east")
    rows = [f"{day},{shop},{n}" for n, (day, shop) in enumerate(product(days, shops))]
    path = csv("\n".join(["date,shop,sold", *rows]))
    series = load_series(path)
    assert series.columns == ("west", "east")  # in the file's order
    np.testing.assert_array_equal(series.values, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(load_series(path, ids="shop", value="sold").values, series.values)


def test_long_tables_may_lack_a_series_at_some_times(csv):
    rows = [
        "2024-01-01,a,1",
        "2024-01-01,b,2",
        "2024-01-02,a,3",
        "2024-01-03,a,5",
        "2024-01-03,b,6",
    ]
    series = load_series(csv("\n".join(["date,shop,sold", *rows])))
    np.testing.assert_array_equal(series.values, [[1, 2], [3, np.nan], [5, 6]])


def test_parquet_with_the_times_as_index(tmp_path):
    path = tmp_path / "series.parquet"
    wide().set_index("date").to_parquet(path)
    assert load_series(str(path)).columns == ("a", "b")


def test_rows_out_of_order_are_sorted_with_a_word():
    series = series_of(wide().iloc[[2, 0, 1, 4, 3, 5]], name="t")
    np.testing.assert_array_equal(series.values[:, 0], np.arange(6))
    assert "rows are put into the order of time" in series.notes


def test_missing_steps_become_empty_rows_with_a_word():
    series = series_of(wide(30).drop(index=[3, 4, 17]), name="t")
    assert len(series.values) == 30
    assert np.isnan(series.values[[3, 4, 17]]).all()
    assert any(
        n.startswith("3 steps of 1 hour are missing, the first at 2024-01-01 03:00")
        for n in series.notes
    )


@pytest.mark.parametrize(
    "freq", ["s", "15min", "h", "D", "B", "W-SUN", "MS", "ME", "QS-JAN", "YE-DEC"]
)
@pytest.mark.parametrize("holes", [[], [5], [4, 5, 6, 11]])
def test_steps_of_the_calendar_are_found_behind_gaps(freq, holes):
    stamps = pd.date_range("2023-01-01", periods=40, freq=freq)
    found = step_of(stamps.delete(holes))
    assert found is not None
    assert found.equals(stamps)


def test_business_days_are_not_days_with_gaps():
    stamps = pd.date_range("2024-01-01", periods=30, freq="B")
    assert step_of(stamps).freqstr == "B"
    assert season_of(step_of(stamps)) == 5


def test_without_times_rows_are_steps_with_a_word(csv):
    series = load_series(csv("a,b\n1,2\n3,4\n"))
    assert series.frequency is None
    assert season_of(series.index) == 1
    assert any("equally spaced" in note for note in series.notes)


def test_years_and_counted_steps_are_times(csv):
    assert load_series(csv("year,a\n1999,1\n2000,2\n2001,3\n")).frequency == "YS-JAN"
    counted = load_series(csv("t,a\n5,1\n6,2\n7,3\n"))
    assert counted.columns == ("a",)
    assert list(counted.index) == [5, 6, 7]  # as the table counts


@pytest.mark.parametrize("scale", [1, 1000])
def test_seconds_since_1970_are_times(csv, scale):
    text = "timestamp,a\n" + "".join(f"{(1704067200 + 3600 * h) * scale},{h}\n" for h in range(5))
    series = load_series(csv(text))
    assert series.frequency == "h"
    assert series.index[0] == pd.Timestamp("2024-01-01")


def test_zones_are_given_in_utc(csv):
    text = "date,a\n" + "".join(f"2024-03-31T0{h}:00:00+02:00,{h}\n" for h in range(4))
    series = load_series(csv(text))
    assert series.index[0] == pd.Timestamp("2024-03-30 22:00")
    assert "times with zones are given in UTC" in series.notes


def test_a_frequency_averages_values_of_one_step():
    series = series_of(wide(48), name="t", frequency="D")
    np.testing.assert_allclose(series.values[:, 0], [11.5, 35.5])
    assert any("48 rows became 2" in note for note in series.notes)


def test_the_fingerprint_follows_the_values():
    table = wide()
    same, other = series_of(table, name="t"), series_of(table.assign(b=7.0), name="t")
    assert same.fingerprint == series_of(table, name="u").fingerprint != other.fingerprint


# ---- what is left out with a word ----------------------------------------------------------------


def test_columns_without_numbers_are_left_out_with_a_word():
    series = series_of(wide().assign(shop="west", nothing=np.nan, same=3.0), name="t")
    assert series.columns == ("a", "b", "same")
    assert "left out: column 'shop' holds no numbers" in series.notes
    assert "left out: no value in 'nothing'" in series.notes
    assert "never change: 'same'" in series.notes


def test_rows_that_repeat_are_left_out_with_a_word():
    table = wide()
    series = series_of(pd.concat([table, table.iloc[[2, 2]]]), name="t")
    assert len(series.values) == 6
    assert "2 lines repeat another and are left out" in series.notes


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("date,a\n", "has no rows"),
        (f"date,a\n{D1},1\n{D2},x\n{D3},3\n", "line 3: 'x' in column 'a' is no number"),
        (f"date,a\n{D1},1\n{D2},inf\n{D3},3\n", "line 3: 'a' is infinite"),
        (f"date,a\n{D1},1\nsoon,2\n{D3},3\n", "line 3: 'soon' in 'date' is no time of the same"),
        (f"date,a\nsoon,1\n{D2},2\n{D3},3\n", "line 2: 'soon' in 'date' is no time; write"),
        (f"date,a\n{D1},1\n,2\n{D3},3\n", "line 3: the time in 'date' is missing"),
        (f"date,a\n{D1},1\n{D2},2\n{D2},3\n{D3},4\n", "lines 3 and 4 both have"),
        (f"date,a\n{D1},1\n{D2},2\n", "too few to see the step"),
        (f"date,a\n{D1},w\n{D2},x\n{D3},y\n", "no column of numbers"),
        ("time,a\n1,1\n2.5,2\n3,3\n", "no years, no seconds since 1970"),
        (f"date,a\n{D1},1\n{D2},2,9\n{D3},3\n", "is no table.*line 3"),
        (f"date,i,a,b\n{D1},x,1,1\n{D1},y,1,2\n{D2},x,1,3\n", "--value"),
        (f"date,i,a\n{D1},x,1\n{D1},x,2\n{D2},y,1\n", "line 3: series 'x' has another"),
    ],
)
def test_what_contradicts_itself_is_refused_with_its_line(csv, text, said):
    with pytest.raises(PolypatchError, match=said):
        load_series(csv(text))


def test_irregular_times_are_refused_with_their_line():
    table = wide(20)
    table.loc[7, "date"] += pd.Timedelta(minutes=20)
    with pytest.raises(
        PolypatchError, match=r"t, line 9: the time .*07:20:00 doesn't lie on the steps"
    ):
        series_of(table, name="t")


def test_a_time_axis_of_almost_nothing_is_refused():
    table = wide(20)
    table.loc[10:, "date"] += pd.Timedelta(days=300)
    with pytest.raises(PolypatchError, match=r"line 12: .* far too many steps are missing"):
        series_of(table, name="t")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(time="dat"), "did you mean date"),
        (dict(ids="shops"), "no column 'shops'"),
        (dict(frequency="fortnightly"), "'fortnightly' is no frequency"),
    ],
)
def test_wrong_words_are_named(words, said):
    with pytest.raises(PolypatchError, match=said):
        series_of(wide(), name="t", **words)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("bundled:sunspot", "did you mean sunspots"),
        ("nowhere.csv", "there is no file nowhere.csv"),
    ],
)
def test_wrong_places_are_named(spec, said):
    with pytest.raises(PolypatchError, match=said):
        load_series(spec)


def test_a_file_of_another_kind(csv, tmp_path):
    with pytest.raises(PolypatchError, match=r"neither a \.csv nor a \.parquet"):
        load_series(csv("x", "sales.xlsx"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(PolypatchError, match="is no parquet file"):
        load_series(str(tmp_path / "broken.parquet"))
    (tmp_path / "latin.csv").write_bytes("date,a\n2024-01-01,\xe9\n".encode("latin-1"))
    with pytest.raises(PolypatchError, match="is not UTF-8"):
        load_series(str(tmp_path / "latin.csv"))
