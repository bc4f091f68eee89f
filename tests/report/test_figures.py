"""Figures: their courses, their panels, and what is drawn of little."""

from scir.recipe import ARMS
from scir.report import document, figures, tables as tabling
from scir.report.figures import training_curve

from small_reports import gathered, model, pairs, steps


def test_courses_by_hand():
    g = gathered(
        pairs("sft", 1, "+", "+"),
        models=[
            model("scir", 2, retained=0.75),
            model("scir", 2, 1, retained=0.25),
            model("scir", 3, retained=0.5),
            model("srlm", 2, retained=0.2),
        ],
        steps=steps("scir", 2, [0.5, 1.0], inconsistency=0.5)
        + steps("scir", 2, [0, 0.5], 1, inconsistency=0.5)
        + steps("scir", 3, [0.5], inconsistency=0.5)
        + steps("srlm", 2, [1.0, 1.0]),
    )
    c = training_curve(g, "scir", "retained")
    assert (
        c.step.tolist() == [1, 2, 3] and c.value.tolist() == [0.25, 0.75, 0.5] and c.end.tolist() == [False, True, True]
    )
    assert training_curve(g, "srlm", "retained").value.tolist() == [0.2, 0.2], (
        "of all scored pairs, not of those it chose"
    )
    assert training_curve(g, "srlm", "loss_consistency").empty and training_curve(g, "srlm", "loss_confidence").empty
    assert len(training_curve(g, "scir", "loss_consistency")) == 3 and len(training_curve(g, "srlm", "loss_dpo")) == 2
    assert training_curve(g, "scir", "absent").empty


def test_panels():
    assert figures.families(ARMS) == {
        "methods": ["srlm", "srlm-pointwise", "dice", "cream", "external", "scir"],
        "ablations": ["scir", "scir-no-consistency", "scir-no-confidence", "scir-no-gate", "scir-static"],
    }
    assert figures.families(["sft"]) == {"methods": []} and figures.families(["scir"]) == {"methods": ["scir"]}
    assert list(figures.families(["scir-static"])) == ["ablations"] and set(figures.STYLE) == {"base", *ARMS}
    for arms in figures.families(ARMS).values():
        assert len({figures.STYLE[a][0] for a in arms}) == len(arms)


def test_figures_of_little():
    for g in (
        gathered(pairs("base", 0, "+-", [0.0, 0.0])),
        gathered(pairs("sft", 1, "++", "++")),
        gathered(pairs("sft", 1, "++", "+-", label=None).assign(tokens_a=5)),
    ):
        drawn = document.figures(g, tabling.summary(g))
        assert not {"retained", "training"} & set(drawn)
        assert ("inconsistency" in drawn) == (g.pairs.arm.iloc[0] != "base")
    g = gathered(pairs("sft", 1, "+-", "+-"), pairs("scir", 2, "+-", "+-"))
    figure = figures.plot_sets(tabling.summary(g), "inconsistency", "rate")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["M_1", "M_2"]
    assert {t.get_text() for t in figure.axes[0].get_legend().get_texts()} == {"scir", "up to M_1"}
