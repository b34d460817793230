"""What the project promises about itself: shared blocks, the diff, sizes, the README."""

import ast
import dataclasses
import difflib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

ENVS = ("HalfCheetah-v5", "Ant-v5")
SCRIPTS = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
LOGGING = (ROOT / "docs/logging.md").read_text()
KERNELS = r"^# --- kernels ---\n.*?^# --- end kernels ---\n"

CHANGED_LINES = 178  # of the diff from dense to N:M, outside the kernels
METHOD_LINES = 470  # from the first line to "From here on"
LONGER = {"rlx2_td3_continuous.py": 112, "mst_td3_continuous.py": 205}  # lines more for these methods
KERNEL_LINES = 384
FUNCTION_LINES = 59  # but for train
SIZES = {  # lines, bytes
    "dense_td3_continuous.py": (1052, 55_900),
    "rnm_td3_continuous.py": (1626, 88_330),
    "rlx2_td3_continuous.py": (1809, 100_750),
    "mst_td3_continuous.py": (1942, 108_810),
    "nm_kernel_bench.py": (1397, None),
    "sad_analysis.py": (1197, None),
    "run_grid.py": (464, None),
    "check_fork.py": (244, None),
    "export_policy.py": (354, None),
    **{f"tests/{path.name}": (500, None) for path in (ROOT / "tests").glob("*.py")},
}


def read(name):
    return (ROOT / name).read_text()


def kernels():
    (section,) = re.findall(KERNELS, read("rnm_td3_continuous.py"), re.DOTALL | re.MULTILINE)
    return section


def shared_blocks(path):
    text = path.read_text()
    blocks = re.findall(r"^# --- shared: (\w+) ---\n(.*?)^# --- end shared ---$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("# --- shared: ") == text.count("# --- end shared ---"), path
    assert len(dict(blocks)) == len(blocks) and all(len(block.splitlines()) > 3 for _, block in blocks)
    return dict(blocks)


def test_shared_blocks_are_equal_to_the_byte():
    seen, shared = {}, set()
    for path in SCRIPTS:
        for name, block in shared_blocks(path).items():
            first, text = seen.setdefault(name, (path, block))
            assert block == text, f"block {name!r} differs between {first.name} and {path.name}"
            shared |= {name} if first != path else set()
    assert shared == set(seen)  # what is marked as shared is somewhere else, too
    for script in SCRIPTS:  # what a training script has of these it has in the N:M script's form
        if script.name.endswith("_td3_continuous.py"):
            assert set(shared_blocks(script)) - {"topology"} <= set(shared_blocks(ROOT / "rnm_td3_continuous.py"))
    assert {"td3", "run", "kernels", "sad", "topology"} <= shared


def test_the_diff_is_the_method():
    dense, rnm = read("dense_td3_continuous.py"), read("rnm_td3_continuous.py").replace(kernels(), "")
    changed = [
        line
        for line in difflib.unified_diff(dense.splitlines(), rnm.splitlines(), n=0)
        if line[0] in "+-" and line[1:].strip() and line[:3] not in ("+++", "---") and line[1:7] != "# --- "
    ]
    assert 50 < len(changed) <= CHANGED_LINES
    added = [line[1:] for line in changed if line[0] == "+"]
    assert any("class SparseLinear" in line for line in added) and any("def refresh_masks" in line for line in added)
    assert not any(word in dense for word in ("SparseLinear", "refresh_masks", "mask_update", "sparsify", "sad_"))


@pytest.mark.parametrize("name", SIZES)
def test_files_stay_small(name):
    lines, size = SIZES[name]
    assert len(read(name).splitlines()) <= lines
    assert size is None or len(read(name).encode()) <= size
    assert "fmt: " + "skip" not in read(name)  # sizes are those of `ruff format`


def test_the_method_is_read_in_one_go_and_the_kernels_are_short():
    for name in ("dense_td3_continuous.py", "rnm_td3_continuous.py", *LONGER):
        lines = read(name).splitlines()
        (end,) = (i for i, line in enumerate(lines, 1) if line.startswith("# --- From here on"))
        functions = {node.name: node.lineno for node in ast.parse(read(name)).body if hasattr(node, "name")}
        method = {"Args", "Actor", "QNetwork", "Agent", "update_critics", "update_targets", "State", "train"}
        method |= {"project", "SparseLinear", "refresh_masks"} if name.startswith("rnm") else set()
        method |= {"erdos_renyi", "change_topology"} if name in LONGER else set()
        method |= {"shrink_replay"} if name.startswith("rlx2") else set()
        method |= {"swap_in_groups", "RunningNorm", "Block"} if name.startswith("mst") else set()
        assert all(functions[part] < end for part in method) and functions["ReplayBuffer"] > end
        assert end <= METHOD_LINES + LONGER.get(name, 0)
    assert "def nm_forward" in kernels() or "nm_forward(" in kernels()
    assert read("rnm_td3_continuous.py").rstrip().endswith("sys.exit(main())")
    assert len(kernels().splitlines()) <= KERNEL_LINES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_functions_fit_a_screen(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    long = {f.name for f in functions if f.end_lineno - f.lineno + 1 > FUNCTION_LINES}
    assert len(functions) > 10 and long <= {"train"}


def test_no_imports_between_scripts():
    for path in SCRIPTS:
        for other in SCRIPTS:
            assert not re.search(rf"^\s*(import|from) {other.stem}\b", path.read_text(), re.MULTILINE)


def test_every_argument_is_read_and_explained(script):
    text = Path(script.__file__).read_text()
    fields = dataclasses.fields(script.Args)
    assert len(fields) > 20
    for field in fields:
        assert re.search(rf"args\.{field.name}\b", text), field.name
        assert re.search(rf'^    {field.name}: .*\n    """.+"""$', text, re.MULTILINE), field.name


def test_defaults_of_the_twins_agree(dense, rnm):
    common = {f.name: f.default for f in dataclasses.fields(dense.Args) if f.name != "exp_name"}
    assert common.items() <= {f.name: f.default for f in dataclasses.fields(rnm.Args)}.items()


def readme_commands():
    """Each `python <script of this project> ...` in the README's bash blocks, as words; placeholders filled in."""
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||[;&|]", line.split(" #")[0]):
                words = shlex.split(command.replace("{}", "1"))
                scripts = [i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")]
                if scripts and words[scripts[0] - 1].startswith("python"):
                    yield words[scripts[0] :]


def test_readme_commands_parse(dense, rnm, rlx2, mst, monkeypatch):
    modules = {"dense_td3_continuous.py": dense, "rnm_td3_continuous.py": rnm, "rlx2_td3_continuous.py": rlx2}
    modules |= {"mst_td3_continuous.py": mst}
    commands = [command for command in readme_commands() if command[0] in modules and "--help" not in command]
    assert len(commands) >= 3 and {name for name, *_ in commands} == set(modules)
    assert any("--resume" in command for command in commands)
    for name, *argv in commands:
        module = modules[name]
        monkeypatch.setattr(module, "read_run", lambda _, made=module.Args: ({}, made()))  # of no run in particular
        args = module.parse_args(argv)
        assert re.search(r"-v\d+$", args.env_id)
        for flag, value in itertools.pairwise(argv):
            field = flag.removeprefix("--").replace("-", "_")
            if flag.startswith("--") and not value.startswith("--"):
                assert str(getattr(args, field)) == value.replace("_", "") or str(getattr(args, field)) == value


def test_readme_names_every_flag_that_it_uses(dense, rnm, rlx2, mst):
    """No flag of the training scripts in the README that they do not have."""
    fields = [field for script in (dense, rnm, rlx2, mst) for field in dataclasses.fields(script.Args)]
    known = {f.name for f in fields} | {f"no_{f.name}" for f in fields if isinstance(f.default, bool)} | {"help"}
    for name, *argv in readme_commands():
        if name.endswith("_td3_continuous.py"):
            flags = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
            assert flags <= known, (name, flags - known)


def test_every_logged_key_is_explained(script, small):
    run = Path(script.train(small(script, total_timesteps=1))["run_dir"])
    columns = (run / "metrics.csv").read_text().split("\n")[0].split(",")
    assert len(columns) > 15
    missing = {key for key in columns if not key.startswith("sad") and f"`{key}`" not in LOGGING}
    missing |= {group for key in columns if f"`{(group := key.split('/')[0])}" not in LOGGING}  # of sad, examples
    assert not missing
    assert "`global_step`" in LOGGING and "`hardware/" in LOGGING


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/*.md")]))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            target = (path.parent / file) if file else path
            assert target.exists(), link
            lines = target.read_text().lower().replace(" ", "-").splitlines() if heading else []
            assert not heading or any(re.fullmatch(rf"#+-{heading}", line) for line in lines), link


def test_readme_snippet_acts(rnm, small):
    run = rnm.train(small(rnm, env_id="Pendulum-v1", total_timesteps=201, n=1, m=4))["run_dir"]
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("runs/<run_name>", run)
    code = re.sub(r"\w+-v\d", "Pendulum-v1", code)
    scope = {}
    exec(code, scope)
    assert scope["action"].shape == (1,) and abs(scope["action"]) <= 2


NUMBERS = "none one two three four five six seven eight nine ten".split()


def read_table(text, number=0):
    """A table of a text of Markdown: for each row its cells."""
    rows = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[number].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| ---")]


def test_the_readme_s_numbers_are_those_of_the_results():
    """Steps per second of the first table; sizes, scores and core minutes of the others."""
    names, speeds, ratios = read_table(README, 1)
    measured = read_table(read("results/end_to_end/summary.md"))[1:]
    assert len(names) > 8 and set(zip(names[1:], speeds[1:], ratios[1:], strict=True)) < set(map(tuple, measured))
    xeon = {label: ratio for label, _, ratio in read_table(read("results/end_to_end_xeon/summary.md"))[1:]}
    page = read("results/rlx2/README.md")
    assert (
        f"[{float(xeon['1:8']):.1f} times](results/end_to_end_xeon/" in README
        and f"| {xeon['RLx2 96/88']} | | |" in page
    )
    assert f"It trains {float(xeon['RLx2 96/88']):.1f} times (Xeon)" in README
    columns = {"active": (0, "active parameters"), "final": (0, "final score iqm")}
    columns |= {"core": (0, "core minutes"), "equal": (1, "gain at equal core minutes")}
    columns |= {f"{x} %": (1, f"core minutes to {x} %") for x in (50, 90)}
    percents = {}
    for place, env in enumerate(ENVS, 2):
        part = read("results/paper/summary.md").partition(f"## {env}")[2]
        tables = read_table(part, 0), read_table(part, 1)  # scores, times
        (title, *labels), *said = read_table(README, place)
        assert title == env and len(labels) == 5
        found = [{cells[0]: dict(zip(table[0], cells, strict=True)) for cells in table[1:]} for table in tables]
        for (head, *row), (key, (which, column)) in zip(said, columns.items(), strict=True):
            cells = [found[which][label][column].partition(" ")[0] for label in labels]
            assert key in head and ["inf" if cell == "-" else cell for cell in row] == cells, (env, head)
        scores = [float(score.replace(",", "")) for score in said[1][1:]]
        percents |= {(env, label): f"{100 * x / scores[0]:.0f} %" for label, x in zip(labels, scores, strict=True)}
    words = " ".join(README.partition("**In short.**")[2].split())
    said = "2:4 has {} of dense's score on HalfCheetah-v5 and {} on Ant-v5, 1:4 has {} and {}, 1:8 has {} and {}."
    assert said.format(*(percents[env, label] for label in ("2:4", "1:4", "1:8") for env in ENVS)) in words
    small = (percents[env, "dense, as many weights as 1:8"] for env in ENVS)
    assert "it has {} and {} of dense's score.".format(*small) in words


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in ROOT.glob("results/*/*/meta.json")}))
def test_a_page_names_the_commit_of_its_runs(folder):
    page = (folder / "README.md").read_text()
    commits = {json.loads(path.read_text())["commit"] for path in folder.glob("*/meta.json")}
    assert commits and all(commit[:7] in page for commit in commits)


def test_the_readme_s_ranges_are_those_of_the_pairs():
    """Of dense's CPU time and score, in runs of one seed; how often each pattern is below dense."""
    runs, part = {}, " ".join(README.partition("**How well.**")[2].split())
    for path in ROOT.glob("results/paper/*/meta.json"):
        meta = json.loads(path.read_text())
        usual = meta["args"].get("mask_update_interval", 1000) == 1000 and not meta["args"].get("sparse_head")
        if usual and meta["args"]["hidden_dim"] == 256:
            key = f"{meta['n']}:{meta['m']}" if meta["n"] else "dense", meta["args"]["env_id"], meta["args"]["seed"]
            assert runs.setdefault(key, meta) is meta
    shares = {}
    for (name, env, seed), meta in runs.items():
        for measure in ("cpu_time_s", "final_score"):
            share = meta[measure] / runs["dense", env, seed][measure]
            shares.setdefault((name, measure), {})[env, seed] = share
    said = {"2:4": re.search(r"2:4 costs (.*?);", part)[1], "1:8": re.search(r"1:8 costs (.*?)\. ", part)[1]}
    for name, text in said.items():
        costs, scores = shares[name, "cpu_time_s"], shares[name, "final_score"]
        parts = [scores] if name == "2:4" else [{k: v for k, v in scores.items() if k[0] == env} for env in ENVS]
        ranges = [f"{min(x.values()):.2f} to {max(x.values()):.2f}" for x in (costs, *parts)]
        assert len(costs) >= 6 and re.findall(r"[\d.]+ to [\d.]+", text) == ranges, name
    below = [sum(share < 1 for share in shares[name, "final_score"].values()) for name in ("1:8", "1:4", "2:4")]
    said = "1:8 ends below dense in {} of {} pairs, 1:4 in {}, 2:4 in {}."
    assert said.format(*(NUMBERS[x] for x in (below[0], len(costs), *below[1:]))) in part
