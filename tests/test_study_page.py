"""The page of a study: what `plan --html` writes."""

import re

import matplotlib as mpl
import optuna
import pytest
from optuna.trial import TrialState

from bitplan.planner.report.figures.study import history
from tests.test_cli import FORMATS_OPTION, LITTLE, run  # noqa: F401 (a fixture)
from tests.test_page import in_browser  # noqa: F401 (a fixture)


@pytest.fixture
def asked(checkpoint):
    return ("plan", checkpoint("llama"), *LITTLE, *FORMATS_OPTION, "--rounding", "nearest", "--bpw", "5")


def test_the_trials_of_a_shared_study_in_a_browser(run, asked, in_browser, tmp_path):  # noqa: F811
    place, page = tmp_path / "studies.log", tmp_path / "trials.html"
    shared = ("--storage", place, "--study", "mine <1>", "--html", page)
    code, _, err = run(*asked, "--trials", "5", *shared)
    assert code == 0 and f"page written to {page}" in err
    text = page.read_text(encoding="utf-8")
    assert "mine &lt;1&gt;" in text and "knapsack" in text and str(tmp_path) not in text
    without_names = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|<link|@import|\bsrc=(?!\"data:)|url\((?!#)", without_names)
    assert not re.search(r"#(?:1f77b4|d62728|555555|E5E5E5)", text, re.IGNORECASE)  # Optuna's own, for white paper
    ids = re.findall(r"<[^>]*\sid=\"([^\"]+)\"", text)
    assert len(ids) == len(set(ids))
    told = in_browser(
        text,
        """
        told.overflow = document.documentElement.scrollWidth - innerWidth;
        told.titles = [...document.querySelectorAll("figure h3")].map(each => each.textContent);
        told.plots = [...document.querySelectorAll("svg.plot")].map(each => each.textContent);
        told.plans = [...document.querySelectorAll("#trials tbody tr")].map(row => row.cells[0].textContent);
        """,
    )
    assert told["overflow"] <= 0
    study = optuna.load_study(study_name="mine <1>", storage=storage_of(place))
    assert told["plans"] == [trial.user_attrs["plan"] for trial in study.trials] and len(told["plans"]) >= 5
    whole = study.get_trials(states=(TrialState.COMPLETE,))
    assert told["titles"][0] == "Losses of the trials" and told["titles"][-1] == "Loss against bytes"
    assert ("Importance of the corrections" in told["titles"]) == (len(whole) > 2)
    assert "trial" in told["plots"][0] and "bytes of all tensors" in told["plots"][-1]


def storage_of(place):
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(place)))


def test_refused_before_any_work(run, asked, tmp_path, monkeypatch):  # noqa: F811
    page = tmp_path / "trials.html"
    code, _, err = run(*asked, "--trials", "0", "--html", page)
    assert code == 2 and "--trials 0 runs none: `bitplan explain --html`" in err
    page.write_text("mine", encoding="utf-8")
    assert run(*asked, "--html", page)[0] == 2  # it exists
    monkeypatch.setattr("bitplan.planner.report.page.render.find_spec", lambda name: None)
    code, _, err = run(*asked, "--html", tmp_path / "other.html")
    assert code == 1 and "--html needs matplotlib and jinja2" in err


def test_optunas_style_stays_its_own():
    def style():
        return {name: value for name, value in mpl.rcParams.items() if not name.startswith("backend")}

    before = style()
    study = optuna.create_study()
    study.add_trials([optuna.create_trial(value=value) for value in (3.0, 1.0, 2.0)])
    assert "Best Value" in history(study)
    assert style() == before
