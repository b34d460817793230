"""MST's flags: bad input, masks that will not change, names of runs."""

import pytest
from test_mst import agent_of

BAD = {
    ("--actor-nm", "2:4", "--actor-sparsity", "0.5"): "--actor-nm",
    ("--critic-nm", "2:4", "--critic-regime", "dense"): "--critic-nm",
    ("--critic-sparsity", "0.5", "--critic-regime", "dense"): "--critic-sparsity",
    ("--critic-nm", ""): "N:M",
    ("--critic-nm", "5:4"): "N:M",
    ("--critic-nm", "1:10000"): "9,999",
    ("--critic-nm", "2-4"): "N:M",
    ("--critic-sparsity", "1"): "--critic-sparsity",
    ("--actor-sparsity", "nan"): "--actor-sparsity",
    ("--critic-sparsity", "0.999"): "leaves",
    ("--mask-update-interval", "1"): "--mask-update-interval",  # every update would be a change
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_gets_one_line(mst, cli, argv):
    code, out, err = cli(mst, *argv, "--no-track")
    assert code == 2 and BAD[argv] in err and err.count("\n") == 1 and "Traceback" not in out + err


SHORT = {"total_timesteps": 1100, "learning_starts": 100, "mask_update_interval": 100}
WARNINGS = {  # options: whose masks do not change, why
    ("mask_update_interval", 900): ("critic", "--mask-update-interval"),
    ("mask_end", 0.0): ("critic", "--mask-end"),
    ("learning_starts", 1100): ("critic", "--learning-starts"),
    ("drop_fraction", 0.0): ("critic", "--drop-fraction"),
    ("critic_nm", "4:4"): ("critic", "nothing is inactive"),
    ("critic_sparsity", 0.0): ("critic", "nothing is inactive"),
    ("critic_sparsity", 1e-9): ("critic", "nothing is inactive"),
    ("critic_nm", "600:9999"): ("critic", "nothing is inactive"),  # more than its layers' inputs
    ("drop_fraction", 1e-6): ("critic", "--drop-fraction"),  # less than one weight
    ("drop_fraction", 0.51): ("critic", "drops 1/2 of"),
    ("actor_regime", "set"): None,
    ("critic_regime", "static"): None,
}


@pytest.mark.parametrize("change", WARNINGS)
def test_masks_that_will_not_change_get_a_word(mst, capsys, change):
    more = {"critic_nm": "2:4"} if change == ("drop_fraction", 0.51) else {}
    agent, args = agent_of(mst, **SHORT | dict([change]), **more)
    mst.check_schedule(args, agent)
    err, wanted = capsys.readouterr().err, WARNINGS[change]
    assert err.count("warning") == (wanted is not None)
    assert wanted is None or (f"the {wanted[0]}'s " in err and wanted[1] in err)


def test_a_schedule_that_begins_late_gets_no_word(mst, monkeypatch, capsys):
    agent, args = agent_of(mst, **SHORT)
    for last, words in ((999, 0), (1000, 1)):  # updates whose masks can change are 1 to 999
        monkeypatch.setattr(mst, "drop_fractions", lambda _, x, __, last=last: {"critic": 0.1} if x == last else {})
        mst.check_schedule(args, agent)
        assert capsys.readouterr().err.count("the critic's masks do not change") == words


def test_names(mst):
    names = {
        (): "static60-rigl60",
        ("critic_regime", "static"): "static60-static60",
        ("critic_nm", "2:4"): "static60-rigl2of4",
    }
    for change, name in names.items():
        assert mst.pattern(mst.Args(**dict([change] if change else []))) == name
    assert mst.pattern(mst.Args(actor_regime="dense", critic_regime="dense")) == "dense"
